"""What has no index of our own: through OpenSlide or tiffslide, marked so, near or far, or refused in words."""

from __future__ import annotations

import io
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    SlideIndex,
    errors,
    read_slide_index,
)
from online_patching.formats import range_file, region_pool
from online_patching.formats.range_file import RangeFile
from online_patching.geometry import Box
from online_patching.slide import Slide
from online_patching.stores import Stores
from online_patching.testing.ndpi import write_ndpi, write_vms
from online_patching.testing.vendor_tiffs import leica_images, ventana_images, write_images
from online_patching.testing.writers import shrink
from tests.cloud_servers import CloudServer
from tests.conftest import noise
from tests.servers import FaultServer

SIZE = (700, 460)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    level0 = noise((SIZE[1], SIZE[0], 3), 11)
    return [level0, shrink(level0, 3)]


def write_strips(path: Path, pictures: list[np.ndarray]) -> Path:
    """A pyramid in strips: no tiles to index, OpenSlide refuses it, tiffslide reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"rowsperstrip": 16, "compression": "zlib", "photometric": "rgb"}
    per_cm = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as tif:
        tif.write(pictures[0], subifds=len(pictures) - 1, **per_cm, **options)
        for picture in pictures[1:]:
            tif.write(picture, subfiletype=1, **options)
    return path


def box_of(index: SlideIndex, level: int, box: Box) -> np.ndarray:
    with Slide(index) as slide:
        return slide.read_box(level, box)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[region_pool.RegionPool]:
    """Workers of this test's own."""
    made = region_pool.RegionPool(most=3)
    monkeypatch.setattr(region_pool, "_pool", made)
    yield made
    made.close()


# --- which containers ------------------------------------------------------------------------------


def test_vms_goes_through_openslide_with_its_pixels(tmp_path: Path) -> None:
    path = write_vms(tmp_path, noise((384, 1024, 3)))
    index = read_slide_index(str(path))
    assert (index.container, index.vendor, index.fallback) == ("openslide", "hamamatsu", True)
    assert index.mpp == pytest.approx(0.5)
    with openslide.OpenSlide(str(path)) as oracle:
        for level, size in enumerate(oracle.level_dimensions):
            theirs = np.asarray(oracle.read_region((0, 0), level, size))[..., :3]
            assert np.array_equal(box_of(index, level, Box(0, 0, *size)), theirs)


def test_scn_goes_through_openslide_which_places_it_on_the_glass(tmp_path: Path, pictures) -> None:
    images = leica_images([pictures[0], shrink(pictures[0], 2)], noise((64, 96, 3)))
    path = write_images(tmp_path / "a.scn", images)
    index = read_slide_index(str(path))
    assert (index.container, index.vendor, index.fallback) == ("openslide", "leica", True)
    with openslide.OpenSlide(str(path)) as oracle:
        assert index.dimensions == oracle.dimensions
        x, y = (int(oracle.properties[f"openslide.bounds-{axis}"]) for axis in "xy")
        theirs = np.asarray(oracle.read_region((x, y), 0, (300, 200)))[..., :3]
    assert np.array_equal(box_of(index, 0, Box(x, y, x + 300, y + 200)), theirs)


def test_bif_goes_through_openslide_which_undoes_its_overlaps(tmp_path: Path) -> None:
    picture = noise((256, 320, 3))
    path = write_images(tmp_path / "a.bif", ventana_images([picture, shrink(picture, 2)]))
    index = read_slide_index(str(path))
    assert (index.container, index.vendor, index.fallback) == ("openslide", "ventana", True)


def test_strips_go_through_tiffslide_with_the_stored_pixels(tmp_path: Path, pictures) -> None:
    index = read_slide_index(str(write_strips(tmp_path / "a.tif", pictures)))
    assert (index.container, index.fallback, index.mpp) == ("tiffslide", True, 0.5)
    for level, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        for box in (Box(0, 0, width, height), Box(101, 53, 140, 90), Box(17, 1, 18, 100)):
            stored = picture[box.top : box.bottom, box.left : box.right]
            assert np.array_equal(box_of(index, level, box), stored), (level, box)


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.svs")
    with pytest.raises(errors.StoreError, match="neither a file nor a folder"):
        read_slide_index(str(tmp_path / "a.svs"))


