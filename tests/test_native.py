"""The native decoder against the portable one, bit for bit, and against bytes made to hurt it."""

import io
import os

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from online_patching import ForegroundMask, PatchLoader, PatchSampler, native
from online_patching.batch_plan import CANVAS, FILE, OUTPUT, TILE
from online_patching.decode import BadTileError, decode_tile
from online_patching.resample import resize
from online_patching.slide_index import MPP_SANE_RANGE, Codec
from online_patching.testing.writers import split_tables
from tests.conftest import noise

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=native.ABOUT)

WIDTH, HEIGHT = 208, 176
PICTURE = noise((HEIGHT, WIDTH, 3), 5)
SAMPLINGS = {"444": 0, "422": 1, "420": 2}


def jpeg(sampling="420", quality=88, progressive=False, picture=PICTURE) -> bytes:
    buffer = io.BytesIO()
    subsampling = {} if picture.ndim == 2 else {"subsampling": SAMPLINGS[sampling]}
    Image.fromarray(picture).save(
        buffer, "JPEG", quality=quality, progressive=progressive, **subsampling
    )
    return buffer.getvalue()


STREAMS = {
    **{name: jpeg(name) for name in SAMPLINGS},
    "440": simplejpeg.encode_jpeg(np.ascontiguousarray(PICTURE), colorsubsampling="440"),
    "411": simplejpeg.encode_jpeg(np.ascontiguousarray(PICTURE), colorsubsampling="411"),
    "gray": jpeg(picture=PICTURE[..., 0]),
}


NO_FILES = np.zeros(0, FILE)
WHOLE = (0, 0, 1, 0, 1, WIDTH, HEIGHT, WIDTH, HEIGHT, 1, 0, 0, 1, -1, 0, 0, 0, 0, 0, 0, b"")
"""A row of CANVAS: one tile, one patch, all of it, from handed-over bytes, YCbCr without tables."""


def read(body, part, scale=1, codec=None, outputs=None, size=None):
    """A part (left, top, right, bottom) of one tile through the native decoder."""
    codec = codec or Codec("jpeg", "ycbcr")
    left, top, right, bottom = part
    canvas, tile = np.zeros(1, CANVAS), np.zeros(1, TILE)
    w, h = right - left, bottom - top
    for name, value in {
        "n_tiles": 1, "n_outputs": 1, "width": w, "height": h, "tile_width": WIDTH,
        "tile_height": HEIGHT, "scale": scale, "tables": 0 if codec.tables else -1, "fill": codec.fill,
        "colour": ("rgb", "ycbcr", "gray").index(codec.colour),
    }.items():  # fmt: skip
        canvas[name] = value
    tile[0] = (0, len(body), -1, 0, left, top, w, h, 0, 0, 0, 0)
    if outputs is None:
        outputs = np.zeros(1, OUTPUT)
        outputs[0] = (0, 0, w, h, 0, w, h, 0, 0, w, h, 1, 0)
        size = (h, w, 3)
    out = np.full(size, 7, np.uint8)
    native.read(canvas, tile, outputs, NO_FILES, (codec.tables,), (body,), out, 0, 1)
    return out, canvas[0]


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_part_of_a_tile_is_the_whole_tile_cut(name, scale, data):
    w, h = WIDTH // scale, HEIGHT // scale
    left, top = data.draw(st.integers(0, w - 1)), data.draw(st.integers(0, h - 1))
    right, bottom = data.draw(st.integers(left + 1, w)), data.draw(st.integers(top + 1, h))
    whole = decode_tile(Codec("jpeg", "ycbcr"), STREAMS[name], WIDTH, HEIGHT, scale)
    got, canvas = read(STREAMS[name], (left, top, right, bottom), scale)
    assert canvas["status"] == native.OK, canvas["message"]
    assert (got == whole[top:bottom, left:right]).all()


