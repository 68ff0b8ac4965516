"""Zarr of every kind against zarr-python (and tensorstore), and what is refused, absent, torn or exchanged."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    native,
    open_slide,
    read_slide_index,
)
from online_patching.batch_plan.chunk_spec import native_spec
from online_patching.decode import BadTileError, decode_tile
from online_patching.errors import (
    DamagedSlideError,
    MppError,
    NotASlideError,
    ObjectChangedError,
    PatchingError,
    ShortReadError,
    TileDecodeError,
    UnsupportedSlideError,
)
from online_patching.formats.zarr_metadata import (
    BadDocumentError,
    NotReadError,
    parse_array,
    parse_json,
)
from online_patching.geometry import Box
from online_patching.slide import Slide
from online_patching.slide_index import SlideIndex
from online_patching.testing import Storage, SyntheticSlide, write_ome_zarr, write_zarr_array
from online_patching.testing.hostile_zarr import hostile_zarrs, zarr_seeds

SLIDE = SyntheticSlide(5, 331, 237, mpp=0.351)
PICTURE = SLIDE.render(0, 0, 331, 237)
SHARDED = Storage(3, 64, compressor="zstd", axes="yxc", shard_px=128)


def oracle(path: Path, axes: str) -> np.ndarray:
    """The array as zarr-python reads it, as (y, x, c)."""
    values = np.asarray(zarr.open_array(str(path), mode="r"))
    kept = [axis for axis in axes if axis in "cyx"]
    values = values.reshape([n for n, axis in zip(values.shape, axes, strict=True) if axis in kept])
    return values.transpose([kept.index(axis) for axis in "yxc"])


def pixels(path: Path, mpp: float | None = 0.5) -> np.ndarray:
    with open_slide(str(path), mpp=mpp) as slide:
        return slide.read_box(0, Box(0, 0, *slide.dimensions))


def code_of(path: Path, **more) -> str:
    with pytest.raises(PatchingError) as caught:
        read_slide_index(str(path), mpp=0.5, **more)
    assert "\n" not in str(caught.value)
    return caught.value.code


def edit(path: Path, name: str, **changes) -> None:
    """Change a metadata document."""
    document = json.loads((path / name).read_text()) | changes
    (path / name).write_text(json.dumps(document))


BLOSC = st.builds(
    "blosc-{}-{}-{}".format,
    st.sampled_from(["lz4", "lz4hc", "blosclz", "zlib", "zstd"]),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([0, 128, 1000, 4096]),
)
PLAIN = st.sampled_from(["zstd", "gzip", "none"])
COMMON = {
    "chunk_px": st.sampled_from([8, 17, 40, 64, 101]),
    "channel_chunk": st.sampled_from([1, 3]),
    "axes": st.sampled_from(["cyx", "yxc", "tczyx"]),
    "order": st.sampled_from(["C", "F"]),
    "separator": st.sampled_from(["/", "."]),
    "fill": st.sampled_from([0, 7, 255]),
}
STORAGES_2 = st.builds(
    Storage, version=st.just(2), compressor=PLAIN | BLOSC | st.just("zlib"), **COMMON
)
STORAGES_3 = st.builds(
    Storage, version=st.just(3), compressor=PLAIN | BLOSC, crc32c=st.booleans(), **COMMON
)


@st.composite
def sharded(draw):
    storage = draw(STORAGES_3)
    shard_px = storage.chunk_px * draw(st.integers(1, 4))
    table = draw(st.sampled_from(["start", "end", "end-unchecked"]))
    return Storage(**{**vars(storage), "shard_px": shard_px, "table": table})


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(storage=STORAGES_2 | STORAGES_3 | sharded(), data=st.data())
def test_every_way_of_storing_an_array_has_the_pixels_of_zarr_python(tmp_path, storage, data):
    width, height = data.draw(st.integers(9, 180)), data.draw(st.integers(9, 120))
    picture = PICTURE[:height, :width]
    path = tmp_path / "a.zarr"
    shutil.rmtree(path, ignore_errors=True)
    write_zarr_array(path, picture, storage)
    whole = oracle(path, storage.axes)
    assert (whole == picture).all()
    left, top = data.draw(st.integers(-20, width - 1)), data.draw(st.integers(-20, height - 1))
    box = Box(left, top, left + data.draw(st.integers(1, 90)), top + data.draw(st.integers(1, 90)))
    white = np.full((height + 250, width + 250, 3), 255, np.uint8)
    white[100 : 100 + height, 100 : 100 + width] = whole
    with open_slide(str(path), mpp=0.5) as slide:
        assert slide.dimensions == (width, height)
        assert (slide.read_box(0, Box(0, 0, width, height)) == whole).all()
        expected = white[box.top + 100 : box.bottom + 100, box.left + 100 : box.right + 100]
        assert (slide.read_box(0, box) == expected).all()
        saved = SlideIndex.from_bytes(*slide.index.to_bytes())
        assert saved == slide.index


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(storage=STORAGES_2 | STORAGES_3, data=st.data())
def test_a_box_of_a_chunk_is_that_part_of_the_whole_chunk(tmp_path, storage, data):
    path = tmp_path / "a.zarr"
    shutil.rmtree(path, ignore_errors=True)
    side = storage.chunk_px
    write_zarr_array(path, PICTURE[:side, :side], storage)
    level = read_slide_index(str(path), mpp=0.5).levels[0]
    left, top = data.draw(st.integers(0, side - 1)), data.draw(st.integers(0, side - 1))
    box = Box(
        left, top, data.draw(st.integers(left + 1, side)), data.draw(st.integers(top + 1, side))
    )
    for part in range(level.parts):
        body = (path / level.keys.key(0, 0, part)).read_bytes()
        whole = decode_tile(level.codec, body, side, side)
        some = decode_tile(level.codec, body, side, side, box=box)
        assert (some == whole[box.top : box.bottom, box.left : box.right]).all()


@pytest.mark.parametrize(
    "storage",
    [
        Storage(2, 64, compressor="blosc-lz4-2-0", axes="yxc"),
        Storage(3, 64, compressor="gzip", crc32c=True),
        SHARDED,
        Storage(3, 32, 1, "blosc-zstd-1-0", shard_px=96, table="start", order="F"),
    ],
    ids=["v2", "v3", "sharded", "sharded-start-F"],
)
def test_tensorstore_reads_the_same_pixels(tmp_path, storage):
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is in the bench extra")
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE, storage)
    driver = "zarr" if storage.version == 2 else "zarr3"
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}}
    values = np.asarray(tensorstore.open(spec, read=True).result())
    assert (pixels(path) == (values if storage.axes == "yxc" else values.transpose(1, 2, 0))).all()


def test_jpeg_chunks_decode_as_imagecodecs_does_and_at_smaller_scales(tmp_path):
    path = write_zarr_array(
        tmp_path / "a.zarr", PICTURE, Storage(2, 64, compressor="jpeg", axes="yxc")
    )
    whole = oracle(path, "yxc")
    assert (pixels(path) == whole).all() and not (whole == PICTURE).all()
    index = read_slide_index(str(path), mpp=0.5)
    assert (index.levels[0].codec.kind, index.levels[0].codec.colour) == ("jpeg", "ycbcr")
    with Slide(index) as slide:
        half = slide.read_patch(x_um=0, y_um=0, mpp=1.0, size_px=100).astype(float)
    area = whole[:200, :200].reshape(100, 2, 100, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - area).mean() < 2


def test_jpeg_chunks_kept_as_rgb_keep_their_colours(tmp_path):
    import imagecodecs

    path = write_zarr_array(
        tmp_path / "a.zarr", PICTURE[:64, :64], Storage(2, 64, compressor="jpeg", axes="yxc")
    )
    (chunk,) = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    chunk.write_bytes(
        imagecodecs.jpeg8_encode(PICTURE[:64, :64], colorspace="rgb", outcolorspace="rgb", level=95)
    )
    assert read_slide_index(str(path), mpp=0.5).levels[0].codec.colour == "rgb"
    assert np.abs(pixels(path).astype(int) - PICTURE[:64, :64]).mean() < 3


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")
def test_a_bioformats2raw_container_is_its_only_image(tmp_path, version, consolidated):
    path = write_ome_zarr(
        tmp_path / "a.ome.zarr", SLIDE, version=version, chunk_px=64, level0=PICTURE,
        container=True, consolidated=consolidated, downsamples=(3.0,),
        shard_px=128 if version == "0.5" else None,
    )  # fmt: skip
    index, image = read_slide_index(str(path)), read_slide_index(str(path / "0"))
    assert index.mpp == pytest.approx(0.351) and image.slide_id == "a_0"
    assert (pixels(path, None) == PICTURE).all() and (pixels(path / "0", None) == PICTURE).all()
    shutil.copytree(path / "0", path / "1")
    with pytest.raises(UnsupportedSlideError, match=r"several images.*/0"):
        read_slide_index(str(path))
    assert read_slide_index(str(path / "1")).dimensions == (331, 237)


def test_a_sharded_slide_is_byte_ranges_of_its_shards(tmp_path):
    path = write_ome_zarr(
        tmp_path / "a.zarr", SLIDE, version="0.5", storage=SHARDED, level0=PICTURE, downsamples=(3.0,)
    )  # fmt: skip
    index = read_slide_index(str(path))
    assert [o.name for o in index.objects[:3]] == ["0/c/0/0/0", "0/c/0/1/0", "0/c/0/2/0"]
    assert len(index.objects) == 6 + 1
    level = index.levels[0]
    for tile in (0, 7, level.n_tiles - 1):
        key, start, stop, _ = index.locate(*level.byte_range(tile))
        whole = Path(key).read_bytes()
        row, column = divmod(tile, level.columns)
        table = np.frombuffer(whole[-4 * 16 - 4 : -4], "<u8").reshape(2, 2, 2)
        assert (start, stop - start) == tuple(table[row % 2, column % 2].tolist())


def test_a_level_without_shards_beside_one_with_them_is_read_too(tmp_path):
    path = write_ome_zarr(
        tmp_path / "a.zarr", SLIDE, version="0.5", storage=SHARDED, level0=PICTURE, downsamples=(3.0,)
    )  # fmt: skip
    small = np.asarray(zarr.open_array(str(path / "1"), mode="r"))
    shutil.rmtree(path / "1")
    write_zarr_array(path / "1", small, Storage(3, 64, compressor="gzip", axes="yxc"))
    with open_slide(str(path)) as slide:
        assert slide.index.levels[1].rows is not None and len(slide.index.objects) == 6 + 4
        assert (slide.read_box(1, Box(0, 0, 110, 79)) == small).all()


def test_absent_chunks_and_shards_hold_the_fill_value(tmp_path):
    storage = Storage(3, 64, axes="yxc", shard_px=128, fill=9)
    picture = PICTURE.copy()
    picture[:64, 64:128] = 9  # zarr-python stores no chunk that is all fill value
    path = write_zarr_array(tmp_path / "a.zarr", picture, storage)
    (path / "c/1/0/0").unlink()
    picture[128:, :128] = 9
    assert (oracle(path, "yxc") == picture).all() and (pixels(path) == picture).all()
    plain = write_zarr_array(tmp_path / "b.zarr", PICTURE, Storage(2, 64, axes="yxc", fill=200))
    (plain / "1/2/0").unlink()
    assert (oracle(plain, "yxc") == pixels(plain)).all() and (pixels(plain)[100, 150] == 200).all()


def shard_of(path: Path) -> Path:
    return path / "c/0/1/0"


def table_entry(path: Path, chunk: int, offset: int, length: int, good_crc: bool = True) -> None:
    """Rewrite an entry of a 2 x 2 shard's table."""
    body = bytearray(shard_of(path).read_bytes())
    struct.pack_into("<QQ", body, len(body) - 68 + 16 * chunk, offset, length)
    crc = google_crc32c.value(bytes(body[-68:-4])) if good_crc else 0
    struct.pack_into("<I", body, len(body) - 4, crc)
    shard_of(path).write_bytes(body)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ((0, 2**63, 10), "chunk 0 of shard c/0/1/0 lies at"),
        ((3, 5, 2**64 - 2), "chunk 3 of shard"),
        ((1, 2**64 - 1, 4), "chunk 1 of shard"),
        ((2, 10, 0), "chunk 2 of shard c/0/1/0 lies at 10, 0 bytes long"),
    ],
)
def test_a_table_that_points_out_of_its_shard_is_damage(tmp_path, entry, told):
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE, SHARDED)
    table_entry(path, *entry)
    with pytest.raises(DamagedSlideError, match=told):
        read_slide_index(str(path), mpp=0.5)


