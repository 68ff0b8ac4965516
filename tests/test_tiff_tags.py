"""Our tags against tifffile's, on every TIFF at hand and on some that scanners would not write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from online_patching.formats import tiff_tags
from online_patching.formats.tiff_tags import BadTagError, Directory, PastEndError, TiffTags
from online_patching.testing import SyntheticSlide, write_tiff
from online_patching.testing.hostile_seeds import tiff_seeds
from online_patching.testing.raw_tiff import RawImage, ascii_text, build_tiff, longs, shorts

SEEDS = {seed.name: seed.data for seed in tiff_seeds()}
INTEGERS = {1, 3, 4, 13, 16, 18}


def opened(data: bytes, requests: list | None = None) -> TiffTags:
    def fetch(start: int, stop: int) -> bytes:
        if requests is not None:
            requests.append((start, stop))
        assert 0 <= start < stop <= len(data)
        return data[start:stop]

    return TiffTags(fetch, len(data))


def assert_same_tags(ours: Directory, theirs: tifffile.TiffPage) -> int:
    """Every tag that both know: numbers, texts, rationals, blobs and tables. Returns how many."""
    compared = 0
    for tag in theirs.tags:
        entry = ours.entries[tag.code]
        assert (entry.kind, entry.count) == (int(tag.dtype), tag.count), tag.name
        value = tag.value
        if int(tag.dtype) in INTEGERS and tag.code not in (320, 700, 33723, 34675):
            many = value if isinstance(value, tuple) else (value,)
            if isinstance(value, bytes):
                many = tuple(value)
            assert ours.numbers(tag.code, tag.count) == tuple(int(v) for v in many), tag.name
            table = np.concatenate(list(ours.table(tag.code)))
            assert table.tolist() == [int(v) for v in many]
        elif int(tag.dtype) == 5 and tag.count == 1:
            assert ours.rational(tag.code) == value
        elif int(tag.dtype) == 2 and isinstance(value, str):
            assert ours.text(tag.code, 2**20).strip() == value.strip()
        elif int(tag.dtype) == 7 and isinstance(value, bytes):
            assert ours.blob(tag.code, 2**20) == value
        else:
            continue
        compared += 1
    assert {tag.code for tag in theirs.tags} <= set(ours.entries)
    return compared


def compare(path: Path) -> None:
    ours = opened(path.read_bytes())
    with tifffile.TiffFile(path) as theirs:
        assert ours.big == theirs.is_bigtiff
        assert len(ours.directories) == len(theirs.pages)
        for mine, page in zip(ours.directories, theirs.pages, strict=True):
            assert assert_same_tags(mine, page.aspage()) >= 5
            below = [] if page.aspage().pages is None else list(page.aspage().pages)
            mine_below = ours.sub_directories(mine, 64)
            assert len(mine_below) == len(below)
            for sub, other in zip(mine_below, below, strict=True):
                assert assert_same_tags(sub, other.aspage()) >= 5


def test_every_real_tiff_has_tifffiles_tags(shared_data):
    found = [
        path
        for pattern in ("*.svs", "*.tif", "*.tiff", "*.qptiff")
        for path in sorted((shared_data / "wsi").rglob(pattern))
    ]
    assert len(found) >= 16
    for path in found:
        compare(path)


@pytest.mark.parametrize("name", SEEDS)
def test_hand_built_files_have_tifffiles_tags(name, tmp_path):
    (tmp_path / "a.tif").write_bytes(SEEDS[name])
    compare(tmp_path / "a.tif")


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("flavour", ["aperio", "generic"])
def test_synthetic_slides_have_tifffiles_tags(tmp_path, flavour, bigtiff):
    slide = SyntheticSlide(3, 700, 500)
    compare(write_tiff(tmp_path / "a.tif", slide, tile_px=64, downsamples=(2.5,), associated=True,
                       flavour=flavour, bigtiff=bigtiff))  # fmt: skip


def image(tags: dict) -> RawImage:
    return RawImage((70, 40), [b"x"] * 9, (32, 16), tags=tags)


def test_a_table_is_read_in_parts(monkeypatch):
    monkeypatch.setattr(tiff_tags, "_ROWS_A_READ", 4)
    values = tuple(range(7, 7 + 11))
    directory = opened(build_tiff([image({700: longs(*values)})])).directories[0]
    parts = list(directory.table(700))
    assert [len(part) for part in parts] == [4, 4, 3]
    assert np.concatenate(parts).tolist() == list(values)


def test_what_is_absent_is_the_default_and_what_is_of_another_type_is_told():
    directory = opened(build_tiff([image({700: (12, (1.5,)), 701: shorts(3)})])).directories[0]
    assert (directory.number(702, 9), directory.numbers(702, 4)) == (9, ())
    assert (directory.text(702, 10), directory.rational(702), directory.count(702)) == ("", None, 0)
    assert directory.rational(701) is None
    with pytest.raises(BadTagError, match="tag 700 is of type 12, not an integer"):
        directory.number(700)
    with pytest.raises(BadTagError, match="tag 701 is of type 3, not bytes"):
        directory.blob(701, 10)


def test_texts_end_at_their_nul_and_need_not_be_utf8():
    texts = {
        700: (2, b"abc\0def\0"),
        701: (2, "µm".encode()),
        702: (2, b"\xb5m"),
        703: ascii_text(""),
    }
    directory = opened(build_tiff([image(texts)])).directories[0]
    assert [directory.text(code, 9) for code in texts] == ["abc", "µm", "µm", ""]
    with pytest.raises(BadTagError, match="holds 8 bytes, more than 7"):
        directory.text(700, 7)


def test_types_nobody_knows_are_skipped():
    data = build_tiff([image({700: longs(5)})])
    spot = data.index((700).to_bytes(2, "little") + b"\4\0")
    assert 700 not in opened(data[: spot + 2] + b"\x63\0" + data[spot + 4 :]).directories[0]


@pytest.mark.parametrize(
    "data", [b"", b"II", b"MM\0\x2b\0\7\0\0" + bytes(8), b"PK\3\4" + bytes(20), b"II*\1" + bytes(9)]
)
def test_what_is_no_tiff_is_told(data):
    with pytest.raises(BadTagError, match=r"does not start|not of 8 bytes"):
        TiffTags(lambda a, b: data[a:b], len(data))


def test_of_two_tags_of_one_number_the_first_counts():
    data = build_tiff([image({700: longs(5), 701: longs(6)})])
    twice = data.replace(b"\xbd\x02\4\0", b"\xbc\x02\4\0")
    assert opened(data).directories[0].number(701) == 6
    assert opened(twice).directories[0].number(700) == 5
    assert 701 not in opened(twice).directories[0]


def test_a_file_without_directories_has_none():
    assert opened(b"II*\0" + bytes(4)).directories == []


@pytest.mark.parametrize("name", ["aperio <", "ome big >"])
def test_a_cut_anywhere_is_past_the_end_or_shows_every_directory(name):
    data = SEEDS[name]
    count = len(opened(data).directories)
    past = [keep for keep in range(16, len(data)) if not shows_all(data[:keep], count)]
    assert len(past) > len(data) // 2
    assert max(past) == len(data) - 1


def shows_all(data: bytes, count: int) -> bool:
    try:
        return len(opened(data).directories) == count or pytest.fail("a directory went missing")
    except PastEndError:
        return False


def test_neighbours_come_in_one_request_and_nothing_is_asked_twice():
    long = tuple(range(100_000))  # 400 KB: seven blocks
    data = build_tiff([image({700: longs(*long), 701: (7, bytes(200_000))}), image({})])
    requests: list = []
    tags = opened(data, requests)
    for _ in range(3):
        assert tags.directories[0].numbers(700, 100_000) == long
        assert tags.directories[0].blob(701, 200_000) == bytes(200_000)
    assert len(requests) <= 6  # two directories apart from their values, two long values
    assert tags.reader.requests == len(requests)
    assert tags.reader.bytes_fetched == sum(stop - start for start, stop in requests)
    assert tags.reader.bytes_fetched < 1.5 * len(data)
