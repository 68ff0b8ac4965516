"""Every way of storing a tile, against OpenSlide and tifffile; JPEG 2000 at lower resolutions and in parts."""

from __future__ import annotations

import io
import itertools
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from online_patching import errors, plan, read_slide_index
from online_patching.codestream import BadStreamError, check_complete, read_frame
from online_patching.decode import BadTileError, decode_tile, jpeg2000, openjpeg
from online_patching.geometry import Box
from online_patching.resample import resize
from online_patching.slide import Slide
from online_patching.slide_index import Codec
from online_patching.testing import SyntheticSlide
from online_patching.testing.jpeg2000 import encode_planes
from online_patching.testing.raw_tiff import RawImage, build_tiff, shorts
from online_patching.testing.tiff_codecs import (
    Coding,
    Layout,
    coded_image,
    resolution,
    to_ycbcr,
    write_coded_tiff,
)
from online_patching.testing.writers import shrink

PICTURE = SyntheticSlide(3, 400, 300).render(100, 80, 150, 110)
APERIO = "Aperio Image Library\r\n150x110|AppMag = 20|MPP = 0.4991"
JPEG_KINDS = {
    f"jpeg ycbcr {sampling} {'tables' if tables else 'whole'} {marker}": Coding(
        7, 6, subsampling=sampling, tables=tables, marker=marker
    )
    for sampling, tables, marker in itertools.product(
        ("4:4:4", "4:2:2", "4:2:0"), (False, True), ("none", "jfif", "adobe rgb", "adobe ycbcr")
    )
} | {
    f"jpeg rgb {'tables' if tables else 'whole'} {marker}": Coding(7, 2, tables=tables, marker=marker)
    for tables, marker in itertools.product(
        (False, True), ("none", "jfif", "adobe rgb", "adobe ycbcr")
    )
}  # fmt: skip
PACKED_KINDS = {
    f"{name} predictor {predictor}{' planes' * planar}{' gray' * (samples == 1)}": Coding(
        code, 2 if samples == 3 else 1, samples, predictor, planar
    )
    for (code, name), predictor, planar, samples in itertools.product(
        ((1, "raw"), (5, "lzw"), (8, "deflate"), (32946, "old deflate"), (32773, "packbits"), (50000, "zstd")),
        (1, 2), (False, True), (3, 1),
    )
    if not (predictor == 2 and code in (1, 32773)) and not (planar and samples == 1)
}  # fmt: skip
OTHER_KINDS = {
    "jpeg gray": Coding(7, 1, 1),
    "jpeg gray tables": Coding(7, 1, 1, tables=True),
    "webp": Coding(50001),
    "webp lossless": Coding(50001, level=0),
    **{f"33003 {s}": Coding(33003, subsampling=s) for s in ("4:4:4", "4:2:2", "4:2:0")},
    "33005 lossless": Coding(33005, level=0),
    "33005 lossy": Coding(33005, level=40),
    "34712": Coding(34712, level=0),
    "34712 lossy": Coding(34712, level=40),
    "34712 in a JP2": Coding(34712, level=0, boxed=True),
    "34712 gray": Coding(34712, 1, 1, level=0),
    "34712 said to be YCbCr, and transformed": Coding(34712, 6, level=0),
}
KINDS = {**JPEG_KINDS, **PACKED_KINDS, **OTHER_KINDS}
LIBTIFF_LACKS = (50001, 34712)
LYING = {(6, "adobe rgb"), (2, "jfif")}
"""(photometric, marker): streams that contradict the tag. libtiff and we believe the tag, tifffile the stream."""


def written(path: Path, coding: Coding, picture: np.ndarray = PICTURE, **layout: object) -> Path:
    if coding.compression in (33003, 33005):
        layout["description"] = APERIO
    return write_coded_tiff(path, [picture], coding, Layout(**layout))


def whole(path: Path) -> np.ndarray:
    with Slide(read_slide_index(str(path))) as slide:
        return slide.read_box(0, Box(0, 0, *slide.dimensions))


def by_openslide(path: Path, size: tuple[int, int]) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), 0, size).convert("RGB"))


