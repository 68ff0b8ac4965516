"""Hostile files: ten thousand in children with real limits, and the lies that deserve a name.

`benchmarks/fuzz_tiff.py` runs millions; its output is under benchmarks/results.
"""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from online_patching import ForegroundMask, SlideIndex, errors, read_slide_index
from online_patching.formats import tiff, tiff_tags
from online_patching.testing import hostile, hostile_seeds
from online_patching.testing.hostile import HostileFile, HostileStores
from online_patching.testing.raw_tiff import RawImage, build_tiff, longs, rational, shorts

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz_tiff.py"
SEEDS = {seed.name: seed for seed in hostile_seeds.tiff_seeds()}
BOMBS = {seed.name: seed for seed in hostile_seeds.tiff_bombs()}
MPP = {282: rational(40_000, 1), 283: rational(40_000, 1), 296: shorts(3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "inputs"), [("tiff", 10_000), ("index", 3_000), ("mask", 3_000), ("slide", 150)]
)
def test_hostile_files_end_in_a_result_or_an_error_of_ours(target: str, inputs: int) -> None:
    """Within a second of CPU and 64 MiB of address space each: the script's children see to that."""
    words = [
        sys.executable,
        str(SCRIPT),
        "--target",
        target,
        "--inputs",
        str(inputs),
        "--seed",
        "7",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert f"{inputs:,} inputs" in done.stdout
    assert "0 findings" in done.stdout


BROKEN_READERS = {
    "swallows an error": "raise KeyError('a bare one')",
    "takes memory": "bytearray(200 * 2**20)",
    "takes time": "exec('while True: pass')",
    "dies": "__import__('os').abort()",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN_READERS)
def test_the_fuzzer_finds_a_reader_broken_on_purpose(how: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import fuzz_tiff\nfrom online_patching.formats import tiff\n"
        "whole = tiff.read_index\n"
        "def read_index(uri, slide_id, override, stores, size, token):\n"
        "    if stores.file.kind.startswith('stretch'):\n"
        f"        {BROKEN_READERS[how]}\n"
        "    return whole(uri, slide_id, override, stores, size, token)\n"
        "tiff.read_index = read_index\nfuzz_tiff.LIMIT_CPU_S = 0.3\nfuzz_tiff.WARM_UP = 0\nfuzz_tiff.main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(broken), "--inputs", "60"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    sign = {"takes memory": "MemoryError", "takes time": "0.3 s of CPU", "dies": "ended with -6"}
    assert sign.get(how, "KeyError") in done.stdout


# --- the lies by name -----------------------------------------------------------------------------


def outcome(file: HostileFile) -> tuple[str, HostileStores]:
    stores = HostileStores(file)
    try:
        index = tiff.read_index("a.svs", "a", None, stores, file.size_bytes, "")
    except errors.PatchingError as error:
        return f"{type(error).__name__}: {error}", stores
    return "indexed" if index else "fallback", stores


def as_is(data: bytes, size_bytes: int | None = None) -> HostileFile:
    return HostileFile("", data, (), len(data) if size_bytes is None else size_bytes)


def changed(seed: hostile.Seed, role: str, value: int, tag: int | None = None) -> HostileFile:
    """The seed with one number of a role (of the first entry of a tag, where one is named) replaced."""
    fields = list(seed.fields)
    if tag is not None:
        at = next(
            k for k, f in enumerate(fields)
            if f.role == "tag" and f.value(seed.data, seed.order) == tag
        )  # fmt: skip
        fields = fields[at:]
    spot = next(f for f in fields if f.role == role)
    new = value.to_bytes(spot.width, "little" if seed.order == "<" else "big")
    return HostileFile(role, seed.data, ((spot.start, new),), len(seed.data))


@pytest.mark.parametrize("name", SEEDS)
def test_every_seed_is_valid_before_it_is_bent(name: str) -> None:
    expected = "UnsupportedSlideError" if "fluorescence" in name else "indexed"
    found, stores = outcome(as_is(SEEDS[name].data))
    assert found.startswith(expected)
    assert stores.requests == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("long_chain", "more than 512 images"),
        ("chain_to_itself", "loop"),
        ("sub_directories_of_themselves", "loop"),
        ("sub_directories_by_the_thousand", "more than 512 images"),
        ("tags_by_the_thousand", "more than 65,536 tags"),
        ("descriptions_that_share", "holds 4,194,304 bytes, more than"),
        ("laughs", "carries no µm/px"),
        ("external_entity", "carries no µm/px"),
        ("attributes", "holds"),
        ("wide", "past the end"),
    ],
)
def test_a_bomb_is_refused_by_name(name: str, says: str) -> None:
    found, stores = outcome(as_is(BOMBS[name].data))
    assert says in found
    assert stores.bytes_read < 4 * 2**20