def test_a_table_with_a_wrong_checksum_is_damage(tmp_path):
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE, SHARDED)
    table_entry(path, 0, 0, 100, good_crc=False)
    with pytest.raises(DamagedSlideError, match="another checksum"):
        read_slide_index(str(path), mpp=0.5)


def test_a_torn_shard_is_told_as_truncated(tmp_path):
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE, SHARDED)
    shard_of(path).write_bytes(shard_of(path).read_bytes()[:40])
    with pytest.raises(ShortReadError, match="truncated"):
        read_slide_index(str(path), mpp=0.5)
    start = write_zarr_array(
        tmp_path / "b.zarr", PICTURE, Storage(3, 64, axes="yxc", shard_px=128, table="start")
    )
    shard_of(start).write_bytes(shard_of(start).read_bytes()[:-9])
    with pytest.raises(DamagedSlideError, match="copy it again"):
        read_slide_index(str(start), mpp=0.5)


def test_a_chunk_with_a_wrong_checksum_is_a_bad_tile(tmp_path):
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE, Storage(3, 64, axes="yxc", crc32c=True))
    chunk = path / "c/0/0/0"
    body = bytearray(chunk.read_bytes())
    body[-1] ^= 1
    chunk.write_bytes(body)
    with pytest.raises(TileDecodeError, match="checksum"):
        pixels(path)


