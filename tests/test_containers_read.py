"""Every container through the loader: planned as arrays, read from files, the feed or fsspec, decoded natively
or not. The oracle is `Slide.read_plan`: planned and read patch by patch, decoded and pasted in Python."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    SlideIndex,
    errors,
    native,
    open_slide,
    read_slide_index,
)
from online_patching.geometry import Box
from online_patching.plan import plan_patch
from online_patching.stores import local
from online_patching.testing import SyntheticSlide, write_ome_zarr, write_tiff
from online_patching.testing.dicom import Written, write_dicom
from online_patching.testing.ndpi import write_ndpi
from online_patching.testing.ome_zarr import Storage
from online_patching.testing.tiff_codecs import Coding, Layout, write_coded_tiff
from tests.conftest import noise

MPP = 0.31
BIG, SMALL = noise((500, 660, 3)), noise((250, 330, 3), 1)


def coded(coding: Coding) -> Callable[[Path], Path]:
    return lambda path: write_coded_tiff(path, [BIG, SMALL], coding, Layout(mpp=MPP))


def zarr(**how: object) -> Callable[[Path], Path]:
    storage = Storage(**{"chunk_px": 96, **how})  # type: ignore[arg-type]
    version = "0.4" if storage.version == 2 else "0.5"
    slide = SyntheticSlide(3, 660, 500, mpp=MPP)
    return lambda path: write_ome_zarr(
        path, slide, version=version, storage=storage, downsamples=(2.0,), level0=BIG
    )


def dicom(**how: object) -> Callable[[Path], Path]:
    return lambda path: write_dicom(path, [BIG, SMALL], Written(mpp=MPP, **how))  # type: ignore[arg-type]


def ndpi(subsampling: str, interval: int) -> Callable[[Path], Path]:
    return lambda path: write_ndpi(
        path, [BIG[:, :640], SMALL[:, :320]], mpp=MPP, subsampling=subsampling,  # type: ignore[arg-type]
        interval_mcus=interval,
    )  # fmt: skip


WRITERS: dict[str, Callable[[Path], Path]] = {
    "jpeg.svs": lambda path: write_tiff(
        path, SyntheticSlide(5, 660, 500, mpp=MPP), tile_px=128, downsamples=(2.0,)
    ),
    "jpeg2000.tif": coded(Coding(34712)),
    "planes.tif": coded(Coding(8, planar=True)),
    "deflate.tif": coded(Coding(8, predictor=2)),
    "lzw.tif": coded(Coding(5)),
    "webp.tif": coded(Coding(50001)),
    "raw.tif": coded(Coding(1)),
    "wide.ndpi": ndpi("4:2:2", 1000),
    "short.ndpi": ndpi("4:4:4", 16),
    "boxes.ndpi": ndpi("4:2:0", 8),
    "jpeg-dicom": dicom(parts=3),
    "rle-dicom": dicom(syntax="rle", organization="TILED_SPARSE", missing=frozenset({(0, 1, 2)})),
    "jpeg2000-dicom": dicom(syntax="jpeg2000_lossless"),
    "chunks.zarr": zarr(axes="yxc", compressor="blosc"),
    "parts.zarr": zarr(channel_chunk=1, compressor="zlib"),
    "shards.zarr": zarr(version=3, shard_px=192, compressor="zstd"),
    "jpeg.zarr": zarr(axes="yxc", compressor="jpeg"),
}
DECODERS = [
    pytest.param(True, marks=pytest.mark.skipif(not native.AVAILABLE, reason=native.ABOUT)),
    False,
]


@pytest.fixture(params=DECODERS, ids=["native", "portable"])
def either_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "AVAILABLE", request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("containers")
    for name, write in WRITERS.items():
        write(made / name)
    return made


@pytest.fixture(scope="module")
def indexes(folder: Path) -> dict[str, SlideIndex]:
    return {name: read_slide_index(str(folder / name)) for name in WRITERS}


def moved(index: SlideIndex, uri: str) -> SlideIndex:
    """The same slide elsewhere, where nobody knows its tokens."""
    objects = tuple(replace(item, token="") for item in index.objects)
    return replace(index, uri=uri, token="", objects=objects)


def sampler_of(indexes: list[SlideIndex], **options: object) -> PatchSampler:
    masks = [ForegroundMask.everything(index) for index in indexes]
    return PatchSampler(indexes, masks, size_px=72, seed=7, min_foreground=0.0, **options)  # type: ignore[arg-type]


def check(loader: PatchLoader, oracle: list[SlideIndex], batches: int = 2) -> None:
    """A loader's patches are those that a Slide reads one by one."""
    slides = [open_slide(index) for index in oracle]
    for _ in range(batches):
        batch = loader.next_batch()
        assert not batch.failures
        for ref, pixels in zip(batch.refs, batch.pixels, strict=True):
            slide = slides[ref.slide]
            expected = slide.read_plan(plan_patch(slide.index, ref))
            assert (pixels == expected).all(), slide.index.slide_id
    for slide in slides:
        slide.close()


