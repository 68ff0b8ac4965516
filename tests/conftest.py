"""Fixtures shared by the tests: real data when it is at hand, synthetic slides always."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from online_patching import SlideIndex, errors, find_slides, read_slide_index
from online_patching.testing import SyntheticSlide, write_ome_zarr, write_tiff
from tests.cloud_servers import CloudServer, azure_server, gcs_server, s3_server
from tests.servers import FaultServer

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides, patches and weights, or a skip that says so."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data is not at hand (../shared/data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def mpp_overrides(shared_data: Path) -> dict[str, float]:
    rows = csv.DictReader((shared_data / "wsi" / "mpp.csv").read_text().splitlines())
    return {row["file"]: float(row["mpp"]) for row in rows}


@pytest.fixture(scope="session")
def real_slides(shared_data: Path, mpp_overrides: dict[str, float]) -> dict[str, SlideIndex]:
    """Every real slide that is indexed, by id."""
    found = {}
    for uri in find_slides(str(shared_data / "wsi")):
        try:
            index = read_slide_index(uri, mpp=mpp_overrides.get(Path(uri).name))
        except errors.SlideError:
            continue
        found[index.slide_id] = index
    return found


@pytest.fixture(scope="session")
def small_slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three unequal synthetic slides: not square, ragged, one with a downsample that is no integer,
    one RGB without saying so, one OME-Zarr; mpp that are no round numbers."""
    folder = tmp_path_factory.mktemp("slides")
    return [
        write_tiff(
            folder / "ycbcr.svs",
            SyntheticSlide(1, 2300, 1500, mpp=0.2531),
            downsamples=(3.9995,),
            associated=True,
        ),
        write_tiff(
            folder / "rgb.svs",
            SyntheticSlide(2, 1300, 1900, mpp=0.497),
            tile_px=240,
            photometric="rgb",
        ),
        write_ome_zarr(
            folder / "third.ome.zarr", SyntheticSlide(3, 1700, 1100, mpp=0.351), chunk_px=200
        ),
    ]


@pytest.fixture(scope="session")
def small_indexes(small_slides: list[Path]) -> list[SlideIndex]:
    return [read_slide_index(str(path)) for path in small_slides]


@pytest.fixture(scope="session")
def small_corpus(small_indexes: list[SlideIndex], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three unequal synthetic slides, all of them tissue, as a corpus folder."""
    from online_patching import Corpus, ForegroundMask

    folder = tmp_path_factory.mktemp("corpus")
    for index in small_indexes:
        index.save(folder / "slides" / f"{index.slide_id}.index")
        ForegroundMask.everything(index).save(folder / "masks" / f"{index.slide_id}.png")
    Corpus.build(folder)
    return folder


@pytest.fixture(scope="session")
def s3_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudServer]:
    """An S3 server with an empty bucket; `s3_cloud.enter(monkeypatch)` makes it the one to be asked."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def gcs_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudServer]:
    """The same for GCS."""
    with gcs_server(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(scope="session")
def azure_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudServer]:
    """The same for Azure Blob Storage."""
    with azure_server(tmp_path_factory.mktemp("azure")) as server:
        yield server


@pytest.fixture
def fault_server(tmp_path: Path) -> Iterator[FaultServer]:
    """An HTTP server with ranges that misbehaves on request; serves `server.root`."""
    with FaultServer(tmp_path) as server:
        yield server


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Smooth random colours: what JPEG was made for, with something to see at every pixel."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(
        0, 256, (-(-shape[0] // 8), -(-shape[1] // 8), 3), np.uint8
    )
    return np.asarray(
        Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    )