@pytest.mark.parametrize("simd", [True, False])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_resampling_equals_the_portable_one(simd, data):
    size = data.draw(st.integers(1, 90))
    edges = st.floats(0, 1)
    x = sorted((data.draw(edges), data.draw(edges)))
    y = sorted((data.draw(edges), data.draw(edges)))
    window = (x[0] * WIDTH, y[0] * HEIGHT, x[1] * WIDTH, y[1] * HEIGHT)
    if min(window[2] - window[0], window[3] - window[1]) < 0.5:
        return
    whole = decode_tile(Codec("jpeg", "ycbcr"), STREAMS["444"], WIDTH, HEIGHT)
    outputs = np.zeros(1, OUTPUT)
    outputs[0] = (*window, 0, size, size, 0, 0, WIDTH, HEIGHT, 0, 0)
    before = native._jpeg.simd(simd)
    try:
        got, canvas = read(STREAMS["444"], (0, 0, WIDTH, HEIGHT), 1, None, outputs, (size, size, 3))
    finally:
        native._jpeg.simd(before)
    assert canvas["status"] == native.OK
    assert (got == resize(whole, window, (size, size))).all()


def test_tables_are_spliced_in_and_never_left_over_from_another_tile():
    tables, body = split_tables(jpeg())
    whole = decode_tile(Codec("jpeg", "ycbcr", tables), body, WIDTH, HEIGHT)
    everything = (0, 0, WIDTH, HEIGHT)
    got, _ = read(body, everything, codec=Codec("jpeg", "ycbcr", tables))
    assert (got == whole).all()
    # The same call decodes a tile with tables first, then one that has lost its own.
    canvas, tile, outputs = np.zeros(2, CANVAS), np.zeros(2, TILE), np.zeros(2, OUTPUT)
    for i in range(2):
        canvas[i] = WHOLE
        canvas[["first_tile", "first_output", "tables"]][i] = (i, i, 0 if i == 0 else -1)
        tile[i] = (0, len(body), -1, i, 0, 0, WIDTH, HEIGHT, 0, 0, 0, 0)
        outputs[i] = (
            0,
            0,
            WIDTH,
            HEIGHT,
            i * WIDTH * HEIGHT * 3,
            WIDTH,
            HEIGHT,
            0,
            0,
            WIDTH,
            HEIGHT,
            1,
            0,
        )
    out = np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)
    native.read(canvas, tile, outputs, NO_FILES, (tables,), (body, body), out, 0, 2)
    assert canvas["status"].tolist() == [native.OK, native.BAD_TILE]
    assert (out[0] == whole).all()
    with pytest.raises(BadTileError):
        decode_tile(Codec("jpeg", "ycbcr"), body, WIDTH, HEIGHT)


def _smuggled(good: bytes) -> bytes:
    """A frame of the right size where a walk goes that gives every marker a length, and a large one
    where libjpeg looks: FFD0 has none, so for libjpeg the next marker follows at once."""
    large = bytearray(good[2:])
    at = large.index(b"\xff\xc0") + 5
    large[at : at + 4] = (4000).to_bytes(2, "big") * 2
    assert large[:2] == b"\xff\xe0"  # the walk reads these two as a length and leaps
    decoy = bytes(0xFFE0 - len(large)) + good[2:]
    return b"\xff\xd8\xff\xd0" + bytes(large) + decoy


def test_a_tile_that_hides_tables_behind_its_scan_changes_no_other_tile():
    tables, body = split_tables(jpeg())
    other, _ = split_tables(jpeg(quality=20))
    evil = body[:-2] + other[2:-2] + b"\xff\xd9"  # read by libjpeg on its way to the end marker
    whole = decode_tile(Codec("jpeg", "ycbcr", tables), body, WIDTH, HEIGHT)
    canvas, tile, outputs = np.zeros(2, CANVAS), np.zeros(2, TILE), np.zeros(2, OUTPUT)
    for i, stream in enumerate((evil, body)):
        canvas[i] = WHOLE
        canvas["first_tile"][i], canvas["first_output"][i], canvas["tables"][i] = i, i, 0
        tile[i] = (0, len(stream), -1, i, 0, 0, WIDTH, HEIGHT, 0, 0, 0, 0)
        outputs[i] = (
            0,
            0,
            WIDTH,
            HEIGHT,
            i * WIDTH * HEIGHT * 3,
            WIDTH,
            HEIGHT,
            0,
            0,
            WIDTH,
            HEIGHT,
            1,
            0,
        )
    out = np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)
    native.read(canvas, tile, outputs, NO_FILES, (tables,), (evil, body), out, 0, 2)
    assert canvas["status"][1] == native.OK
    assert (out[1] == whole).all()