@pytest.mark.parametrize("name", WRITERS)
def test_a_loader_gives_the_pixels_that_a_slide_reads_alone(either_decoder, indexes, name):
    index = indexes[name]
    assert not index.fallback
    sampler = sampler_of([index], mpp=[MPP, 1.37 * MPP, 2 * MPP, 4.3 * MPP], patches_per_read=2)
    with PatchLoader(sampler, 16) as loader:
        check(loader, [index])


def test_restart_intervals_are_decoded_alike_at_every_scale(indexes, monkeypatch):
    """Natively the frame is made as narrow as a part wants; the whole is decoded in Python."""
    if not native.AVAILABLE:
        pytest.skip(native.ABOUT)
    some = [indexes[name] for name in ("wide.ndpi", "short.ndpi", "boxes.ndpi")]
    assert all(index.levels[0].codec.headless for index in some)
    got = []
    for ours in (True, False):
        monkeypatch.setattr(native, "AVAILABLE", ours)
        with PatchLoader(sampler_of(some, mpp=[MPP, 2 * MPP, 4 * MPP, 8 * MPP]), 48) as loader:
            got.append(loader.next_batch().pixels)
    assert (got[0] == got[1]).all()


def test_remembered_states_change_no_pixel_of_restart_intervals(indexes):
    if not native.AVAILABLE:
        pytest.skip(native.ABOUT)
    index = indexes["wide.ndpi"]
    native.remember(0)
    try:
        with PatchLoader(sampler_of([index], mpp=[MPP]), 24, remember_bytes=2**22) as loader:
            check(loader, [index], 3)
            assert loader.stats.from_states > 0
    finally:
        native.remember(0)


def test_all_containers_over_http_within_one_budget(fault_server, folder, indexes):
    shutil.copytree(folder, fault_server.root, dirs_exist_ok=True)
    there = [moved(index, f"{fault_server.url}/{name}") for name, index in indexes.items()]
    with PatchLoader(
        sampler_of(there, mpp=[MPP, 1.7 * MPP]), 40, bytes_in_flight=300_000, prefetch=2
    ) as loader:
        check(loader, list(indexes.values()))
        assert 0 < loader._engine.remote.peak <= 300_000
        assert loader.stats.bytes_read >= loader.stats.bytes_wanted > 0


@pytest.fixture
def bucket(folder: Path) -> Iterator[str]:
    """The containers in fsspec's memory: a store that is awaited."""
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket", recursive=True)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def test_a_mix_of_files_http_and_awaited_stores_has_one_budget(
    bucket, fault_server, folder, indexes
):
    shutil.copytree(folder, fault_server.root, dirs_exist_ok=True)
    names = ["jpeg.svs", "jpeg-dicom", "parts.zarr", "deflate.tif"]
    found = []
    for name in names:
        found += [indexes[name], read_slide_index(f"{bucket}/{name}")]
        found.append(moved(indexes[name], f"{fault_server.url}/{name}"))
    oracle = [indexes[name] for name in names for _ in range(3)]
    with PatchLoader(
        sampler_of(found, mpp=[MPP]), 48, bytes_in_flight=300_000, prefetch=1
    ) as loader:
        check(loader, oracle)
        assert 0 < loader._engine.remote.peak <= 300_000


def test_an_object_that_changed_under_an_awaited_store_is_noticed(bucket):
    found = [read_slide_index(f"{bucket}/{name}") for name in ("jpeg.svs", "jpeg-dicom")]
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/jpeg-dicom/level-0-1.dcm", memory.cat("/bucket/jpeg-dicom/level-0-1.dcm"))
    with PatchLoader(sampler_of(found, mpp=[MPP]), 40, max_failed_fraction=1.0) as loader:
        batch = loader.next_batch()
    assert {failure.slide_id for failure in batch.failures} == {"jpeg-dicom"}
    assert all("ObjectChangedError" in failure.reason for failure in batch.failures)