@pytest.mark.parametrize("order", ["generic <", "generic big >"])
@pytest.mark.parametrize(
    ("role", "tag", "value", "says"),
    [
        ("count", 324, 2**32 - 1, "lists 4294967295 offsets"),
        ("count", 325, 1, "offsets and 1 lengths"),
        ("type", 324, 2, "type 2, not an integer"),
        ("type", 256, 12, "type 12, not an integer"),
        ("table", 324, 2**31, "past the end"),
        ("table", 325, 2**31, "past the end"),
        ("table", 256, 2**30, "1,073,741,824 x 40 px"),
        ("table", 322, 65_535, "lists 9 offsets"),
        ("table", 322, 0, "fallback"),
        ("next", None, 10**9, "past the end"),
        ("directory", None, 60_000, "past the end"),
        ("table", 282, 0, "carries no µm/px"),
        ("table", 282, 1, "outside 0.05 to 8"),
    ],
)
def test_a_number_that_lies_is_told(
    order: str, role: str, tag: int | None, value: int, says: str
) -> None:
    found, _ = outcome(changed(SEEDS[order], role, value, tag))
    assert says in found


def test_a_tile_that_claims_more_bytes_than_its_pixels_need_is_refused() -> None:
    """Nothing else stops a loader from reading what a table says."""
    image = RawImage((70, 40), [b"x" * 200_000] * 9, (32, 16), photometric=6, tags=MPP)
    assert "more than its pixels could need" in outcome(as_is(build_tiff([image])))[0]


def test_an_empty_tile_lies_nowhere_whatever_its_offset_says() -> None:
    places = (2**41, 100, 2**63) + (200,) * 6
    image = RawImage((70, 40), [b"x"] * 9, (32, 16), photometric=6,
                     tags={**MPP, 324: (16, places), 325: longs(0, 5, 0, 5, 5, 5, 5, 5, 5)})  # fmt: skip
    file = as_is(build_tiff([image], big=True))
    index = tiff.read_index("a", "a", None, HostileStores(file), file.size_bytes, "")
    level = index.levels[0]
    assert [level.byte_range(k) for k in range(3)] == [(0, 0), (100, 105), (0, 0)]
    assert level.overflow == ()


@pytest.mark.parametrize("bent", [{"compression": 1}, {"compression": 5}, {"compression": 99}])
def test_what_is_stored_in_ways_we_do_not_undo_is_for_a_fallback_reader(bent: dict) -> None:
    """YCbCr outside JPEG would come out in wrong colours; the rest not at all."""
    image = {"photometric": 6, "tags": MPP, **bent}
    assert (
        outcome(as_is(build_tiff([RawImage((70, 40), [b"x"] * 9, (32, 16), **image)])))[0]
        == "fallback"
    )