def by_tifffile(path: Path) -> np.ndarray:
    found = tifffile.imread(path)
    if found.ndim == 3 and found.shape[0] == 3:
        found = found.transpose(1, 2, 0)
    return np.repeat(found[:, :, None], 3, axis=2) if found.ndim == 2 else found


@pytest.mark.parametrize("name", KINDS)
def test_pixels_are_those_of_openslide_and_of_tifffile(tmp_path, name):
    """Exactly: not a grey level apart, where both read the file and believe its tags."""
    coding = KINDS[name]
    path = written(tmp_path / "a.tif", coding)
    ours = whole(path)
    assert np.abs(ours.astype(int) - PICTURE).mean() < (4.0 if coding.samples == 1 else 2.5)
    if coding.compression not in LIBTIFF_LACKS:
        assert (ours == by_openslide(path, (150, 110))).all()
    lying = coding.compression == 7 and (coding.photometric, coding.marker) in LYING
    if not lying and coding.compression != 33003 and "said to be" not in name:
        assert (ours == by_tifffile(path)).all()


@pytest.mark.parametrize("name", [*PACKED_KINDS, *OTHER_KINDS, "jpeg ycbcr 4:2:0 tables none"])
def test_a_part_of_a_tile_has_the_pixels_of_the_whole(tmp_path, name):
    index = read_slide_index(str(written(tmp_path / "a.tif", KINDS[name])))
    level = index.levels[0]
    data = Path(index.uri).read_bytes()
    start, stop = level.byte_range(1)
    sizes = (level.tile_width_px, level.tile_height_px)
    for scale in (1, 2) if level.codec.reductions else (1,):
        tile = decode_tile(level.codec, data[start:stop], *sizes, scale)
        assert tile.shape[:2] == (48 // scale, 64 // scale)
        for box in (Box(0, 0, 7, 5), Box(13, 3, 32, 24), Box(5, 19, 32, 24), Box(3, 1, 30, 2)):
            part = decode_tile(level.codec, data[start:stop], *sizes, scale, box)
            assert (part == tile[box.top : box.bottom, box.left : box.right]).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_byte_orders_bigtiff_and_missing_tiles_of_any_codec(tmp_path, order, big):
    for coding in (
        Coding(7, 6),
        Coding(8, predictor=2),
        Coding(34712, level=0),
        Coding(1, planar=True),
    ):
        path = written(tmp_path / "a.tif", coding, order=order, big=big, missing=frozenset({1, 5}))
        ours = whole(path)
        assert (ours[:48, 64:128] == 255).all() and (ours[48:96, 128:] == 255).all()
        assert np.abs(ours[:48, :64].astype(int) - PICTURE[:48, :64]).mean() < 2.5


def test_alpha_is_laid_over_white(tmp_path):
    alpha = np.zeros((110, 150, 1), np.uint8)
    alpha[:, 40:] = 255
    alpha[:, 100:] = 128
    picture = np.concatenate([PICTURE, alpha], axis=2)
    expected = PICTURE * (alpha / 255) + 255 * (1 - alpha / 255)
    for coding in (
        Coding(1, samples=4),
        Coding(8, samples=4, predictor=2),
        Coding(50001, samples=4, level=0),
    ):
        ours = whole(written(tmp_path / "a.tif", coding, picture))
        # A lossless WebP keeps no colours below what cannot be seen.
        assert np.abs(ours[:, 40:] - expected[:, 40:]).max() <= 0.51
        assert (ours[:, :40] == 255).all()


def test_levels_may_have_tiles_of_their_own_sizes(tmp_path):
    """As a Cloud Optimised GeoTIFF's do."""
    big, small = PICTURE, shrink(PICTURE, 2)
    images = [
        coded_image(big, Coding(8), Layout((64, 48)), resolution(0.5)),
        coded_image(small, Coding(5), Layout((16, 32)), {**resolution(1.0), 254: (4, (1,))}),
    ]
    path = tmp_path / "a.tif"
    path.write_bytes(build_tiff(images))
    index = read_slide_index(str(path))
    assert [(v.tile_width_px, v.tile_height_px, v.codec.kind) for v in index.levels] == [
        (64, 48, "deflate"), (16, 32, "lzw")
    ]  # fmt: skip
    with Slide(index) as slide:
        assert (slide.read_box(0, Box(0, 0, 150, 110)) == big).all()
        assert (slide.read_box(1, Box(0, 0, 75, 55)) == small).all()


# --- what is refused, in which words --------------------------------------------------------------


def refused(tmp_path: Path, **bent: object) -> errors.UnsupportedSlideError:
    image: dict[str, Any] = {"photometric": 2, "compression": 1, "samples": 3, **bent}
    tags = {**resolution(0.5), **image.pop("tags", {})}
    path = tmp_path / "a.tif"
    path.write_bytes(build_tiff([RawImage((70, 40), [b"x"] * 9, (32, 16), tags=tags, **image)]))
    with pytest.raises(errors.UnsupportedSlideError) as caught:
        read_slide_index(str(path))
    return caught.value


@pytest.mark.parametrize(
    ("bent", "says"),
    [
        ({"photometric": 0, "samples": 1}, r"inverted \(min-is-white\)"),
        ({"photometric": 3, "samples": 1}, "colours of a palette, as label and annotation images"),
        ({"photometric": 5, "samples": 4}, "CMYK"),
        ({"photometric": 8}, r"CIE L\*a\*b\*"),
        ({"photometric": 99}, "photometric 99"),
        ({"photometric": 1}, "3 samples a pixel and photometric 1 contradict each other"),
        ({"samples": 1}, "1 samples a pixel and photometric 2 contradict"),
        ({"samples": 4}, "a fourth sample that is not said to be alpha"),
        ({"compression": 7, "tags": {284: shorts(2)}}, r"jpeg of each channel apart"),
        ({"compression": 8, "tags": {317: shorts(3)}}, "predictor 3 over deflate"),
        ({"tags": {317: shorts(2)}}, "predictor 2 over raw"),
        ({"compression": 7, "samples": 4, "tags": {338: shorts(1)}}, "JPEG of 4 components"),
        ({"tags": {258: shorts(16, 16, 16)}}, "3 samples of uint16: not 8-bit RGB"),
        ({"tags": {32997: shorts(7)}}, "a volume"),
    ],
)
def test_odd_colours_and_layouts_are_refused_in_words_when_indexed(tmp_path, bent, says):
    found = refused(tmp_path, **bent)
    assert found.code == "unsupported"
    assert re.search(says, found.reason)


def test_deep_gray_is_called_multiplex(tmp_path):
    found = refused(tmp_path, photometric=1, samples=1, tags={258: shorts(16)})
    assert found.code == "multiplex" and "1 channel(s) of uint16" in found.reason


# --- JPEG 2000 ------------------------------------------------------------------------------------


def textured(side: int) -> np.ndarray:
    return SyntheticSlide(5, 900, 900).render(150, 150, side, side)


@pytest.mark.parametrize(
    ("level", "most"),
    [
        (0, {2.0: 1.6, 2.7: 1.3, 4.0: 4.5, 6.1: 2.2, 8.0: 4.0, 16.0: 4.5}),  # 5/3, without loss
        (40, {2.0: 0.9, 2.7: 0.7, 4.0: 1.8, 6.1: 1.0, 8.0: 2.8, 16.0: 3.6}),  # 9/7
    ],
)
def test_lower_resolutions_are_near_an_antialiased_read_of_the_whole(tmp_path, level, most):
    """Mean differences in grey levels by how many times coarser than stored, with room."""
    picture = textured(512)
    coding, layout = Coding(34712, level=level), Layout((256, 256))
    index = read_slide_index(str(write_coded_tiff(tmp_path / "a.tif", [picture], coding, layout)))
    assert index.levels[0].codec.reductions == 5
    with Slide(index) as slide:
        for ratio, bound in most.items():
            ours, expected = patch_and_oracle(slide, (31, 31), 360, ratio)
            assert np.abs(ours - expected).mean() < bound, ratio


def patch_and_oracle(
    slide: Slide, corner: tuple[int, int], side: int, ratio: float
) -> tuple[np.ndarray, np.ndarray]:
    """A patch `ratio` times coarser than stored, and the antialiased read of the stored pixels."""
    (x, y), size = corner, int(side / ratio)
    mpp_x, mpp_y = slide.index.mpp_x, slide.index.mpp_y
    ours = slide.read_patch(x_um=x * mpp_x, y_um=y * mpp_y, mpp=slide.mpp * ratio, size_px=size)
    box = Box(max(0, x - 20), max(0, y - 20), x + side + 20, y + side + 20)
    stored = slide.read_box(0, box)
    left, top = x - box.left, y - box.top
    window = (left, top, left + size * ratio, top + size * ratio)
    return ours.astype(int), resize(stored, window, (size, size)).astype(int)


def test_samples_thought_to_lie_elsewhere_would_be_further_off(tmp_path, monkeypatch):
    picture = textured(512)
    coding, layout = Coding(34712, level=40), Layout((256, 256))
    index = read_slide_index(str(write_coded_tiff(tmp_path / "a.tif", [picture], coding, layout)))
    with Slide(index) as slide:
        for ratio in (2.7, 6.1, 10.5):
            ours, expected = patch_and_oracle(slide, (31, 31), 360, ratio)
            with monkeypatch.context() as patch:
                patch.setattr(plan, "phase_px", lambda codec, scale: 0.0)
                naive, _ = patch_and_oracle(slide, (31, 31), 360, ratio)
            assert np.abs(naive - expected).mean() > 2 * np.abs(ours - expected).mean()


@pytest.mark.parametrize("subsampled", [False, True])
def test_of_a_large_tile_only_what_a_part_needs_is_decoded(monkeypatch, subsampled):
    tile, codec = textured(256), Codec("jpeg2000", "ycbcr" if subsampled else "rgb", reductions=5)
    if subsampled:
        planes = [to_ycbcr(tile)[:, :, 0], *(to_ycbcr(tile)[::2, ::2, k] for k in (1, 2))]
        data = encode_planes(planes, [(1, 1), (2, 2), (2, 2)])
    else:
        data = bytes(imagecodecs.jpeg2k_encode(tile, level=45, reversible=False, codecformat="j2k"))
    asked: list[object] = []
    decode_planes = openjpeg.decode_planes
    monkeypatch.setattr(
        jpeg2000, "decode_planes", lambda *args: (asked.append(args[2]), decode_planes(*args))[1]
    )
    whole_tile = decode_tile(codec, data, 256, 256)
    boxes = (
        Box(0, 0, 90, 70),
        Box(131, 77, 256, 256),
        Box(33, 200, 51, 201),
        Box(255, 0, 256, 256),
    )
    for box in boxes:
        part = decode_tile(codec, data, 256, 256, 1, box)
        assert (part == whole_tile[box.top : box.bottom, box.left : box.right]).all()
    assert asked[0] is None and None not in asked[1:]
    half = decode_tile(codec, data, 256, 256, 2)
    part = decode_tile(codec, data, 256, 256, 2, Box(3, 5, 40, 60))
    assert (part == half[5:60, 3:40]).all()
    assert asked[-1] is None  # its bands are single code blocks: nothing to leave out


def test_reductions_are_read_from_the_stream_and_used_only_as_far_as_they_go(tmp_path):
    tile = textured(64)
    for levels in (0, 1, 3):
        data = bytes(
            imagecodecs.jpeg2k_encode(tile, level=0, resolutions=levels + 1, codecformat="j2k")
        )
        assert read_frame(data).reductions == levels
        codec = Codec("jpeg2000", reductions=levels)
        assert decode_tile(codec, data, 64, 64, 2**levels).shape == (64 >> levels, 64 >> levels, 3)
        with pytest.raises(BadTileError, match=f"halved {levels} times, not {levels + 1}"):
            decode_tile(codec, data, 64, 64, 2 ** (levels + 1))


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_resolutions_are_pillows(scale):
    """Pillow leaves out resolutions too (its `reduce`): another caller of the same library."""
    tile = textured(96)
    data = bytes(imagecodecs.jpeg2k_encode(tile, level=0, codecformat="j2k"))
    picture = Image.open(io.BytesIO(data))
    picture.reduce = scale.bit_length() - 1  # type: ignore[method-assign]
    picture.load()
    ours = decode_tile(Codec("jpeg2000", reductions=5), data, 96, 96, scale)
    assert (ours == np.asarray(picture)).all()


def test_subsampled_chroma_is_repeated_at_every_resolution():
    tile = textured(96)
    ycbcr = to_ycbcr(tile)
    planes = [ycbcr[:, :, 0], *(ycbcr[:, ::2, k] for k in (1, 2))]
    data = encode_planes(planes, [(1, 1), (2, 1), (2, 1)])
    frame = check_complete(data)
    assert frame.subsampling == ((1, 1), (2, 1), (2, 1)) and not frame.transformed
    ours = decode_tile(Codec("jpeg2000", "ycbcr", reductions=5), data, 96, 96)
    repeated = np.stack([planes[0], *(np.repeat(p, 2, axis=1) for p in planes[1:])], axis=2)
    expected = np.asarray(Image.fromarray(repeated, "YCbCr").convert("RGB")).astype(int)
    assert np.abs(ours - expected).max() <= 1  # Pillow's sums are rounded otherwise
    half = decode_tile(Codec("jpeg2000", "ycbcr", reductions=5), data, 96, 96, 2)
    assert np.abs(half.astype(int) - ours.reshape(48, 2, 48, 2, 3).mean(axis=(1, 3))).mean() < 12


@pytest.mark.parametrize("cut", [2, 3, 100, 1000])
def test_a_truncated_codestream_raises_instead_of_showing_half_a_picture(cut):
    data = bytes(imagecodecs.jpeg2k_encode(textured(96), level=0, codecformat="j2k"))
    for damaged in (data[:-cut], data[:-cut] + b"\xff\xd9"):
        if damaged == data:
            continue
        with pytest.raises(BadTileError):
            decode_tile(Codec("jpeg2000"), damaged, 96, 96)


SIZ, COD = 4, 4 + 2 + 38 + 9 - 2  # where the segments' bodies begin in a stream of three components


def bent(at: int, new: bytes) -> bytes:
    data = bytearray(imagecodecs.jpeg2k_encode(textured(96), level=0, codecformat="j2k"))
    data[at : at + len(new)] = new
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (bent(8, (2**31).to_bytes(4, "big")), "tiles of its own|frame says"),
        (bent(24, (1).to_bytes(4, "big") * 2), "9216 tiles of its own, more than 64"),
        (bent(16, (5).to_bytes(4, "big")), r"begins at \(5, 0\)"),
        (bent(24, bytes(4)), "frame is empty"),
        (bent(40, b"\x00\x09"), "9 components"),
        (bent(42, b"\x0f"), "not of 8 bits"),
        (bent(42, b"\x87"), "not of 8 bits"),
        (bent(43, b"\x09"), "subsampled by other than"),
        (b"\xff\x4f\xff\x51" + bytes(60), "frame is empty"),
        (b"\xff\x4f\xff\x52" + bytes(60), "not a JPEG 2000 codestream"),
        (b"", "empty"),
    ],
)
def test_sizes_that_lie_are_refused_before_anything_is_allocated(data, says):
    with pytest.raises(BadTileError, match=says):
        decode_tile(Codec("jpeg2000"), data, 96, 96)


