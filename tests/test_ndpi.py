"""NDPI by our own index: its tiles are the right restart intervals, whatever the file leaves out or gets wrong.

The writer lets libjpeg set the markers. Pixels are OpenSlide's, bit for bit, where OpenSlide opens the
file; else Pillow's of the same picture encoded alone.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    SlideIndex,
    errors,
    open_slide,
    read_slide_index,
)
from online_patching.formats import ndpi, ndpi_strips, restart_intervals
from online_patching.formats.ndpi_tags import ndpi_directories
from online_patching.formats.tiff_tags import HeaderReader
from online_patching.geometry import Box
from online_patching.slide import Slide
from online_patching.stores import Stores
from online_patching.testing.ndpi import (
    NdpiImage,
    encode,
    interval_starts,
    write_images,
    write_ndpi,
)
from online_patching.testing.writers import shrink
from tests.conftest import noise
from tests.servers import FaultServer

WIDTH, HEIGHT = 1024, 384


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Level 0, a half and an eighth: sides that OpenSlide wants, whole MCUs and whole intervals."""
    level0 = noise((HEIGHT, WIDTH, 3), 3)
    return [level0, shrink(level0, 2), shrink(level0, 8)]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory, pictures: list[np.ndarray]) -> Path:
    return write_ndpi(tmp_path_factory.mktemp("ndpi") / "listed.ndpi", pictures)


def whole(index: SlideIndex, level: int) -> np.ndarray:
    with Slide(index) as slide:
        size = (index.levels[level].width_px, index.levels[level].height_px)
        return slide.read_box(level, Box(0, 0, *size))


def openslides(path: Path | str, size: tuple[int, int]) -> np.ndarray:
    """A whole level through OpenSlide, which has more levels than the file: found by its size."""
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.properties["openslide.vendor"] == "hamamatsu"
        level = slide.level_dimensions.index(size)
        return np.asarray(slide.read_region((0, 0), level, size))[..., :3]


def assert_openslides_pixels(path: Path) -> SlideIndex:
    index = read_slide_index(str(path))
    assert index.container == "ndpi" and not index.fallback
    for number, level in enumerate(index.levels):
        oracle = openslides(path, (level.width_px, level.height_px))
        assert np.array_equal(whole(index, number), oracle), f"level {number}"
    return index