def test_a_shard_that_was_replaced_is_noticed(tmp_path):
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE, SHARDED)
    index = read_slide_index(str(path), mpp=0.5)
    shutil.copy(path / "c/0/0/0", shard_of(path))
    with pytest.raises(ObjectChangedError, match=r"c/0/1/0.*changed since"):
        Slide(index)


def test_a_slide_whose_metadata_changed_is_noticed(tmp_path):
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE, SHARDED)
    index = read_slide_index(str(path), mpp=0.5)
    edit(path, "zarr.json", attributes={"another": "slide"})
    with pytest.raises(ObjectChangedError):
        Slide(index)


@pytest.mark.parametrize(
    ("shape", "dtype", "code", "told"),
    [
        ((200, 300), "uint8", "unsupported", "neither"),
        ((1, 200, 300), "uint8", "unsupported", "neither"),
        ((3, 200, 300), "uint16", "unsupported", "3 channel.s. of uint16"),
        ((7, 200, 300), "uint8", "unsupported", "names no axes"),
        ((200, 3, 3), "uint8", "unsupported", "chunks of"),
    ],
)
def test_plain_arrays_that_are_no_rgb_picture_are_refused(tmp_path, shape, dtype, code, told):
    zarr.create_array(
        store=str(tmp_path / "a.zarr"), shape=shape, dtype=dtype, chunks=(2,) * len(shape)
    )
    with pytest.raises(UnsupportedSlideError, match=told) as caught:
        read_slide_index(str(tmp_path / "a.zarr"), mpp=0.5)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("channels", "dtype", "code"),
    [(1, "uint8", "fluorescence"), (2, "uint16", "fluorescence"), (3, "float32", "unsupported"),
     (9, "uint16", "multiplex")],
)  # fmt: skip
def test_images_that_are_no_8_bit_rgb_are_refused_by_kind(tmp_path, channels, dtype, code):
    path = tmp_path / "a.zarr"
    write_ome_zarr(path, SLIDE, level0=PICTURE, downsamples=())
    shutil.rmtree(path / "0")
    zarr.open_group(str(path), zarr_format=2).create_array(
        "0", shape=(channels, 200, 300), dtype=dtype, chunks=(1, 64, 64)
    )
    assert code_of(path) == code