@pytest.mark.parametrize(
    ("style", "says"),
    [
        (b"\x00\x00\xff\xff\x01\x05\x04\x04\x00\x01", "precincts in 65535 layers"),
        (b"\x00\x00\x00\x01\x01\xff\x04\x04\x00\x01", "claims 255 levels"),
        (b"\x00\x00\x00\x01\x01\x05\x08\x08\x00\x01", "levels of blocks"),
        (b"\x01\x00\x00\x01\x01\x05\x04\x04\x00\x01", "coding style is damaged|precincts"),
        (b"\x00\x00\x00\x00\x01\x05\x04\x04\x00\x01", "does not say how it is coded"),
    ],
)
def test_a_hostile_coding_style_is_refused(style, says):
    data = bytes(imagecodecs.jpeg2k_encode(textured(96), level=0, codecformat="j2k"))
    at = data.index(b"\xff\x52\x00\x0c") + 4
    with pytest.raises(BadStreamError, match=says):
        check_complete(data[:at] + style + data[at + 10 :])


def test_a_style_of_tiny_precincts_is_refused():
    data = bytes(imagecodecs.jpeg2k_encode(textured(256), level=0, codecformat="j2k"))
    at = data.index(b"\xff\x52\x00\x0c")
    tiny = b"\xff\x52\x00\x12" + b"\x01" + data[at + 5 : at + 14] + bytes(6)
    with pytest.raises(BadStreamError, match="precincts in 1 layers"):
        check_complete(data[:at] + tiny + data[at + 14 :])


