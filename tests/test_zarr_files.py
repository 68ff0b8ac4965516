"""Chunks that are files of their own, read by the native decoder and in Python: what is told where one is not whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    errors,
    native,
    read_slide_index,
)
from online_patching.testing import Storage, write_zarr_array
from tests.conftest import noise

STORAGES = {
    "Blosc in small blocks": Storage(2, 256, compressor="blosc-lz4-1-4096", axes="yxc"),
    "Blosc of samples apart": Storage(2, 256, 1, "blosc-lz4-2-8192", "cyx"),
    "zstd": Storage(3, 64, compressor="zstd", axes="cyx"),
    "gzip, channels apart": Storage(2, 64, 1, "gzip", "cyx"),
    "shards": Storage(3, 128, compressor="blosc-lz4-1-4096", axes="yxc", shard_px=256),
}
PICTURE = noise((500, 600, 3)) ^ np.random.default_rng(0).integers(0, 8, (500, 600, 3), np.uint8)


@pytest.fixture(params=[native.AVAILABLE, False], ids=["native", "portable"])
def either_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "AVAILABLE", request.param)


def written(folder: Path, storage: Storage) -> Path:
    write_zarr_array(folder / "a.zarr", PICTURE, storage)
    return folder / "a.zarr"


def loader_of(path: Path | str, size_px: int = 60, **options: object) -> PatchLoader:
    index = read_slide_index(str(path), mpp=0.5)
    mask = ForegroundMask.everything(index)
    sampler = PatchSampler([index], [mask], size_px=size_px, mpp=0.5, seed=3, min_foreground=0.0)
    return PatchLoader(sampler, 16, prefetch=1, quarantine_after=None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STORAGES)
def test_patches_of_files_are_those_of_the_picture(tmp_path, either_decoder, name):
    with loader_of(written(tmp_path, STORAGES[name])) as loader:
        batch = loader.next_batch()
        assert not batch.failures
        for ref, pixels in zip(batch.refs, batch.pixels, strict=True):
            x, y = int(np.floor(ref.x_px0 + 0.5)), int(np.floor(ref.y_px0 + 0.5))
            assert (pixels == PICTURE[y : y + 60, x : x + 60]).all()
        assert loader.stats.bytes_read > 0


def chunk_files(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file() and p.name[0].isdigit()]


def torn(chunk: Path) -> None:
    chunk.write_bytes(chunk.read_bytes()[:-100])


def emptied(chunk: Path) -> None:
    chunk.write_bytes(b"")


def oversize(chunk: Path) -> None:
    with chunk.open("r+b") as file:
        file.truncate(2**28 + 1)  # a hole: it takes no room


@pytest.mark.parametrize("harm", [torn, emptied])
@pytest.mark.parametrize("name", ["Blosc in small blocks", "zstd", "gzip, channels apart"])
def test_a_chunk_s_file_that_is_cut_short_is_a_bad_tile(
    tmp_path, either_decoder, name, harm: Callable[[Path], None]
):
    path = written(tmp_path, STORAGES[name])
    harm(min(chunk_files(path)))
    with loader_of(path, 150, max_failed_fraction=1.0) as loader:
        failures = [one for _ in range(4) for one in loader.next_batch().failures]
    assert failures
    assert all("does not decode" in str(one) for one in failures)


def test_an_oversize_file_is_refused_before_it_is_read(tmp_path):
    path = written(tmp_path, STORAGES["zstd"])
    oversize(min(chunk_files(path)))
    with loader_of(path, 150, max_failed_fraction=1.0) as loader:
        failures = [one for _ in range(4) for one in loader.next_batch().failures]
        assert failures
        assert all("larger than 256 MB" in str(one) for one in failures)
        assert loader.stats.bytes_read < 2**26


def test_a_folder_in_place_of_a_chunk_stops_the_run(tmp_path, either_decoder):
    path = written(tmp_path, STORAGES["Blosc in small blocks"])
    for chunk in chunk_files(path):
        chunk.unlink()
        chunk.mkdir()
    with pytest.raises(errors.StoreError, match="directory"), loader_of(path) as loader:
        loader.next_batch()


@pytest.mark.skipif(not native.AVAILABLE, reason="Python reads on from files that it holds open")
def test_chunks_that_were_replaced_are_read_as_they_are(tmp_path):
    path = written(tmp_path, STORAGES["Blosc in small blocks"])
    with loader_of(path) as loader:
        loader.next_batch()
        for chunk in chunk_files(path):
            chunk.unlink()
        loader.next_batch()  # may have been on its way
        loader.next_batch()
        assert not loader.next_batch().pixels.any()  # fill


@pytest.mark.parametrize("name", ["zstd", "gzip, channels apart"])
def test_an_empty_remote_chunk_is_a_bad_tile_and_an_absent_one_is_fill(
    fault_server, either_decoder, name
):
    path = written(fault_server.root, STORAGES[name])
    uri = f"{fault_server.url}/a.zarr"
    emptied(min(chunk_files(path)))
    with loader_of(uri, 150, max_failed_fraction=1.0) as loader:
        failures = [one for _ in range(4) for one in loader.next_batch().failures]
    assert failures
    assert all("its object is empty" in str(one) for one in failures)
    for chunk in chunk_files(path):
        chunk.unlink()
    with loader_of(uri) as loader:
        batch = loader.next_batch()
        assert not batch.failures
        assert not batch.pixels.any()