def test_channels_that_are_named_after_dyes_are_fluorescence(tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", SLIDE, level0=PICTURE, downsamples=())
    rgb = [{"label": c, "color": n} for c, n in (("R", "FF0000"), ("G", "00FF00"), ("B", "0000FF"))]
    edit(path, ".zattrs", omero={"channels": rgb})
    assert read_slide_index(str(path)).dimensions == (331, 237)
    edit(path, ".zattrs", omero={"channels": [{"label": "DAPI"}, *rgb[1:]]})
    assert code_of(path) == "fluorescence"


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({"compressor": {"id": "bz2"}}, "unsupported", "'bz2' is not read"),
        ({"filters": [{"id": "delta"}]}, "unsupported", "'delta' is not read"),
        ({"filters": [{"id": "zstd"}]}, "unsupported", "zstd.zstd"),
        ({"chunks": [0, 64, 3]}, "damaged", "chunks"),
        ({"chunks": [2**40, 64, 3]}, "damaged", "chunks"),
        ({"chunks": [2**14, 2**14, 3]}, "unsupported", "too large"),
        ({"chunks": [1, 1, 3]}, "unsupported", "too small"),
        ({"chunks": [64, 64, 2]}, "unsupported", "2 channels split"),
        ({"shape": [1.5, 2, 3]}, "damaged", "shape"),
        ({"order": "K"}, "damaged", "order"),
        ({"fill_value": -1}, "damaged", "fill_value"),
        ({"zarr_format": 4}, "damaged", "zarr_format"),
        ({"dtype": "<u2"}, "unsupported", "uint16"),
        ({"dtype": [["a", "<u2"]]}, "unsupported", "not 8-bit RGB"),
    ],
)  # fmt: skip
def test_version_2_metadata_is_checked(tmp_path, changes, code, told):
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE, Storage(2, 64, axes="yxc"))
    edit(path, ".zarray", **changes)
    with pytest.raises(PatchingError, match=told) as caught:
        read_slide_index(str(path), mpp=0.5)
    assert caught.value.code == code