def test_threads_decode_at_the_same_time_and_alike():
    tiles = [textured(128)[k:, k:][:96, :96] for k in range(6)]
    streams = [bytes(imagecodecs.jpeg2k_encode(t, level=0, codecformat="j2k")) for t in tiles]
    wrong: list[int] = []

    def work(first: int) -> None:
        for k in range(60):
            number = (first + k) % len(tiles)
            box = Box(k % 40, k % 30, 60 + k % 36, 96)
            found = decode_tile(Codec("jpeg2000"), streams[number], 96, 96, 1, box)
            if not (found == tiles[number][box.top : box.bottom, box.left : box.right]).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_openjpeg_a_tile_says_what_to_install(monkeypatch):
    monkeypatch.setattr(openjpeg, "library", lambda: None)
    data = bytes(imagecodecs.jpeg2k_encode(textured(96), level=0, codecformat="j2k"))
    with pytest.raises(BadTileError, match="install imagecodecs' or Pillow's wheel"):
        decode_tile(Codec("jpeg2000"), data, 96, 96)


@pytest.mark.parametrize(
    ("name", "mpp"),
    [("converted/kidney_oncocytoma_HE_half_q36.svs", 0.5), ("vendor/wsic_CMU-1-Small-Region.jp2.tiff", 0.499)],
)  # fmt: skip
def test_real_jpeg2000_slides_are_read_near_their_antialiased_pixels(shared_data, name, mpp):
    index = read_slide_index(str(shared_data / "wsi" / name), mpp=mpp)
    assert {level.codec.reductions for level in index.levels} == {5}
    index = replace(index, levels=index.levels[:1])
    corner = (4740, 4340) if index.dimensions[0] > 5000 else (650, 680)
    with Slide(index) as slide:
        for ratio, most in ((2.0, 3.0), (2.6, 2.0), (3.3, 1.5), (4.0, 4.5), (5.0, 2.5)):
            ours, expected = patch_and_oracle(slide, corner, 800, ratio)
            assert np.abs(ours - expected).mean() < most


