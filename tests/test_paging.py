from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from online_patching.bitmaps import nobody
from online_patching.corpus import TileRows, paging
from online_patching.corpus.paging import MappedFile, Paging

U8 = np.dtype("<u8")


@pytest.fixture
def file(tmp_path: Path) -> MappedFile:
    """100 pages and a bit of another."""
    data = np.arange(100 * 512 + 5, dtype="<u8")
    (tmp_path / "x.bin").write_bytes(data.tobytes())
    return MappedFile(tmp_path / "x.bin", U8, data.nbytes, 4096)


class Recorder:
    """Stands where the mmap is."""

    def __init__(self, size: int) -> None:
        self.size, self.asked = size, []

    def __len__(self) -> int:
        return self.size

    def madvise(self, advice: int, at: int, length: int) -> None:
        assert at % 4096 == 0
        assert 0 <= at < self.size
        assert 0 < length <= self.size - at
        self.asked.append((at // 4096, -(-length // 4096)))


def test_pages_are_asked_for_once_and_only_those_that_hold_the_bytes(file):
    file._mapped = recorder = Recorder(file.array.nbytes)
    file.ask(np.array([8192, 8200, 4095, 0, 409_600]), np.array([8, 16, 2, 4096, 40]))
    assert sorted(recorder.asked) == [(0, 1), (0, 2), (2, 1), (100, 1)]


def test_ranges_that_lie_nowhere_are_harmless(file):
    """A damaged record may name any: it is refused later, where it is looked at."""
    file._mapped = Recorder(file.array.nbytes)
    wild = np.array([-1, -(2**63), 2**63 - 1, 2**62, 10**6, 5, 409_600])
    for n_bytes in (0, 8, -5, 2**62, 2**63 - 1):
        file.ask(wild, np.int64(n_bytes))
    file.ask(np.empty(0, np.int64), 8)


def test_what_is_read_is_the_same_after_asking(file):
    before = file.array.copy()
    file.ask(np.arange(0, 400_000, 8192), 8)
    assert (file.array == before).all()
    assert not file.array.flags.writeable


@pytest.mark.parametrize("kind", ["empty", "short", "odd"])
def test_a_file_of_another_size_is_refused_and_an_empty_one_is_not(tmp_path, kind):
    path = tmp_path / "x.bin"
    path.write_bytes({"empty": b"", "short": bytes(8), "odd": bytes(12)}[kind])
    if kind == "empty":
        empty = MappedFile(path, U8, 0, 4096)
        empty.ask(np.array([0]), 8)
        assert empty.array.shape == (0,)
    else:
        with pytest.raises(ValueError, match="as large as"):
            MappedFile(path, U8, {"short": 16, "odd": 12}[kind], 4096)


def test_it_asks_while_look_ups_would_wait_and_then_stops(file, monkeypatch):
    faults = 0
    monkeypatch.setattr(paging, "_major_faults", lambda: faults)
    found = Paging([file])
    asked = []
    for call in range(1, 400):
        cold = call < 150 or call > 300
        asked.append(found.pays(256))
        faults += (90 if cold else 3) if not asked[-1] else 0  # what is asked for is not waited for
    assert sum(asked[:64]) == 63  # all but the probe
    assert all(asked[64:127])
    assert not any(asked[192:300])
    assert all(asked[301:319])
    assert not Paging([]).pays(256)


@pytest.mark.parametrize("above", [0, 2**40])
def test_a_large_file_is_mapped_anew_now_and_then_and_a_small_one_stays(
    file, monkeypatch, above, tmp_path
):
    monkeypatch.setattr(paging, "REMAP_ABOVE_BYTES", above)
    first, (path,) = file.view(), tmp_path.iterdir()
    path.unlink()
    file.will_look(paging.REMAP_AFTER_RANGES)
    assert file.view() is first
    file.will_look(1)
    later = file.view()
    assert (later is first) == (above > 0)
    assert later.tolist() == first.tolist()  # the older mapping lives while somebody uses it
    assert file.view() is later


def test_handles_are_closed_with_the_file(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(8))
    gc.collect()  # what other tests left
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for _ in range(5):
        MappedFile(tmp_path / "x.bin", U8, 8, 4096).view()
    gc.collect()
    assert not before or len(list(Path("/proc/self/fd").iterdir())) == before


def test_tile_rows_are_an_array_that_says_what_it_will_look_at():
    rows, seen = np.arange(50, dtype=np.uint64), []
    tiles = TileRows(lambda: rows, lambda start, n_bytes: seen.append((start.tolist(), n_bytes)))
    assert (tiles[np.array([[3, 4], [9, 9]])] == rows[[[3, 4], [9, 9]]]).all()
    assert seen == [([24, 32, 72, 72], 8)]
    assert (tiles[3:5] == rows[3:5]).all()
    assert tiles[7] == 7
    assert len(tiles) == 50
    assert len(seen) == 1
    nobody(np.zeros(1, np.int64), 1)