def test_the_widest_table_that_is_allowed_is_read_in_parts() -> None:
    wide = BOMBS["wide"].data  # four million tiles, all blank: the file goes on with zeros
    found, stores = outcome(as_is(wide, 2**31))
    assert found == "indexed"
    assert stores.requests == 1 + 2 * 16
    tiles = 2 * 2**22
    more = wide.replace(
        struct.pack("<HHII", 324, 4, 2**22, 800), struct.pack("<HHII", 324, 4, tiles, 800)
    )
    assert "lists 8388608 offsets" in outcome(as_is(more, 2**31))[0]
    assert "claims 8,388,608 tiles" in outcome(changed(BOMBS["wide"], "table", 64, 257))[0]


def test_scattered_directories_stop_at_the_number_of_requests(monkeypatch) -> None:
    monkeypatch.setattr(tiff_tags, "MAX_REQUESTS", 5)
    images = [
        RawImage((70, 40), [bytes(40_000)] * 9, (128, 128), compression=1, tags=MPP)
        for _ in range(8)
    ]
    found, stores = outcome(as_is(build_tiff(images)))
    assert "scattered over more than 5 places" in found
    assert stores.requests == 5


def test_values_that_are_read_again_and_again_use_up_the_budget(monkeypatch) -> None:
    monkeypatch.setattr(tiff_tags, "MAX_HEADER_BYTES", 800)
    found, _ = outcome(as_is(SEEDS["aperio <"].data))
    assert "more than 800 bytes" in found


def test_a_classic_tiff_beyond_4_gib_is_for_a_fallback_reader() -> None:
    assert outcome(as_is(SEEDS["generic <"].data, 2**32 + 1))[0] == "fallback"
    assert outcome(as_is(SEEDS["generic big <"].data, 2**40))[0] == "indexed"


def test_damaged_headers_are_not_handed_to_readers_without_limits(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("online_patching.formats.fallback.read_index", lambda *_: 1 / 0)
    (tmp_path / "a.svs").write_bytes(BOMBS["long_chain"].data)
    with pytest.raises(errors.DamagedSlideError, match="more than 512 images"):
        read_slide_index(str(tmp_path / "a.svs"))


def test_an_input_is_a_function_of_its_number() -> None:
    seeds = list(SEEDS.values())
    alone = next(hostile.hostile_files(seeds, [321]))
    among = list(hostile.hostile_files(seeds, range(300, 330)))[21]
    assert alone == among
    kinds = {f.kind.partition(":")[0] for f in hostile.hostile_files(seeds, range(400))}
    assert kinds == {"numbers", "header bytes", "bytes", "stretch", "size", "frame"}
    assert list(hostile.hostile_files(seeds, [5], seed=1)) != list(
        hostile.hostile_files(seeds, [5])
    )


def test_patches_lie_over_the_base_wherever_a_read_cuts_them() -> None:
    file = HostileFile("", b"0123456789", ((3, b"abc"), (9, b"zz")), 14)
    whole = b"012abc678zz\0\0\0"
    for start in range(14):
        for stop in range(start, 16):
            assert file.read(start, stop) == whole[start:stop]


# --- saved indexes and masks ----------------------------------------------------------------------

LIES = (None, True, -1, 0, 0.5, 2**31, 2**70, 1e300, float("nan"), "x", "", [], [[1]], {}, {"a": 1})


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(p for key, item in inner for p in leaves(item, (*path, key)))]


def test_every_field_of_a_saved_index_may_lie(tmp_path: Path) -> None:
    data = SEEDS["aperio <"].data
    index = tiff.read_index("a.svs", "a", None, HostileStores(as_is(data)), len(data), "1-2")
    header, rows = index.to_bytes()
    fields = json.loads(header)
    refused = 0
    for path in leaves(fields)[1:]:
        for lie in LIES:
            bent = copy.deepcopy(fields)
            inner = bent
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = lie
            try:
                again = SlideIndex.from_bytes(json.dumps(bent).encode(), rows)
            except errors.CorpusError:
                refused += 1
                continue
            for level in again.levels:
                assert 0 < level.width_px < 2**31
                assert len(level.rows) == level.n_tiles
    assert refused > 300