def test_a_file_that_nobody_opens_is_told_with_each_readers_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.mrxs"
    path.write_bytes(b"not MIRAX")
    with pytest.raises(errors.NotASlideError, match=r"openslide: .*; tiffslide: "):
        read_slide_index(str(path))


# --- far away --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.mrxs", "MIRAX"),
        ("a.vms", "VMS"),
        ("a.vmu", "VMU"),
        ("a.vsi", "VSI"),
        ("A.NDPIS", "NDPIS"),
    ],
)
def test_slides_of_several_files_are_refused_far_away(
    fault_server: FaultServer, name: str, kind: str
) -> None:
    (fault_server.root / name).write_bytes(b"[Virtual Microscope Specimen]\n")
    says = f"{kind} lies in several files, which are read from disk only: copy them there"
    with pytest.raises(errors.UnsupportedSlideError, match=says):
        read_slide_index(f"{fault_server.url}/{name}?sig=geheim")


def test_overlapping_tiles_are_refused_far_away(fault_server: FaultServer) -> None:
    picture = noise((256, 320, 3))
    write_images(fault_server.root / "a.bif", ventana_images([picture, shrink(picture, 2)]))
    with pytest.raises(errors.UnsupportedSlideError, match=r"its tiles overlap.*copy it to disk"):
        read_slide_index(f"{fault_server.url}/a.bif")


def test_over_http_tiffslide_gives_the_local_pixels(fault_server: FaultServer, pictures) -> None:
    path = write_strips(fault_server.root / "a.tif", pictures)
    index = read_slide_index(f"{fault_server.url}/a.tif")
    assert (index.container, index.fallback) == ("tiffslide", True)
    assert (index.size_bytes, index.token) == (path.stat().st_size, fault_server.etag)
    for level, picture in enumerate(pictures):
        box = Box(30, 40, 200, 150)
        stored = picture[box.top : box.bottom, box.left : box.right]
        assert np.array_equal(box_of(index, level, box), stored)
    assert all(heads.get("If-Match", fault_server.etag) for heads in fault_server.headers)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_loader_delivers_a_far_fallback_slide_as_it_does_a_near_one(
    fault_server: FaultServer, pictures, workers: int
) -> None:
    path = write_strips(fault_server.root / "a.tif", pictures)
    batches = []
    for uri in (f"{fault_server.url}/a.tif", str(path)):
        index = read_slide_index(uri)
        sampler = PatchSampler(
            [index], [ForegroundMask.everything(index)], mpp=[0.5, 1.5], size_px=96, seed=2
        )
        with PatchLoader(sampler, batch_size=12, threads=2, workers=workers) as loader:
            batches.append(next(iter(loader)).pixels.copy())
            assert not loader.stats.failures
    assert np.array_equal(*batches) and batches[0].std() > 20


@pytest.mark.slow
def test_from_s3_tiffslide_and_the_ndpi_index_give_the_local_pixels(
    s3_cloud: CloudServer, tmp_path: Path, pictures, monkeypatch: pytest.MonkeyPatch, pool
) -> None:
    s3_cloud.enter(monkeypatch)
    strips = write_strips(tmp_path / "a.tif", pictures)
    intervals = write_ndpi(tmp_path / "a.ndpi", [noise((384, 1024, 3))])
    for path, container in ((strips, "tiffslide"), (intervals, "ndpi")):
        index = read_slide_index(s3_cloud.put(path.name, path.read_bytes()))
        assert (index.container, index.fallback) == (container, container == "tiffslide")
        box, near = Box(30, 40, 200, 150), read_slide_index(str(path))
        assert np.array_equal(box_of(index, 0, box), box_of(near, 0, box))
        sampler = PatchSampler(
            [index], [ForegroundMask.everything(index)], mpp=index.mpp, size_px=64, seed=2
        )
        with PatchLoader(sampler, batch_size=4, threads=2, workers=0) as loader:
            assert next(iter(loader)).pixels.shape == (4, 64, 64, 3)
            assert not loader.stats.failures