# --- WebP -----------------------------------------------------------------------------------------


def test_webp_frames_of_another_size_or_truncated_are_refused():
    for lossless in (False, True):
        data = bytes(imagecodecs.webp_encode(PICTURE[:48, :64], level=80, lossless=lossless))
        with pytest.raises(BadTileError, match=r"frame says 64 x 48 px, not 128 x 96"):
            decode_tile(Codec("webp"), data, 128, 96)
        with pytest.raises(BadTileError):
            decode_tile(Codec("webp"), data[:-40], 64, 48)
    with pytest.raises(BadTileError, match="not a WebP picture"):
        decode_tile(Codec("webp"), b"RIFF" + bytes(60), 64, 48)


@pytest.mark.parametrize("kind", ["packbits", "lzw", "deflate", "zstd"])
def test_a_tile_that_unpacks_to_too_little_or_too_much_is_refused(kind):
    encode = {
        "packbits": imagecodecs.packbits_encode, "lzw": imagecodecs.lzw_encode,
        "deflate": imagecodecs.zlib_encode, "zstd": imagecodecs.zstd_encode,
    }[kind]  # fmt: skip
    for count in (64 * 48 * 3 - 1, 64 * 48 * 3 + 1, 100):
        with pytest.raises(BadTileError):
            decode_tile(Codec(kind), bytes(encode(bytes(count))), 64, 48)
    half = Box(0, 20, 30, 40)
    with pytest.raises(BadTileError):
        decode_tile(Codec(kind), bytes(encode(bytes(64 * 39 * 3))), 64, 48, 1, half)