@pytest.mark.parametrize("name", ["jpeg-dicom", "rle-dicom", "shards.zarr"])
@pytest.mark.parametrize("fate", ["deleted", "rewritten"])
def test_one_lost_object_of_several_fails_the_patches_that_touch_it(
    either_decoder, folder, indexes, tmp_path, name, fate
):
    shutil.copytree(folder / name, tmp_path / name)
    index = read_slide_index(str(tmp_path / name))
    starts, number = index.object_starts, 0
    lost = Path(index.object_key(number))
    if fate == "deleted":
        lost.unlink()
    else:
        os.utime(lost, ns=(1, 1))
    with PatchLoader(
        sampler_of([index], mpp=[MPP, 2 * MPP]), 32, max_failed_fraction=1.0, quarantine_after=None
    ) as loader:
        batch = loader.next_batch()
    kinds = {failure.kind for failure in batch.failures}
    assert kinds == {"ObjectNotFoundError" if fate == "deleted" else "ObjectChangedError"}
    with open_slide(indexes[name]) as slide:
        for ref, pixels in zip(batch.refs, batch.pixels, strict=True):
            plan = plan_patch(index, ref)
            level = index.levels[plan.level]
            for tile in plan.tiles:
                start, stop = level.byte_range(tile.number)
                inside = start < starts[number + 1] and stop > starts[number] and start < stop
                assert not inside
            assert (pixels == slide.read_plan(plan)).all()


def test_an_absent_chunk_holds_the_fill_value_near_and_far(
    either_decoder, fault_server, folder, tmp_path
):
    for name in ("chunks.zarr", "parts.zarr"):
        path = fault_server.root / name
        shutil.copytree(folder / name, path)
        chunks = [p for p in (path / "0").rglob("*") if p.is_file() and p.name[0].isdigit()]
        for one in chunks[::3]:
            one.unlink()
        index = read_slide_index(str(path))
        far = moved(index, f"{fault_server.url}/{name}")
        with PatchLoader(sampler_of([index, far], mpp=[MPP]), 32) as loader:
            check(loader, [index, index])


