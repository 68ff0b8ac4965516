"""What `pretrain --dry-run` says a run reads is what a loader's own counters say it read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tifffile

from online_patching import Corpus, ForegroundMask, PatchLoader, PatchSampler, read_slide_index
from online_patching.testing import SyntheticSlide, write_ome_zarr, write_tiff
from online_patching.testing.dicom import Written, write_dicom
from pathfm.cli import main
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.dry_run import COUNTS, DryRun, dry_run
from tests.servers import FaultServer

DRAWS = 96
FILES = ("a.svs", "b.svs", "lzw.tif")


def lzw_tiff(path: Path, width_px: int, height_px: int) -> None:
    """A tiled TIFF that is planned patch by patch."""
    pixels = np.random.default_rng(5).integers(0, 256, (height_px, width_px, 3), np.uint8)
    tifffile.imwrite(
        path, pixels, photometric="rgb", compression="lzw", tile=(128, 128), metadata=None,
        resolution=(1e4 / 0.3, 1e4 / 0.3), resolutionunit="CENTIMETER",
    )  # fmt: skip


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    write_tiff(folder / "a.svs", SyntheticSlide(1, 1500, 1100, mpp=0.2531), downsamples=(3.9995,))
    write_tiff(folder / "b.svs", SyntheticSlide(2, 900, 1300, mpp=0.497), tile_px=240)
    lzw_tiff(folder / "lzw.tif", 700, 900)
    picture = np.random.default_rng(6).integers(0, 256, (300, 500, 3), np.uint8)
    write_dicom(folder / "dicom", [picture], Written(mpp=0.3, parts=3))
    write_ome_zarr(folder / "c.zarr", SyntheticSlide(4, 800, 600, mpp=0.351), chunk_px=200)
    return folder


def corpus_of(uris: list[str], folder: Path) -> Path:
    for uri in uris:
        index = read_slide_index(uri)
        index.save(folder / "slides" / f"{index.slide_id}.index")
        ForegroundMask.everything(index).save(folder / "masks" / f"{index.slide_id}.png")
    Corpus.build(folder)
    return folder


def config(corpus: Path, **more: Any) -> PretrainConfig:
    steps = {"batch_size": 8, "steps": DRAWS // 8, "patch_px": 96, "mpp": (0.3, 0.5, 1.0)}
    return PretrainConfig(corpus=corpus, out=corpus / "never", min_foreground=0.0, **steps, **more)


def sampler_of(asked: PretrainConfig) -> PatchSampler:
    return PatchSampler(
        Corpus.open(asked.corpus), size_px=asked.patch_px, mpp=asked.mpp, min_foreground=0.0
    )


def told_and_counted(corpus: Path) -> tuple[DryRun, dict[str, int], list[Any]]:
    asked = config(corpus)
    sampler = sampler_of(asked)
    refs = []
    with PatchLoader(sampler, asked.batch_size, prefetch=1) as loader:
        while loader.next_draw < DRAWS - asked.batch_size:
            refs += next(loader).refs
        refs += next(loader).refs
        loader.close()
        assert loader.stats.patches == DRAWS
        counted = loader.stats.as_dict()
    assert not counted["failures"]
    return dry_run(asked, sampler), counted, refs


@pytest.mark.parametrize("where", ["disk", "http", "bucket"])
def test_requests_and_bytes_are_those_that_a_loader_counts(
    where: str, slides: Path, tmp_path: Path, fault_server: FaultServer
) -> None:
    away = where != "disk"
    uris = [str(slides / name) for name in (*FILES, "dicom")]
    host = "local files"
    if where == "http":
        host = fault_server.url
        for name in FILES:
            shutil.copy(slides / name, fault_server.root / name)
        uris = [f"{host}/{name}" for name in FILES]
    if where == "bucket":  # a slide in several objects, which http(s) cannot list
        host = "memory://dry"
        fsspec.filesystem("memory").put(str(slides), "/dry", recursive=True)
        uris = [f"{host}/{name}" for name in (*FILES, "dicom")]
    found, counted, refs = told_and_counted(corpus_of(uris, tmp_path / "c"))
    assert found.draws == found.total == DRAWS
    assert {name: getattr(found.whole, name) for name in COUNTS} == {
        name: counted[name] for name in COUNTS
    }
    assert found.inexact == 0
    assert found.whole.bytes_read > found.whole.bytes_wanted if away else not found.inexact
    for kind, key in ((found.by_mpp, "mpp"), (found.by_slide, "slide")):
        told = {value: tally.patches for value, tally in kind.items()}
        assert told == {v: sum(getattr(r, key) == v for r in refs) for v in told}
        assert sum(told.values()) == DRAWS
        for name in COUNTS:
            assert sum(getattr(tally, name) for tally in kind.values()) == counted[name]
    assert found.mpps_of_slide == {
        slide: {ref.mpp for ref in refs if ref.slide == slide} for slide in found.by_slide
    }
    assert {s: t.patches for s, t in found.by_store.items()} == {host: DRAWS}


def test_requests_for_chunks_are_exact_and_their_bytes_an_upper_bound(
    slides: Path, tmp_path: Path
) -> None:
    found, counted, _ = told_and_counted(corpus_of([str(slides / "c.zarr")], tmp_path / "c"))
    assert (found.whole.requests, found.whole.tiles) == (counted["requests"], counted["tiles"])
    assert found.whole.bytes_read >= counted["bytes_read"]
    assert found.inexact == DRAWS


def test_a_longer_run_is_scaled_from_its_first_draws(slides: Path, tmp_path: Path) -> None:
    corpus = corpus_of([str(slides / "a.svs")], tmp_path / "c")
    asked = config(corpus, estimate={"draws": DRAWS}).model_copy(update={"steps": 1000})
    found = dry_run(asked, sampler_of(asked))
    assert (found.total, found.draws) == (8000, DRAWS)
    assert found.in_the_run(found.whole.patches) == 8000


def test_the_command_prints_it_all_and_writes_nothing(
    slides: Path, tmp_path: Path, fault_server: FaultServer, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(slides / "b.svs", fault_server.root / "b.svs")
    uris = [str(slides / "a.svs"), str(slides / "c.zarr"), f"{fault_server.url}/b.svs"]
    corpus = corpus_of(uris, tmp_path / "c")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    words = f"--corpus {corpus} --out {tmp_path / 'run'} --patch_px 96 --mpp 0.5 1.0".split()
    words += "--min_foreground 0 --steps 100 --batch_size 40 --estimate.draws 200".split()
    words += "--estimate.time_patches 32 --estimate.price_per_gb 0.09".split()
    assert main(["pretrain", *words, "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for said in (
        "100 steps of 40 = 4,000 patches of 96 px",
        "planned from the first 200 draws",
        "these draws touch 3 of 3 (100.0%)",
        "patches were really read to time it",
        "hours: ",
        "egress: ",
        "at 0.09 a GB",
        "Zarr chunks count as what they decode to",
        "local files",
        fault_server.url,
    ):
        assert said in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_hours_can_be_told_without_reading_a_pixel(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    corpus = corpus_of([str(slides / "a.svs")], tmp_path / "c")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a loader was made")

    monkeypatch.setattr("pathfm.pretrain.dry_run.PatchLoader", never)
    words = f"--corpus {corpus} --steps 360 --batch_size 100 --patch_px 96 --mpp 0.5".split()
    words += ["--min_foreground", "0", "--estimate.time_patches", "0"]
    assert main(["pretrain", *words, "--dry-run", "--estimate.patches_per_s", "10"]) == 0
    assert "hours: 1.00 at 10.0 patches/s, of training alone" in capsys.readouterr().out
    assert main(["pretrain", *words, "--dry-run"]) == 0
    assert "hours: not estimated" in capsys.readouterr().out


def test_a_dry_run_is_no_part_of_a_saved_config() -> None:
    dumped = PretrainConfig(dry_run=True).model_dump()
    assert "dry_run" not in dumped
    assert "estimate" not in dumped


def test_help_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--dry_run" in out
    assert "--estimate.time_patches" in out