def test_signatures_stay_out_of_messages_and_command_lines(
    fault_server: FaultServer, pool: region_pool.RegionPool, pictures
) -> None:
    write_strips(fault_server.root / "a.tif", pictures)
    (fault_server.root / "b.tif").write_bytes(b"II*\0\x08\0\0\0\0\0" + bytes(100))
    index = read_slide_index(f"{fault_server.url}/a.tif?sig=geheim")
    assert box_of(index, 0, Box(0, 0, 9, 9)).shape == (9, 9, 3)
    assert b"geheim" not in index.to_bytes()[0]
    process = pool._all[0]._process
    assert process is not None
    for told in ("cmdline", "environ"):
        assert b"geheim" not in Path(f"/proc/{process.pid}/{told}").read_bytes()
    fault_server.etag = '"two"'
    with pytest.raises(errors.PatchingError) as changed:
        pool.read(index, 0, Box(300, 300, 400, 400))
    with pytest.raises(errors.PatchingError) as broken:
        read_slide_index(f"{fault_server.url}/b.tif?sig=geheim")
    for caught in (changed, broken):
        assert "geheim" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_object_put_in_its_place_is_told_as_such(
    fault_server: FaultServer, pool: region_pool.RegionPool, pictures
) -> None:
    big = [noise((2048, 1024, 3), 3)]
    write_strips(fault_server.root / "a.tif", big)
    index = read_slide_index(f"{fault_server.url}/a.tif")
    fault_server.etag = '"two"'
    with pytest.raises(errors.ObjectChangedError):
        pool.read(index, 0, Box(900, 1000, 1000, 1400))


def test_a_store_that_refuses_is_a_stores_error_not_the_slides(
    fault_server: FaultServer, pool: region_pool.RegionPool
) -> None:
    write_strips(fault_server.root / "a.tif", [noise((2048, 1024, 3), 3)])
    index = read_slide_index(f"{fault_server.url}/a.tif")
    fault_server.faults.kind = "403"
    with pytest.raises(errors.StoreError) as refused:
        pool.read(index, 0, Box(900, 1000, 1000, 1400))
    assert refused.value.code == "access" and not isinstance(refused.value, errors.SlideError)
    fault_server.faults.kind = ""
    assert pool.read(index, 0, Box(900, 1000, 1000, 1400)).shape == (400, 100, 3)


def test_what_is_no_slide_far_away_is_told_with_the_remedy(fault_server: FaultServer) -> None:
    (fault_server.root / "a.bin").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(errors.NotASlideError, match=r"tiffslide: .*OpenSlide opens must be copied"):
        read_slide_index(f"{fault_server.url}/a.bin")


# --- an object as a file -----------------------------------------------------------------------------