def test_three_components_are_no_gray_tile():
    with pytest.raises(BadTileError, match="3 components"):
        decode_tile(Codec("jpeg", "gray"), STREAMS["420"], WIDTH, HEIGHT)
    _, canvas = read(STREAMS["420"], (0, 0, WIDTH, HEIGHT), codec=Codec("jpeg", "gray"))
    assert canvas["status"] == native.BAD_TILE


def _damaged() -> dict[str, bytes]:
    good = STREAMS["420"]
    sof = good.index(b"\xff\xc0")
    bomb = bytearray(good)
    bomb[sof + 5 : sof + 9] = (65500).to_bytes(2, "big") * 2
    lossless = good.replace(b"\xff\xc0", b"\xff\xc3", 1)
    four = bytearray(good)
    four[sof + 9] = 4
    long_segment = bytearray(good)
    long_segment[4:6] = b"\xff\xff"
    return {
        "progressive": jpeg(progressive=True),
        "a frame behind a marker without a length": _smuggled(good),
        "empty-ish": b"\xff\xd8",
        "not a jpeg": b"GIF89a" + good[6:],
        "bomb": bytes(bomb),
        "lossless": lossless,
        "four components": bytes(four),
        "segment past the end": bytes(long_segment),
        "a third of it": good[: len(good) // 3],
        "zeros after the header": good[:700] + bytes(len(good) - 700),
        "no end marker": good[:-2],
        "header only": good[:300],
    }


@pytest.mark.parametrize("name", _damaged())
def test_damage_that_one_decoder_sees_the_other_sees(name):
    body = _damaged()[name]
    with pytest.raises(BadTileError):
        decode_tile(Codec("jpeg", "ycbcr"), body, WIDTH, HEIGHT)
    _, canvas = read(body, (0, 0, WIDTH, HEIGHT))
    assert canvas["status"] == native.BAD_TILE
    assert canvas["message"]


def test_a_truncated_tile_is_seen_even_where_only_its_first_rows_are_wanted():
    _, canvas = read(STREAMS["420"][:-400], (0, 0, 20, 10))
    assert canvas["status"] == native.BAD_TILE


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_random_damage_gives_pixels_or_a_reason_and_never_a_crash(data):
    body = bytearray(STREAMS[data.draw(st.sampled_from(sorted(STREAMS)))])
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(2, len(body) - 1))] = data.draw(st.integers(0, 255))
    _, canvas = read(bytes(body), (3, 5, 150, 160))
    assert canvas["status"] in (native.OK, native.BAD_TILE)


def test_plans_that_contradict_themselves_are_refused():
    body = STREAMS["444"]
    for table, name, value in [
        ("canvas", "n_tiles", 2), ("canvas", "first_tile", -1), ("canvas", "width", 0), ("canvas", "width", 2**30),
        ("canvas", "tile_width", -5), ("canvas", "scale", 3), ("canvas", "tables", 4), ("canvas", "n_outputs", 9),
        ("tile", "width", WIDTH + 1), ("tile", "x", 1), ("tile", "y", -1), ("tile", "left", -1), ("tile", "body", 1),
        ("tile", "length", 10), ("tile", "file", 0), ("tile", "file", -2), ("canvas", "packing", 9),
        ("canvas", "packing", 1), ("canvas", "packing", 2), ("output", "target", 1), ("output", "target", -8),
        ("output", "target", 2**63 - 100),
        ("tile", "left", 2**31 - 4), ("output", "right", WIDTH + 0.5),
        ("output", "x", 1), ("output", "box_width", 0), ("output", "box_height", HEIGHT + 1),
        ("output", "left", float("nan")), ("output", "width", 0), ("output", "height", 2**20),
    ]:  # fmt: skip
        tables = {
            "canvas": np.zeros(1, CANVAS),
            "tile": np.zeros(1, TILE),
            "output": np.zeros(1, OUTPUT),
        }
        tables["canvas"][0] = WHOLE
        tables["tile"][0] = (0, len(body), -1, 0, 0, 0, WIDTH, HEIGHT, 0, 0, 0, 0)
        tables["output"][0] = (0, 0, WIDTH, HEIGHT, 0, WIDTH, HEIGHT, 0, 0, WIDTH, HEIGHT, 1, 0)
        tables[table][name] = value
        out = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        with pytest.raises(ValueError, match="inconsistent"):
            native.read(
                tables["canvas"], tables["tile"], tables["output"], NO_FILES, (), (body,), out, 0, 1
            )