# --- pixels ---------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "as scanners write them": {},
    "chroma halved across": {"subsampling": "4:2:2"},
    "no table of markers": {"markers": "absent"},
    "a table one entry short": {"markers": "few"},
    "high halves of the table": {"with_high": True},
    "one interval a row": {"interval_mcus": 10_000},
    "small levels without markers": {"plain_below_px": 500},
    "no associated images": {"associated": False},
    "the first strip beyond 4 GiB, in a sparse file": {"at_byte": 2**32 + 12},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_level_has_openslides_pixels(way: str, tmp_path: Path, pictures) -> None:
    index = assert_openslides_pixels(write_ndpi(tmp_path / "a.ndpi", pictures, **WAYS[way]))
    sizes = [(level.width_px, level.height_px) for level in index.levels]
    assert sizes == [(WIDTH, HEIGHT), (WIDTH // 2, HEIGHT // 2), (WIDTH // 8, 48)]
    assert index.mpp == pytest.approx(0.2283, rel=1e-6) and index.mpp_source == "resolution tag"
    assert index.vendor == "hamamatsu"


def test_real_tissue_has_openslides_pixels(shared_data: Path, tmp_path: Path) -> None:
    with open_slide(str(shared_data / "wsi/vendor/CMU-1-Small-Region.svs")) as slide:
        picture = slide.read_box(0, Box(0, 0, 2048, 2816))
    levels = [picture, shrink(picture, 4), shrink(picture, 16)]
    path = write_ndpi(tmp_path / "a.ndpi", levels, interval_mcus=32, subsampling="4:2:2")
    assert [level.tile_width_px for level in assert_openslides_pixels(path).levels] == [
        512,
        512,
        128,
    ]


def test_a_scanners_own_file_has_openslides_pixels_though_it_is_refused_as_fluorescence(
    shared_data: Path,
) -> None:
    path = str(shared_data / "wsi/vendor/ndpi_test3-DAPI-2-387.ndpi")
    with pytest.raises(errors.UnsupportedSlideError, match="excitation at 387 nm") as refused:
        read_slide_index(path)
    assert refused.value.code == "fluorescence"
    with closing(Stores()) as stores:
        size, token = stores.version(path)
        file = ndpi_strips.NdpiFile(path, path, stores, token, size)
        directories = list(ndpi_directories(HeaderReader(file.read, size)))
        index = ndpi.index_of(file, directories, "dapi", None)
    assert index is not None
    assert [(lv.width_px, lv.tile_width_px, lv.tile_height_px) for lv in index.levels] == [
        (3968, 3968, 8), (1984, 1984, 8), (992, 992, 8), (496, 496, 8),
    ]  # fmt: skip
    for number, level in enumerate(index.levels):
        oracle = openslides(path, (level.width_px, level.height_px))
        assert np.array_equal(whole(index, number), oracle)


def test_pixels_beyond_the_65535_that_jpeg_can_say_are_openslides(tmp_path: Path) -> None:
    picture = np.tile(noise((16, 4096, 3)), (1, 17, 1))
    path = write_ndpi(tmp_path / "wide.ndpi", [picture], interval_mcus=512)
    assert path.read_bytes()[path.read_bytes().index(b"\xff\xc0") + 5 :][:4] == bytes(4)
    assert assert_openslides_pixels(path).dimensions == (69_632, 16)


def test_a_stream_of_rgb_is_told_by_its_markers_as_libjpeg_does(tmp_path: Path, pictures) -> None:
    file = io.BytesIO()
    Image.fromarray(pictures[0]).save(
        file, "JPEG", subsampling="4:4:4", keep_rgb=True, restart_marker_blocks=16
    )
    stream = file.getvalue()
    image = NdpiImage((WIDTH, HEIGHT), stream, 40.0, interval_starts(stream))
    index = assert_openslides_pixels(write_images(tmp_path / "rgb.ndpi", [image], 0.25))
    assert index.levels[0].codec.colour == "rgb"


def test_a_zero_frame_below_65535_px_takes_its_size_from_the_directory(
    tmp_path: Path, pictures, listed: Path
) -> None:
    # OpenSlide refuses these: the pixels are those of the same codes under a whole frame.
    index = read_slide_index(str(write_ndpi(tmp_path / "a.ndpi", pictures, zero_frame=True)))
    for number in range(3):
        assert np.array_equal(whole(index, number), whole(read_slide_index(str(listed)), number))


def test_quarter_chroma_decodes_each_interval_by_itself(tmp_path: Path, pictures) -> None:
    # OpenSlide fails on these: libjpeg wants the row of MCUs below. The oracle is each block encoded alone.
    path = write_ndpi(tmp_path / "a.ndpi", pictures[:1], interval_mcus=8, subsampling="4:2:0")
    ours = whole(read_slide_index(str(path)), 0)
    for top in range(0, HEIGHT, 16):
        for left in range(0, WIDTH, 128):
            block = encode(
                pictures[0][top : top + 16, left : left + 128], None, subsampling="4:2:0"
            )
            alone = np.asarray(Image.open(io.BytesIO(block)).convert("RGB"))
            assert np.array_equal(ours[top : top + 16, left : left + 128], alone)


def test_ragged_edges_are_not_dropped(tmp_path: Path) -> None:
    # OpenSlide drops the last column and row of such tiles; with 4:4:4 no pixel depends on another tile.
    picture = noise((203, 381, 3), 5)
    path = write_ndpi(tmp_path / "a.ndpi", [picture], interval_mcus=16)
    level = read_slide_index(str(path)).levels[0]
    assert (level.columns, level.n_tiles) == (3, 3 * 26)
    oracle = np.asarray(Image.open(io.BytesIO(encode(picture, 16))).convert("RGB"))
    assert np.array_equal(whole(read_slide_index(str(path)), 0), oracle)


def test_intervals_that_straddle_rows_are_read_as_one_tile(tmp_path: Path, pictures) -> None:
    path = write_ndpi(tmp_path / "a.ndpi", pictures[:1], interval_mcus=5)
    with pytest.raises(openslide.OpenSlideError, match="Inconsistent restart marker"):
        openslide.OpenSlide(str(path))
    index = read_slide_index(str(path))
    assert index.levels[0].n_tiles == 1
    oracle = np.asarray(Image.open(io.BytesIO(encode(pictures[0], 5))).convert("RGB"))
    assert np.array_equal(whole(index, 0), oracle)


def test_patches_from_the_loader_are_those_of_the_slide(listed: Path) -> None:
    index = read_slide_index(str(listed))
    mask = ForegroundMask.everything(index)
    sampler = PatchSampler([index], [mask], mpp=[0.2283, 0.5], size_px=96, seed=4)
    with PatchLoader(sampler, batch_size=8, threads=2) as loader, Slide(index) as slide:
        batch = next(iter(loader))
        for ref, pixels in zip(batch.refs, batch.pixels, strict=True):
            patch = slide.read_patch(
                x_um=ref.x_px0 * index.mpp_x, y_um=ref.y_px0 * index.mpp_y, mpp=ref.mpp, size_px=96
            )
            assert np.array_equal(pixels, patch)


# --- where the intervals are ----------------------------------------------------------------------


def test_a_wrong_table_is_noticed_and_the_markers_found(tmp_path: Path, pictures, listed) -> None:
    path = write_ndpi(tmp_path / "a.ndpi", pictures, markers="shifted")
    with openslide.OpenSlide(str(path)) as slide, pytest.raises(openslide.OpenSlideError):
        slide.read_region((0, 0), 0, (WIDTH, HEIGHT))
    index, right = read_slide_index(str(path)), read_slide_index(str(listed))
    for number in range(3):
        assert np.array_equal(whole(index, number), whole(right, number))


def test_tile_rows_are_the_writers_intervals(listed: Path) -> None:
    stream = listed.read_bytes()
    start = stream.index(b"\xff\xd8\xff\xe0")
    level = read_slide_index(str(listed)).levels[0]
    starts = [start + n for n in interval_starts(stream[start : stream.index(b"\xff\xd9", start)])]
    assert len(starts) == level.n_tiles == 8 * 48
    ends = [n - 2 for n in starts[1:]] + [stream.index(b"\xff\xd9", start)]
    assert [level.byte_range(n) for n in range(level.n_tiles)] == list(
        zip(starts, ends, strict=True)
    )


def decodes(slide: Slide, tile: int, columns: int) -> bool:
    level = slide.levels[0]
    width, height = level.tile_width_px, level.tile_height_px
    row, column = divmod(tile, columns)
    left, top = column * width, row * height
    try:
        slide.read_box(0, Box(left, top, left + width, top + height))
    except errors.TileDecodeError as error:
        return error.tile != tile
    return True


def test_wrong_entries_between_those_tried_are_noticed_when_their_tiles_are_read(
    tmp_path: Path, shared_data: Path
) -> None:
    # As with flipped bits no decoder notices all: on real tissue 292 of 294 (decision 18).
    with open_slide(str(shared_data / "wsi/vendor/CMU-1-Small-Region.svs")) as slide:
        picture = slide.read_box(0, Box(400, 800, 400 + WIDTH, 800 + HEIGHT))
    stream = encode(picture, 64)
    starts = interval_starts(stream)
    tried = restart_intervals.sampled(len(starts), ndpi_strips.MARKERS_TRIED)
    others = sorted({*range(1, len(starts))} - {*tried})[:30]
    assert len(tried) == ndpi_strips.MARKERS_TRIED and len(others) == 30
    noticed = 0
    for wrong in others:
        listed = [n + (17 if n == starts[wrong] else 0) for n in starts]
        image = NdpiImage((WIDTH, HEIGHT), stream, 40.0, listed)
        index = read_slide_index(str(write_images(tmp_path / "a.ndpi", [image], 0.25)))
        with Slide(index) as slide:
            failed = [number for number in (wrong - 1, wrong) if not decodes(slide, number, 2)]
        noticed += bool(failed)
    assert noticed >= 29


@pytest.mark.parametrize("block_bytes", [3, 1000, 1001, 2**20])
def test_markers_are_found_wherever_blocks_end(
    monkeypatch: pytest.MonkeyPatch, pictures, block_bytes: int
) -> None:
    stream = encode(pictures[1], 8)
    starts = interval_starts(stream)
    monkeypatch.setattr(restart_intervals, "SCAN_BLOCK_BYTES", block_bytes)

    def found(data: bytes, count: int) -> np.ndarray | None:
        return restart_intervals.find_intervals(
            lambda a, b: data[a:b], starts[0], len(data) - 2, count, 2**16
        )

    assert found(stream, len(starts)).tolist() == starts  # type: ignore[union-attr]
    assert found(stream, len(starts) + 1) is None and found(stream, len(starts) - 1) is None
    swapped = bytearray(stream)
    swapped[starts[5] - 1] ^= 1
    assert found(bytes(swapped), len(starts)) is None, "markers that do not count up"


class RecordingStores(Stores):
    """Stores that note which bytes were read."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[int, int]] = []

    def read(self, uri: str, start: int, stop: int | None, token: str = "") -> bytes:
        data = super().read(uri, start, stop, token)
        self.ranges.append((start, start + len(data)))
        return data


@pytest.mark.parametrize("at_byte", [0, 2**32 + 12])
def test_indexing_reads_little_and_not_a_byte_of_the_macro_or_the_map(
    tmp_path: Path, at_byte: int
) -> None:
    picture = noise((2048, 1024, 3))
    tags = {65427: (2, b"MUELLER 1951\0"), 65449: (2, b"Patient=MUELLER\r\nCreated=2011/05/23\0")}
    path = write_ndpi(tmp_path / "a.ndpi", [picture], quality=95, tags=tags, at_byte=at_byte)
    stores = RecordingStores()
    index = read_slide_index(str(path), stores=stores)
    stores.close()
    with tifffile.TiffFile(path) as tif:
        level, macro, sketch = (
            (page.tags[273].value[0], page.tags[279].value[0]) for page in tif.pages
        )
    for start, size in (macro, sketch):
        assert not any(a < start + size and start < b for a, b in stores.ranges)
    assert len(stores.ranges) < ndpi_strips.MARKERS_TRIED + 30
    assert sum(b - a for a, b in stores.ranges) < 2**16 + 10_000 + 4 * index.n_tiles
    assert all(0 <= n - level[0] < level[1] for n in index.levels[0].byte_range(index.n_tiles - 1))
    assert b"MUELLER" not in index.to_bytes()[0] and index.n_tiles == 8 * 256


def test_only_the_plane_in_focus_is_read(tmp_path: Path, pictures) -> None:
    path = write_ndpi(tmp_path / "a.ndpi", pictures, planes_nm=(-2000, 0, 2000))
    assert [level.width_px for level in assert_openslides_pixels(path).levels] == [1024, 512, 128]


def test_low_halves_of_a_strip_beyond_4_gib_are_unwrapped() -> None:
    true = np.asarray(
        [660, 2**31, 2**32 + 5, 2**33 - 1, 2**33 + 9, 2**33 + 2**31, 3 * 2**32 + 7], np.uint64
    )

    class Tags:
        def __init__(self, high: bool) -> None:
            self.high = high

        def count(self, tag: int) -> int:
            return len(true) if tag == 65426 or self.high else 0

        def table(self, tag: int):
            values = true & np.uint64(2**32 - 1) if tag == 65426 else true >> np.uint64(32)
            yield values[:3]
            yield values[3:]

    for high in (True, False):
        parts = list(ndpi_strips._parts(Tags(high), 4 * 2**32))  # type: ignore[arg-type]
        assert (np.concatenate(parts) == true).all()


@pytest.mark.slow
@pytest.mark.parametrize("with_high", [True, False])
def test_a_strip_beyond_4_gib_keeps_its_intervals_apart(tmp_path: Path, with_high: bool) -> None:
    """1,400 intervals of 32,760 x 8 px, each 3.2 MB after the one before, in a sparse file."""
    step, count, size = 3_180_000, 1400, (32_760, 8 * 1400)
    flat = np.full((8, size[0], 3), 180, np.uint8)
    grey = flat.copy()
    grey[:, 1000:2000] = (200, 20, 90)
    codes = []
    for picture in (flat, grey):
        stream = encode(picture, None)
        first = interval_starts(stream)[0]
        codes.append(stream[first:-2])
    scan = stream.index(b"\xff\xda")
    head = stream[:scan] + struct.pack(">HHH", 0xFFDD, 4, size[0] // 8) + stream[scan:first]
    at = head.index(b"\xff\xc0") + 5
    head = head[:at] + struct.pack(">HH", size[1], size[0]) + head[at + 4 :]
    starts = [len(head) + k * step for k in range(count)]
    end = starts[-1] + len(codes[1])
    stub = NdpiImage(size, b"", 40.0, starts, with_high)
    path = tmp_path / "long.ndpi"
    write_images(path, [stub], 0.25)  # once, to learn where the directory and its strip come to lie
    with open(path, "r+b") as file:
        directory = file.read()
        file.truncate(0)
        # The strip goes behind the directory, and its two tags say so: low halves in the entries.
        strip = len(directory) + len(directory) % 2
        entries = struct.unpack_from("<Q", directory, 4)[0] + 2
        patched = bytearray(directory)
        (n,) = struct.unpack_from("<H", directory, entries - 2)
        for k in range(n):
            tag, _ = struct.unpack_from("<HH", directory, entries + 12 * k)
            value = {273: strip, 279: end + 2}.get(tag)
            if value is not None:
                struct.pack_into("<I", patched, entries + 12 * k + 8, value & 0xFFFFFFFF)
                struct.pack_into("<I", patched, entries + 12 * n + 8 + 4 * k, value >> 32)
        file.seek(0)
        file.write(patched)
        file.seek(strip)
        file.write(head)
        for k, start in enumerate(starts):
            file.seek(strip + start - 2)
            file.write((bytes((0xFF, 0xD0 + (k - 1) % 8)) if k else b"\x3f\x00") + codes[k % 2])
        file.write(b"\xff\xd9")
    assert path.stat().st_size > 2**32
    index = read_slide_index(str(path))
    ranges = [index.levels[0].byte_range(k) for k in range(count)]
    assert [a for a, _ in ranges] == [strip + start for start in starts]
    assert ranges[-1] == (strip + starts[-1], strip + end)
    with Slide(index) as slide:  # the last interval alone is followed by its end, not by a hole
        ours = slide.read_box(0, Box(900, size[1] - 8, 2100, size[1]))
    assert ours[4, 500, 0] > 190
    if with_high:  # OpenSlide does not unwrap
        with openslide.OpenSlide(str(path)) as slide:
            oracle = np.asarray(slide.read_region((900, size[1] - 8), 0, (1200, 8)))[..., :3]
        assert np.array_equal(ours, oracle)


# --- remote ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("markers", ["listed", "absent"])
def test_over_http_it_has_the_local_pixels(fault_server: FaultServer, pictures, markers) -> None:
    write_ndpi(fault_server.root / "a.ndpi", pictures, markers=markers)
    index = read_slide_index(f"{fault_server.url}/a.ndpi")
    local = read_slide_index(str(fault_server.root / "a.ndpi"))
    assert index.digest == local.digest
    with Slide(index) as away, Slide(local) as here:
        box = Box(100, 37, 324, 261)
        assert np.array_equal(away.read_box(0, box), here.read_box(0, box))
        assert away.stats.requests <= 2 * 29


def test_a_remote_slide_is_not_downloaded_for_its_markers(
    fault_server: FaultServer, pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_ndpi(fault_server.root / "a.ndpi", pictures, markers="absent")
    monkeypatch.setattr(ndpi_strips, "MAX_REMOTE_SCAN_BYTES", 20_000)
    with pytest.raises(errors.UnsupportedSlideError, match=r"bytes would have to be read.*[Cc]opy"):
        read_slide_index(f"{fault_server.url}/a.ndpi")
    assert fault_server.sent_bytes < path.stat().st_size + 2**17
    assert read_slide_index(str(path)).container == "ndpi"


# --- what is refused, or left to others -------------------------------------------------------------


@pytest.mark.parametrize(
    "tags",
    [
        {65434: (2, b"Cy5\0")},
        {65451: (11, (455.0,))},
        {65441: (4, (9,))},
        {65449: (2, b"Created=2011/05/23\r\nExcitationWaveLength=488\0")},
    ],
)
def test_fluorescence_is_refused_by_any_of_its_signs(tmp_path: Path, pictures, tags) -> None:
    path = write_ndpi(tmp_path / "a.ndpi", pictures[:1], tags=tags)
    with pytest.raises(errors.UnsupportedSlideError, match="not a stained slide") as refused:
        read_slide_index(str(path))
    assert refused.value.code == "fluorescence"


@pytest.mark.parametrize(
    "filter_name", [b"Brightfield\0", b"\0"]
)  # the latter is short: text lies outside
def test_brightfield_with_the_same_tags_is_not_refused(
    tmp_path: Path, pictures, filter_name: bytes
) -> None:
    tags = {65434: (2, filter_name), 65451: (11, (0.0,)), 65441: (4, (0,))}
    assert read_slide_index(str(write_ndpi(tmp_path / "a.ndpi", pictures, tags=tags))).mpp > 0


def test_gray_streams_are_fluorescence(tmp_path: Path, pictures) -> None:
    file = io.BytesIO()
    Image.fromarray(pictures[0][..., 0]).save(file, "JPEG", restart_marker_blocks=16)
    stream = file.getvalue()
    image = NdpiImage((WIDTH, HEIGHT), stream, 40.0, interval_starts(stream))
    path = write_images(tmp_path / "gray.ndpi", [image], 0.25)
    with pytest.raises(errors.UnsupportedSlideError, match="one gray channel"):
        read_slide_index(str(path))


def test_a_slide_without_microns_needs_the_override_table(tmp_path: Path, pictures) -> None:
    path = write_ndpi(tmp_path / "a.ndpi", pictures, tags={282: None, 283: None})
    with pytest.raises(errors.MppError, match="carries no µm/px"):
        read_slide_index(str(path))
    assert read_slide_index(str(path), mpp=0.5).levels[1].mpp == pytest.approx(1.0)


def test_a_file_that_was_cut_says_so(tmp_path: Path, pictures) -> None:
    path = write_ndpi(tmp_path / "a.ndpi", pictures)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.ShortReadError, match="truncated"):
        read_slide_index(str(path))


def test_a_picture_of_another_size_than_its_directory_says_is_damage(
    tmp_path: Path, pictures
) -> None:
    stream = encode(pictures[0], 16)
    image = NdpiImage((WIDTH, HEIGHT + 64), stream, 40.0, interval_starts(stream))
    path = write_images(tmp_path / "a.ndpi", [image], 0.25)
    with pytest.raises(errors.DamagedSlideError, match="holds a picture of 1024 x 384"):
        read_slide_index(str(path))


def test_a_plain_level_that_claims_more_bytes_than_its_pixels_need_is_damage(
    tmp_path: Path, pictures
) -> None:
    # A loader reads a tile whole: it would read what this says.
    image = NdpiImage((WIDTH, HEIGHT), encode(pictures[0], None) + bytes(6 * 2**20), 40.0)
    with pytest.raises(
        errors.DamagedSlideError, match=r"claims 6,.* bytes, more than its pixels need"
    ):
        read_slide_index(str(write_images(tmp_path / "a.ndpi", [image], 0.25)))


def test_what_cannot_be_cut_up_goes_through_openslide_and_says_so(
    tmp_path: Path, pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_ndpi(tmp_path / "a.ndpi", pictures, plain_below_px=10_000)
    monkeypatch.setattr(ndpi_strips, "_MAX_TILE_PX", 2**16)  # a giant stream without markers
    index = read_slide_index(str(path))
    assert (index.container, index.fallback) == ("openslide", True)


def test_progressive_streams_go_through_another_reader(tmp_path: Path, pictures) -> None:
    file = io.BytesIO()
    Image.fromarray(pictures[0]).save(file, "JPEG", progressive=True)
    image = NdpiImage((WIDTH, HEIGHT), file.getvalue(), 40.0)
    assert read_slide_index(str(write_images(tmp_path / "a.ndpi", [image], 0.25))).fallback


@pytest.mark.slow
def test_hostile_files_end_in_a_result_or_an_error_of_ours() -> None:
    """Within a second of CPU and 256 MiB of address space each: the script's children see to that."""
    script = Path(__file__).parents[1] / "benchmarks" / "fuzz_ndpi.py"
    done = subprocess.run(
        [sys.executable, str(script), "--inputs", "3000", "--seed", "7"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "3,000 inputs" in done.stdout and "0 findings" in done.stdout