@pytest.mark.parametrize(
    "header", [b"", b"[]", b"{}", b"[" * 100_000, b'{"levels": 3}', b'{"levels": []}', b"\xff\xfe"]
)
def test_a_header_that_is_none_is_told(header: bytes, tmp_path: Path) -> None:
    with pytest.raises(errors.CorpusError, match="not a slide index"):
        SlideIndex.from_bytes(header, np.empty(0, np.uint64))
    path = tmp_path / "a.index"
    path.write_bytes(b"PFMINDX2" + struct.pack("<Q", len(header)) + header)
    with pytest.raises(errors.CorpusError, match=r"a\.index: not a readable slide index"):
        SlideIndex.load(path)


def test_a_row_that_points_past_the_large_tiles_is_told() -> None:
    data = SEEDS["aperio <"].data
    index = tiff.read_index("a.svs", "a", None, HostileStores(as_is(data)), len(data), "1-2")
    header, rows = index.to_bytes()
    rows[2] = (7 << 24) | 0xFFFFFF
    again = SlideIndex.from_bytes(header, rows)
    with pytest.raises(errors.CorpusError, match="tile row 2"):
        again.levels[0].byte_range(2)


def test_large_tiles_of_a_table_read_in_parts_keep_their_rows(monkeypatch) -> None:
    monkeypatch.setattr(tiff_tags, "_ROWS_A_READ", 4)
    far = 2**40 + 512
    places = [100, far, 300, far + 64, 500, far + 128, 700, 800, far + 192]
    image = RawImage((70, 40), [b"x"] * 9, (32, 16), photometric=6,
                     tags={**MPP, 324: (16, tuple(places)), 325: longs(*range(1, 10))})  # fmt: skip
    data = build_tiff([image], big=True)
    index = tiff.read_index("a", "a", None, HostileStores(as_is(data, 2**41)), 2**41, "")
    assert [index.levels[0].byte_range(k) for k in range(9)] == [
        (place, place + k + 1) for k, place in enumerate(places)
    ]


@pytest.mark.parametrize(
    ("size", "mpp", "says"),
    [
        ("0 5", "0.5 0.5", "over 0 x 5 px"),
        ("9 -5", "0.5 0.5", "over 9 x -5 px"),
        ("9 5", "nan 0.5", "nan"),
        ("9 5", "0.5 inf", "inf"),
        ("9", "0.5 0.5", "not enough values"),
        ("9" * 5000 + " 5", "0.5 0.5", "4300"),
    ],
)
def test_a_mask_over_no_slide_is_told(tmp_path, size: str, mpp: str, says: str) -> None:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("size_px0", size)
    info.add_text("mpp_px0", mpp)
    Image.new("1", (9, 5)).save(tmp_path / "m.png", pnginfo=info)
    with pytest.raises(errors.MaskError, match=says):
        ForegroundMask.load(tmp_path / "m.png")


def test_a_mask_file_larger_than_any_mask_is_not_read(tmp_path) -> None:
    with (tmp_path / "m.png").open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(errors.MaskError, match="more than 16,777,216 bytes"):
        ForegroundMask.load(tmp_path / "m.png")


def test_what_other_readers_say_in_several_lines_is_told_in_one(tmp_path, monkeypatch) -> None:
    from online_patching.formats import fallback, region_pool

    def describe(self: object, uri: str, reader: str, *_: object) -> dict:
        raise errors.DamagedSlideError(uri, f"{reader} says:\n# {uri}\nis odd")

    monkeypatch.setattr(region_pool.RegionWorker, "describe", describe)
    with pytest.raises(errors.NotASlideError, match=r"openslide says: # a\.svs is odd") as caught:
        fallback.read_index(str(tmp_path / "a.svs"), "a", None)
    assert "\n" not in str(caught.value)