def test_what_else_can_go_wrong_with_a_file_is_told_apart(tmp_path):
    path = tmp_path / "tile"
    path.write_bytes(STREAMS["444"])
    handle = os.open(path, os.O_RDONLY)
    try:
        size, mtime = os.stat(path).st_size, os.stat(path).st_mtime_ns
        for (size_bytes, mtime_ns, start), expected in {
            (size, mtime, 0): native.OK,
            (size + 1, mtime, 0): native.CHANGED,
            (size, mtime + 1, 0): native.CHANGED,
            (0, 0, 5): native.SHORT_READ,
        }.items():
            canvas, tile, output = np.zeros(1, CANVAS), np.zeros(1, TILE), np.zeros(1, OUTPUT)
            canvas[0] = WHOLE
            files = np.array([(size_bytes, mtime_ns, 0, handle, 0)], FILE)
            tile[0] = (start, size, 0, -1, 0, 0, WIDTH, HEIGHT, 0, 0, 0, 0)
            output[0] = (0, 0, WIDTH, HEIGHT, 0, WIDTH, HEIGHT, 0, 0, WIDTH, HEIGHT, 1, 0)
            out = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
            native.read(canvas, tile, output, files, (), (), out, 0, 1)
            assert canvas["status"][0] == expected
    finally:
        os.close(handle)


def test_a_library_that_is_none_is_refused(tmp_path):
    fake = tmp_path / "libjpeg.so.62"
    fake.write_bytes(b"not a library")
    with pytest.raises(OSError, match="libjpeg"):
        native._jpeg.load(str(fake))
    with pytest.raises(OSError, match="jpeg_"):
        native._jpeg.load("libm.so.6")
    native._load()  # the real one again


def both(monkeypatch, indexes, masks=None, **options):
    """The same batches, natively and portably."""
    masks = masks or [ForegroundMask.everything(index) for index in indexes]
    found = []
    for available in (True, False):
        monkeypatch.setattr(native, "AVAILABLE", available)
        sampler = PatchSampler(indexes, masks, seed=3, **options)
        with PatchLoader(sampler, 24) as loader:
            found.append([next(loader) for _ in range(3)])
    return found


@pytest.mark.parametrize("mpp", [0.26, 0.5, (0.3, 0.7, 1.1, 2.0, 4.2)])
def test_the_loader_delivers_the_same_pixels_with_either_decoder(monkeypatch, small_indexes, mpp):
    ours, theirs = both(monkeypatch, small_indexes, size_px=96, mpp=mpp, min_foreground=0.1)
    for a, b in zip(ours, theirs, strict=True):
        assert a.refs == b.refs
        assert (a.pixels == b.pixels).all()


@pytest.mark.slow
def test_every_real_slide_gives_the_same_pixels_with_either_decoder(monkeypatch, real_slides):
    slides = [
        index
        for name, index in real_slides.items()
        if index.codec.startswith("jpeg ") and name != "openslide_unreadable"  # damaged on purpose
    ]
    assert len(slides) >= 8
    for factor in (1.0, 1.37, 2.7, 4.0):
        some = [index for index in slides if factor * index.mpp <= MPP_SANE_RANGE[1]]
        assert len(some) >= 8
        mpp = factor * max(index.mpp for index in some)
        ours, theirs = both(monkeypatch, some, size_px=128, mpp=mpp, min_foreground=0.0)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.pixels == b.pixels).all()
    for index in slides:
        ours, theirs = both(monkeypatch, [index], size_px=224, mpp=index.mpp, min_foreground=0.0)
        assert all((a.pixels == b.pixels).all() for a, b in zip(ours, theirs, strict=True))