BYTES, TABLE = {"name": "bytes"}, [{"name": "bytes"}, {"name": "crc32c"}]


def sharding(chunk=(64, 64, 3), codecs=(BYTES,), table=TABLE, **more):
    settings = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": table, **more}
    return {"name": "sharding_indexed", "configuration": settings}


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({"codecs": [sharding(codecs=[sharding()])]}, "unsupported", "within shards"),
        ({"codecs": [sharding(chunk=[60, 64, 3])]}, "damaged", "do not divide"),
        ({"codecs": [sharding(), {"name": "gzip"}]}, "unsupported", "around whole shards"),
        ({"codecs": [sharding(table=[*TABLE, {"name": "gzip"}])]}, "unsupported", "tables coded"),
        ({"codecs": [sharding(index_location="middle")]}, "damaged", "index_location"),
        ({"codecs": [{"name": "transpose", "configuration": {"order": [0, 0, 1]}}, BYTES]},
         "damaged", "transpose"),
        ({"codecs": [{"name": "transpose", "configuration": {"order": [2, 1, 0]}}, sharding()]},
         "unsupported", "transposed"),
        ({"codecs": [{"name": "vlen-utf8"}]}, "unsupported", "vlen"),
        ({"codecs": []}, "damaged", "codecs"),
        ({"chunk_grid": {"name": "rectilinear"}}, "unsupported", "grid"),
        ({"storage_transformers": [{"name": "x"}]}, "unsupported", "transformers"),
        ({"new_thing": {"must_understand": True}}, "unsupported", "new_thing"),
        ({"node_type": "folder"}, "not_a_slide", "multiscales"),
        ({"chunk_key_encoding": {"name": "base64"}}, "unsupported", "chunk keys"),
    ],
)  # fmt: skip
def test_version_3_metadata_is_checked(tmp_path, changes, code, told):
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE, SHARDED)
    edit(path, "zarr.json", **changes)
    with pytest.raises(PatchingError, match=told) as caught:
        read_slide_index(str(path), mpp=0.5)
    assert caught.value.code == code


def test_too_many_shards_are_refused_before_any_is_asked_for(tmp_path):
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE, SHARDED)
    edit(path, "zarr.json", shape=[2**20, 2**20, 3])
    with pytest.raises(UnsupportedSlideError, match="67,108,864 shards"):
        read_slide_index(str(path), mpp=0.5)


def test_a_plain_array_needs_an_mpp_and_says_so(tmp_path):
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE)
    with pytest.raises(MppError, match="override table"):
        read_slide_index(str(path))
    index = read_slide_index(str(path), mpp=(0.4, 0.5))
    assert (index.container, index.mpp_x, index.mpp_y) == ("zarr", 0.4, 0.5)


def test_what_is_no_image_says_what_it_is(tmp_path):
    zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    with pytest.raises(NotASlideError, match="without OME multiscales"):
        read_slide_index(str(tmp_path / "a.zarr"))
    zarr.open_group(str(tmp_path / "p.zarr"), mode="w").attrs["ome"] = {"plate": {}}
    with pytest.raises(NotASlideError, match="a plate of wells"):
        read_slide_index(str(tmp_path / "p.zarr"))
    (tmp_path / "e.zarr").mkdir()
    with pytest.raises(NotASlideError, match="no Zarr array or group"):
        read_slide_index(str(tmp_path / "e.zarr"))