class CountingStores(Stores):
    """One object in memory; counts requests, and fails when told to."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data, self.requests, self.fails = data, 0, False

    def read(self, uri: str, start: int, stop: int | None, token: str = "") -> bytes:
        self.requests += 1
        if self.fails:
            raise errors.StoreUnavailableError(uri, "down")
        assert token == "t"
        return self.data[start:stop]


def range_file_of(data: bytes, left: int = 2**30) -> tuple[RangeFile, CountingStores]:
    stores = CountingStores(data)
    file = RangeFile(stores, "s3://b/x.tif", "t", len(data))
    file.left = left
    return file, stores


def test_a_range_file_reads_as_a_file_in_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_file, "BLOCK_BYTES", 64)
    monkeypatch.setattr(range_file, "KEPT_BLOCKS", 5)
    data = random.Random(1).randbytes(3000)
    ours, _ = range_file_of(data)
    oracle, dice = io.BytesIO(data), random.Random(2)
    for _ in range(2000):
        whence = dice.choice([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
        offset = dice.randint(-40, 3100) if whence == io.SEEK_SET else dice.randint(-500, 500)
        if not (whence == io.SEEK_SET and offset < 0):
            place = max(0, {0: 0, 1: oracle.tell(), 2: len(data)}[whence] + offset)
            oracle.seek(place)
            assert ours.seek(offset, whence) == place == ours.tell()
        count = dice.randint(0, 700)
        assert ours.read(count) == oracle.read(count)
    assert len(ours._blocks) <= 5


def test_a_range_file_keeps_what_was_read_and_asks_once_for_neighbours() -> None:
    file, stores = range_file_of(bytes(10 * range_file.BLOCK_BYTES))
    file.read(3 * range_file.BLOCK_BYTES)
    file.seek(10)
    file.read(1000)
    assert stores.requests == 1


def test_a_range_file_stops_at_its_allowance_and_remembers_a_stores_error() -> None:
    file, stores = range_file_of(bytes(10 * range_file.BLOCK_BYTES), left=range_file.BLOCK_BYTES)
    assert len(file.read(5)) == 5
    file.seek(5 * range_file.BLOCK_BYTES)
    with pytest.raises(OSError, match="copy it to disk"):
        file.read(5)
    assert file.error is None
    file.left, stores.fails = 2**30, True
    with pytest.raises(OSError, match="its store failed"):
        file.read(5)
    assert isinstance(file.error, errors.StoreUnavailableError)


# --- the processes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory, pictures) -> SlideIndex:
    path = write_strips(tmp_path_factory.mktemp("strips") / "a.tif", pictures)
    return read_slide_index(str(path))


def test_threads_ask_several_processes_and_no_more_than_allowed(
    strips: SlideIndex, pool: region_pool.RegionPool, pictures
) -> None:
    wrong: list[str] = []

    def ask(number: int) -> None:
        for k in range(6):
            box = Box(number * 30 + k, 20 * k, number * 30 + k + 50, 20 * k + 40)
            stored = pictures[0][box.top : box.bottom, box.left : box.right]
            if not np.array_equal(pool.read(strips, 0, box), stored):
                wrong.append(f"{box}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 2 <= pool.workers <= 3


def test_one_thread_asks_one_process(strips: SlideIndex, pool: region_pool.RegionPool) -> None:
    for left in range(5):
        pool.read(strips, 0, Box(left, 0, left + 10, 10))
    assert pool.workers == 1


def test_a_process_that_dies_costs_one_request(
    strips: SlideIndex, pool: region_pool.RegionPool
) -> None:
    pool.read(strips, 0, Box(0, 0, 10, 10))
    process = pool._all[0]._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)  # so that the request is under way when it dies
    threading.Timer(0.2, process.kill).start()
    with pytest.raises(errors.DamagedSlideError, match="died or hung on it"):
        pool.read(strips, 0, Box(0, 0, 10, 10))
    assert pool.read(strips, 0, Box(0, 0, 10, 10)).shape == (10, 10, 3)


def test_a_process_that_hangs_is_ended(
    strips: SlideIndex, pool: region_pool.RegionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.read(strips, 0, Box(0, 0, 10, 10))
    process = pool._all[0]._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(region_pool, "_TIMEOUT_S", 0.3)
    began = time.monotonic()
    with pytest.raises(errors.DamagedSlideError, match=r"died or hung on it \(no answer\)"):
        pool.read(strips, 0, Box(0, 0, 10, 10))
    assert time.monotonic() - began < 5
    assert process.poll() is not None
    monkeypatch.undo()
    assert pool.read(strips, 0, Box(0, 0, 10, 10)).shape == (10, 10, 3)


def test_a_slide_put_in_anothers_place_is_opened_anew(
    tmp_path: Path, pool: region_pool.RegionPool, pictures
) -> None:
    path = write_strips(tmp_path / "a.tif", pictures[:1])
    index = read_slide_index(str(path))
    pool.read(index, 0, Box(0, 0, 10, 10))
    write_strips(path, [255 - pictures[0]])
    os.utime(path, (1, 1))
    assert np.array_equal(pool.read(index, 0, Box(0, 0, 10, 10)), 255 - pictures[0][:10, :10])


def test_fallback_takes_the_override_and_refuses_without_microns(tmp_path: Path, pictures) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pictures[0], rowsperstrip=16, compression="zlib", photometric="rgb")
    with pytest.raises(errors.MppError):
        read_slide_index(str(path))
    assert read_slide_index(str(path), mpp=0.7).mpp == pytest.approx(0.7)
