import io

import imagecodecs
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from online_patching.decode import BadTileError, decode_tile
from online_patching.decode.jpeg import rebuild_jpeg
from online_patching.slide_index import Codec
from online_patching.testing.writers import split_tables
from tests.conftest import noise

TILE = noise((96, 128, 3))


def jpeg(subsampling="4:2:0") -> bytes:
    sampling = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}[subsampling]
    buffer = io.BytesIO()
    Image.fromarray(TILE).save(buffer, "JPEG", quality=85, subsampling=sampling)
    return buffer.getvalue()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("tables", [False, True])
def test_ycbcr_tiles_decode_as_libjpeg_decodes_them(subsampling, tables):
    whole = jpeg(subsampling)
    expected = simplejpeg.decode_jpeg(whole, "RGB")
    table, body = split_tables(whole) if tables else (b"", whole)
    assert (decode_tile(Codec("jpeg", "ycbcr", table), body, 128, 96) == expected).all()


def test_rgb_without_a_marker_is_rgb_when_the_container_says_so():
    """Aperio stores RGB components in a stream that does not say so."""
    stored = imagecodecs.jpeg8_encode(TILE, level=95, colorspace="RGB", outcolorspace="RGB")
    pixels = decode_tile(Codec("jpeg", "rgb"), bytes(stored), 128, 96)
    assert np.abs(pixels.astype(int) - TILE).mean() < 4
    # The same bytes read as YCbCr are another picture: the colour space does decide.
    wrong = decode_tile(Codec("jpeg", "ycbcr"), bytes(stored), 128, 96)
    assert np.abs(wrong.astype(int) - TILE).mean() > 20


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.97])
def test_a_truncated_jpeg_raises_instead_of_showing_half_a_picture(keep):
    whole = jpeg()
    with pytest.raises(BadTileError):
        decode_tile(Codec("jpeg", "ycbcr"), whole[: int(len(whole) * keep)], 128, 96)


def test_a_frame_that_claims_another_size_is_refused_before_it_is_allocated():
    bomb = bytearray(jpeg())
    at = bomb.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = (65500).to_bytes(2, "big") * 2
    with pytest.raises(BadTileError, match=r"frame says 65500 x 65500 px, not 128 x 96"):
        decode_tile(Codec("jpeg", "ycbcr"), bytes(bomb), 128, 96)


def test_a_jpeg2000_frame_of_another_size_is_refused():
    data = imagecodecs.jpeg2k_encode(TILE, level=0, codecformat="j2k")
    with pytest.raises(BadTileError, match=r"frame says 128 x 96 px, not 256 x 256"):
        decode_tile(Codec("jpeg2000", "rgb"), bytes(data), 256, 256)
    assert (decode_tile(Codec("jpeg2000", "rgb"), bytes(data), 128, 96) == TILE).all()


def test_jpeg2000_ycbcr_is_converted():
    ycbcr = np.asarray(Image.fromarray(TILE).convert("YCbCr"))
    data = imagecodecs.jpeg2k_encode(ycbcr, level=0, mct=False, codecformat="j2k")
    got = decode_tile(Codec("jpeg2000", "ycbcr"), bytes(data), 128, 96)
    expected = np.asarray(Image.fromarray(ycbcr, "YCbCr").convert("RGB")).astype(int)
    assert np.abs(got - expected).max() <= 1  # Pillow converts in fixed point


@pytest.mark.parametrize(
    ("kind", "encode"),
    [
        ("raw", bytes),
        ("deflate", lambda b: imagecodecs.zlib_encode(bytes(b))),
        ("lzw", lambda b: imagecodecs.lzw_encode(bytes(b))),
        ("zstd", lambda b: imagecodecs.zstd_encode(bytes(b))),
    ],
)
@pytest.mark.parametrize("predictor", [1, 2])
def test_lossless_tiles_come_back_exactly(kind, encode, predictor):
    stored = TILE if predictor == 1 else np.diff(TILE, axis=1, prepend=np.uint8(0))
    data = bytes(encode(np.ascontiguousarray(stored).tobytes()))
    assert (decode_tile(Codec(kind, predictor=predictor), data, 128, 96) == TILE).all()
    with pytest.raises(BadTileError):
        decode_tile(Codec(kind, predictor=predictor), data[: len(data) // 2], 128, 96)


@pytest.mark.parametrize("kind", ["deflate", "lzw", "zstd"])
def test_a_tile_that_inflates_past_its_size_is_refused(kind):
    encode = {
        "deflate": imagecodecs.zlib_encode, "lzw": imagecodecs.lzw_encode, "zstd": imagecodecs.zstd_encode
    }[kind]  # fmt: skip
    with pytest.raises(BadTileError):
        decode_tile(Codec(kind), bytes(encode(bytes(50_000_000))), 128, 96)


def test_a_tile_that_is_not_stored_is_the_fill_value():
    assert (decode_tile(Codec("jpeg", fill=255), None, 8, 4) == np.full((4, 8, 3), 255)).all()


def test_a_stored_but_empty_tile_is_damage():
    with pytest.raises(BadTileError, match="empty"):
        decode_tile(Codec("jpeg"), b"", 8, 4)


def test_an_unstored_tile_of_four_samples_has_three_channels():
    assert decode_tile(Codec("raw", samples=4), None, 8, 4).shape == (4, 8, 3)


def test_frames_that_hide_are_refused():
    """A second frame kind, or a frame among the tables, would be decoded at a size nobody checked."""
    arithmetic = bytearray(jpeg())
    arithmetic[arithmetic.index(b"\xff\xc0") + 1] = 0xC9
    with pytest.raises(BadTileError, match="SOF9"):
        decode_tile(Codec("jpeg", "ycbcr"), bytes(arithmetic), 128, 96)
    frame = b"\xff\xc0\x00\x11\x08\xff\xdc\xff\xdc\x03" + bytes(9)
    with pytest.raises(BadTileError, match="tables hold a picture"):
        decode_tile(Codec("jpeg", "ycbcr", b"\xff\xd8" + frame + b"\xff\xd9"), jpeg(), 128, 96)
    boxed = bytes(imagecodecs.jpeg2k_encode(TILE, level=0, codecformat="jp2"))
    assert (decode_tile(Codec("jpeg2000"), boxed, 128, 96) == TILE).all()
    at = boxed.index(b"jp2c") - 4
    small = bytes(imagecodecs.jpeg2k_encode(TILE[:8, :8], level=0, codecformat="j2k"))
    decoy = boxed[:at] + (len(small) + 8).to_bytes(4, "big") + b"free" + small + boxed[at:]
    with pytest.raises(BadTileError, match="frame says 128 x 96 px, not 8 x 8"):
        decode_tile(Codec("jpeg2000"), decoy, 8, 8)


@pytest.mark.parametrize(
    "data", [b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x01", b"GIF89a" * 4, b"\xff\xd8\x00\x00\x00\x00"]
)
def test_header_rubbish_is_a_bad_tile(data):
    with pytest.raises(BadTileError):
        rebuild_jpeg(Codec("jpeg", "ycbcr"), data, 128, 96)