def test_a_zarr_slide_that_is_gone_is_no_slide_of_absent_chunks(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(local, "_MAX_OPEN_FILES", 0)  # what is open can be read on
    path = tmp_path / "parts.zarr"
    shutil.copytree(folder / "parts.zarr", path)
    index = read_slide_index(str(path))
    slide = open_slide(index)
    with PatchLoader(
        sampler_of([index], mpp=[MPP]),
        8,
        prefetch=1,
        max_failed_fraction=1.0,
        quarantine_after=None,
    ) as loader:
        assert not loader.next_batch().failures
        shutil.rmtree(path)
        with pytest.raises(errors.LoaderError, match="ObjectNotFoundError"):
            [loader.next_batch() for _ in range(3)]  # one may be on its way
    with slide, pytest.raises(errors.ObjectNotFoundError):
        slide.read_box(0, Box(0, 0, 64, 64))


def test_processes_read_a_cloud_with_a_disk_cache_of_their_own_all_together(
    s3_cloud, folder, indexes, tmp_path, monkeypatch
):
    s3_cloud.enter(monkeypatch)
    names = ("jpeg.svs", "shards.zarr")
    for path in [p for name in names for p in (folder / name, *(folder / name).rglob("*"))]:
        if path.is_file():
            s3_cloud.put(str(path.relative_to(folder)), path.read_bytes())
    found = [read_slide_index(f"s3://slides/{name}") for name in names]  # its stores came first
    for method, batches, ahead in (("fork", 8, 2), ("spawn", 2, 1)):  # the second reads less far
        with PatchLoader(
            sampler_of(found, mpp=[MPP]), 16, workers=2, start_method=method, prefetch=ahead,
            disk_cache=tmp_path / "cache", disk_cache_bytes=2**26,
        ) as loader:  # fmt: skip
            check(loader, [indexes[name] for name in names], batches)
            stats = loader.stats
    assert stats.requests == stats.cache_misses == 0 < stats.cache_hits  # the first had read it all
    for file in (tmp_path / "cache").rglob("*"):
        assert not file.is_file() or b"AKIA" not in file.read_bytes()


def test_tiles_that_were_read_before_come_from_the_disk(fault_server, folder, indexes, tmp_path):
    names = ("jpeg.svs", "deflate.tif")
    for name in names:
        shutil.copy(folder / name, fault_server.root / name)
    there = [read_slide_index(f"{fault_server.url}/{name}") for name in names]
    sampler = sampler_of(there, mpp=[MPP])
    options = {"disk_cache": tmp_path / "cache", "disk_cache_bytes": 2**26}
    for again in (False, True):
        fault_server.ranges.clear()
        with PatchLoader(sampler, 32, prefetch=1, **options) as loader:
            check(loader, [indexes[name] for name in names], 1)
            stats = loader.stats
        if again:
            assert stats.cache_hits == stats.tiles
            assert stats.cache_misses == stats.requests == 0
            assert not fault_server.ranges
        else:
            assert stats.cache_hits + stats.cache_misses == stats.tiles
            assert stats.requests > 0


def test_a_torn_cache_costs_requests_and_no_pixels(fault_server, folder, indexes, tmp_path):
    shutil.copy(folder / "jpeg.svs", fault_server.root / "jpeg.svs")
    sampler = sampler_of([read_slide_index(f"{fault_server.url}/jpeg.svs")], mpp=[MPP])
    options = {"disk_cache": tmp_path / "cache", "disk_cache_bytes": 2**26}
    with PatchLoader(sampler, 16, prefetch=1, **options) as loader:
        loader.next_batch()
    files = sorted(p for p in (tmp_path / "cache").rglob("*") if p.is_file())
    for one in files[::2]:
        one.write_bytes(one.read_bytes()[:-3])
    with PatchLoader(sampler, 16, prefetch=1, **options) as loader:
        check(loader, [indexes["jpeg.svs"]], 1)
        assert loader.stats.cache_hits > 0
        assert loader.stats.cache_misses > 0


def test_pixels_are_pasted_from_any_strides_and_bad_ones_are_refused():
    if not native.AVAILABLE:
        pytest.skip(native.ABOUT)
    from online_patching.batch_plan import CANVAS, FILE, OUTPUT, TILE
    from online_patching.batch_plan.tables import PIXELS

    h, w = 40, 50
    canvas, tile, output = np.zeros(1, CANVAS), np.zeros(2, TILE), np.zeros(1, OUTPUT)
    for name, value in {"n_tiles": 2, "n_outputs": 1, "width": w, "height": h, "tile_width": w,
                        "tile_height": h, "scale": 16, "packing": PIXELS, "tables": -1}.items():  # fmt: skip
        canvas[name] = value
    tile[0] = (0, 1, -1, 0, 0, 0, w, h, 0, 0, 0, 0)
    tile[1] = (0, 1, -1, 1, 0, 0, w, h, 0, 0, 2, 0)
    output[0] = (0, 0, w, h, 0, w, h, 0, 0, w, h, 1, 0)
    planes = noise((h, w, 3)).transpose(2, 0, 1).copy().transpose(1, 2, 0)
    last = noise((2 * h, w, 3), 4)[::-2, :, 1:2]
    out = np.zeros((h, w, 3), np.uint8)
    files = np.zeros(0, FILE)
    native.read(canvas, tile, output, files, (), (planes, last), out, 0, 1)
    assert (out[..., :2] == planes[..., :2]).all()
    assert (out[..., 2] == last[..., 0]).all()
    for wrong in (planes[1:], last[:, 1:], planes.astype(np.uint16), b"abc", planes[..., 0]):
        with pytest.raises(ValueError, match=r"inconsistent|neither bytes"):
            native.read(canvas, tile, output, files, (), (planes, wrong), out, 0, 1)
    with pytest.raises(ValueError, match="inconsistent"):  # three channels from the third on
        native.read(canvas, tile, output, files, (), (planes, planes), out, 0, 1)


def test_an_object_that_a_server_lost_fails_its_patches_alone(fault_server, folder, indexes):
    shutil.copytree(folder / "jpeg-dicom", fault_server.root / "jpeg-dicom")
    there = moved(indexes["jpeg-dicom"], f"{fault_server.url}/jpeg-dicom")
    (fault_server.root / "jpeg-dicom" / "level-0-1.dcm").unlink()
    with PatchLoader(
        sampler_of([there], mpp=[MPP]), 24, max_failed_fraction=1.0, quarantine_after=None
    ) as loader:
        batch = loader.next_batch()
    assert {failure.kind for failure in batch.failures} == {"ObjectNotFoundError"}
    with open_slide(indexes["jpeg-dicom"]) as slide:
        for ref, pixels in zip(batch.refs, batch.pixels, strict=True):
            assert (pixels == slide.read_plan(plan_patch(slide.index, ref))).all()