@pytest.mark.parametrize(
    "path", ["../x", "/etc", "a/../../b", "http://h/x", "a%2e", "a?b", "x\ny", ""]
)
def test_a_dataset_outside_the_store_is_refused(tmp_path, path):
    zarr_path = write_ome_zarr(tmp_path / "a.zarr", SLIDE, level0=PICTURE, downsamples=())
    attributes = json.loads((zarr_path / ".zattrs").read_text())
    attributes["multiscales"][0]["datasets"][0]["path"] = path
    (zarr_path / ".zattrs").write_text(json.dumps(attributes))
    with pytest.raises(DamagedSlideError, match="leaves the store") as caught:
        read_slide_index(str(zarr_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compressor", ["zstd", "gzip", "zlib", "blosc-lz4-1-0", "blosc-zstd-2-0"])
def test_damaged_chunks_are_bad_tiles_however_much_is_wanted(tmp_path, compressor):
    path = write_zarr_array(
        tmp_path / "a.zarr", PICTURE[:64, :64], Storage(2, 64, compressor=compressor, axes="yxc")
    )
    level = read_slide_index(str(path), mpp=0.5).levels[0]
    body = (path / "0/0/0").read_bytes()
    for bad in (body[:-20], body[: len(body) // 2], b"\0" * len(body), b"x"):
        with pytest.raises(BadTileError):
            decode_tile(level.codec, bad, 64, 64)
    half = decode_tile(level.codec, body, 64, 64, box=Box(0, 0, 64, 20))
    assert (half == PICTURE[:20, :64]).all()
    with pytest.raises(BadTileError):
        decode_tile(level.codec, body[:30], 64, 64, box=Box(0, 0, 64, 20))


def test_a_chunk_that_claims_to_be_larger_is_refused_before_memory_is_taken(tmp_path):
    path = write_zarr_array(
        tmp_path / "a.zarr", PICTURE[:64, :64], Storage(2, 64, compressor="blosc", axes="yxc")
    )
    level = read_slide_index(str(path), mpp=0.5).levels[0]
    body = bytearray((path / "0/0/0").read_bytes())
    struct.pack_into("<I", body, 4, 2**31 - 17)
    with pytest.raises(BadTileError, match=r"2,147,483,631 bytes, not 12,288"):
        decode_tile(level.codec, bytes(body), 64, 64)


@pytest.mark.parametrize("remote", [False, True], ids=["local", "http"])
@pytest.mark.parametrize("kind", ["v2", "v3", "sharded", "jpeg", "channels"])
def test_a_loader_delivers_what_read_patch_reads(tmp_path, fault_server, kind, remote):
    storage = {
        "v2": Storage(2, 64, compressor="blosc-lz4-2-0", axes="yxc"),
        "v3": Storage(3, 50, compressor="zstd", crc32c=True),
        "sharded": SHARDED,
        "jpeg": Storage(2, 64, compressor="jpeg", axes="yxc"),
        "channels": Storage(2, 64, 1, "gzip"),
    }[kind]
    root = fault_server.root if remote else tmp_path
    version = "0.4" if storage.version == 2 else "0.5"
    path = write_ome_zarr(
        root / "s.zarr", SLIDE, version=version, storage=storage, level0=PICTURE, downsamples=(2.0,)
    )
    index = read_slide_index(f"{fault_server.url}/s.zarr" if remote else str(path))
    mask = ForegroundMask.everything(index)
    sampler = PatchSampler([index], [mask], size_px=48, mpp=[0.351, 0.5, 0.702], seed=1)
    with PatchLoader(sampler, batch_size=24) as loader, open_slide(str(path)) as slide:
        batch = next(iter(loader))
        assert not batch.failures
        for ref, patch in zip(batch.refs, batch.pixels, strict=True):
            x_um, y_um = ref.x_px0 * index.mpp_x, ref.y_px0 * index.mpp_y
            assert (slide.read_patch(x_um=x_um, y_um=y_um, mpp=ref.mpp, size_px=48) == patch).all()


def test_a_remote_prefix_without_a_suffix_is_found_by_its_metadata(fault_server):
    write_ome_zarr(
        fault_server.root / "plain", SLIDE, version="0.5", level0=PICTURE, downsamples=()
    )
    assert read_slide_index(f"{fault_server.url}/plain").dimensions == (331, 237)


@pytest.mark.slow
def test_hostile_stores_end_in_a_result_or_an_error_of_ours():
    """`benchmarks/fuzz_zarr.py` runs a million, in children with real limits."""
    script = Path(__file__).parents[1] / "benchmarks" / "fuzz_zarr.py"
    words = [sys.executable, str(script), "--target", "zarr", "--inputs", "1500", "--seed", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "1,500 inputs" in done.stdout and "0 findings" in done.stdout


def test_hostile_metadata_that_zarr_python_accepts_too_describes_the_same_array():
    both = 0
    for store in hostile_zarrs([s for s in zarr_seeds() if "jpeg" not in s.name], range(400), 9):
        for name, body in store.objects.items():
            last = name.rpartition("/")[2]
            if last not in (".zarray", "zarr.json"):
                continue
            try:
                ours = parse_array(parse_json(body))
            except (BadDocumentError, NotReadError):
                continue
            try:
                buffer = zarr.core.buffer.cpu.Buffer.from_bytes(body)
                theirs = zarr.open_array(zarr.storage.MemoryStore({last: buffer}), mode="r")
            except Exception:  # it raises many types
                continue
            both += 1
            assert (theirs.shape, theirs.chunks, theirs.shards) == (
                ours.shape,
                ours.chunk,
                ours.shard,
            )
            assert str(theirs.dtype) == ours.dtype or ours.dtype != "uint8"
            assert ours.dtype != "uint8" or int(theirs.fill_value or 0) == ours.fill
    assert both > 500


@pytest.mark.skipif(not native.CHUNKS, reason="Zarr chunks are not decoded natively here")
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    storage=STORAGES_2 | STORAGES_3 | sharded(),
    seed=st.integers(0, 999),
    mpp=st.sampled_from([0.5, 0.61]),
)
def test_the_native_decoder_makes_the_pixels_of_the_portable_one(tmp_path, storage, seed, mpp):
    path = tmp_path / "a.zarr"
    shutil.rmtree(path, ignore_errors=True)
    write_zarr_array(path, PICTURE, storage)
    index = read_slide_index(str(path), mpp=0.5)
    assert native_spec(index.levels[0].codec) is not None
    mask = ForegroundMask.everything(index)
    sampler = PatchSampler([index], [mask], size_px=40, mpp=mpp, seed=seed)
    with (
        PatchLoader(sampler, batch_size=12, threads=1, prefetch=1) as loader,
        Slide(index) as slide,
    ):
        batch = next(iter(loader))
        for ref, patch in zip(batch.refs, batch.pixels, strict=True):
            x_um, y_um = ref.x_px0 * index.mpp_x, ref.y_px0 * index.mpp_y
            assert (slide.read_patch(x_um=x_um, y_um=y_um, mpp=mpp, size_px=40) == patch).all()


@pytest.mark.skipif(not native.CHUNKS, reason="Zarr chunks are not decoded natively here")
@pytest.mark.parametrize("compressor", ["zstd", "gzip", "blosc-lz4-1-0", "blosc-zstd-2-0", "none"])
def test_damaged_chunks_are_told_alike_by_both_decoders(tmp_path, compressor):
    storage = Storage(
        3, 64, compressor=compressor, axes="yxc", crc32c=compressor == "none", shard_px=64
    )
    path = write_zarr_array(tmp_path / "a.zarr", PICTURE[:64, :64], storage)
    shard = path / "c/0/0/0"
    body = bytearray(shard.read_bytes())
    body[4:12] = b"\xff" * 8  # within the chunk's head
    shard.write_bytes(body)
    index = read_slide_index(str(path), mpp=0.5)
    sampler = PatchSampler([index], [ForegroundMask.everything(index)], size_px=48, mpp=0.5, seed=0)
    with (
        PatchLoader(sampler, batch_size=2) as loader,
        pytest.raises(PatchingError, match="does not decode"),
    ):
        next(iter(loader))
    with pytest.raises(TileDecodeError):
        pixels(path)
