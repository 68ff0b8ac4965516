"""Indexing many slides: what is done stays done, whatever ends a run; many at a time, few in memory."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from online_patching import SlideIndex, stores
from online_patching.errors import StoreUnavailableError
from online_patching.stores.listing import Listed
from online_patching.testing.dicom import write_dicom
from pathfm.cli import main
from pathfm.cohorts import CohortRow, index_row
from pathfm.index.tables import facts_of
from pathfm.runtime import PathfmError
from tests.indexing import N, content, count_reads, index, many_slides, rows, small_slide
from tests.servers import FaultServer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_slide(tmp_path_factory.mktemp("source"))


@pytest.fixture
def slides(source: Path, tmp_path: Path) -> Path:
    return many_slides(source, tmp_path / "in")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return count_reads(monkeypatch)


# --- what is done stays done ---


def test_a_rerun_reads_nothing_again_neither_slides_nor_refusals(slides, tmp_path, read):
    first = index(slides, tmp_path / "c")
    assert (first.slides, first.reused, sum(first.skipped.values())) == (N, 0, 2)
    assert sum(read.values()) == N + 2
    before = content(tmp_path / "c")
    again = index(slides, tmp_path / "c")
    assert sum(read.values()) == N + 2
    assert (again.slides, again.reused, again.skipped) == (N, N, first.skipped)
    assert content(tmp_path / "c") == before
    index(slides, tmp_path / "c", anew=True)
    assert sum(read.values()) == 2 * (N + 2)


KILLS = {
    "before a slide is saved": "pathfm.index.folder.Folder.save",
    "between a slide and its line": "pathfm.index.journal.Journal.add",
    "before others are removed": "pathfm.index.folder.Folder.keep_only",
    "while the journal is replaced": "pathfm.index.journal.Journal.commit",
    "while tables are replaced": "pathfm.index.tables._onto_disk",
    "when all but the mark is done": "pathfm.index.save_config",
}
KILLED = """
import os, signal, sys
import pathfm.index, pathfm.index.finishing, pathfm.index.reading
from importlib import import_module
path, at, *words = sys.argv[1:]
module, *names = path.split(".")
owner = import_module(module)
for name in names[:-1]:
    owner = getattr(owner, name)
true_one, calls = getattr(owner, names[-1]), []
def dies(*more, **others):
    calls.append(1)
    if len(calls) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return true_one(*more, **others)
setattr(owner, names[-1], dies)
from pathfm.cli import main
sys.exit(main(words))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", KILLS)
def test_after_kill_9_the_same_command_ends_where_an_undisturbed_run_does(
    where, slides, tmp_path, read
):
    out, undisturbed = tmp_path / "c", tmp_path / "undisturbed"
    index(slides, undisturbed)
    read.clear()
    at = 7 if where in ("before a slide is saved", "between a slide and its line") else 1
    words = ["index", slides, "--out", out, "--cohort.fingerprints", "false", "--threads", "2"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, KILLS[where], str(at), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (out / "index.unfinished").exists()
    assert main(["foreground", str(out)]) == 2
    result = index(slides, out)
    assert (result.slides, result.reused) == (N, N if at == 1 else result.reused)
    assert sum(read.values()) <= (N + 2 - (at - 1) if at > 1 else 0)
    assert not (out / "index.unfinished").exists()
    names = ("slides.csv", "skipped.csv", "slides.parquet", "skipped.parquet", "index.journal")
    told = content(out)
    assert {name: told[name] for name in names} == {
        name: content(undisturbed)[name] for name in names
    }
    assert set(told) == set(content(undisturbed))


def test_a_line_cut_short_by_a_kill_is_forgotten(slides, tmp_path, read):
    out = tmp_path / "c"
    index(slides, out)
    read.clear()
    journal = out / "index.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:6]) + lines[6][:40])
    result = index(slides, out)
    assert (result.slides, result.reused) == (N, 4)  # of the first five slides one is cut.svs
    assert sum(read.values()) == N + 2 - 5
    assert len(journal.read_bytes().splitlines()) == 1 + N + 2


def test_a_journal_full_of_nonsense_is_made_anew(slides, tmp_path, read):
    out = tmp_path / "c"
    index(slides, out)
    good = (out / "index.journal").read_bytes()
    head, *lines = good.splitlines(keepends=True)
    lines[3] = b"\xff\xfe not JSON\n"
    lines[4] = b'{"uri": 5, "slide_id": "s02", "told": "x"}\n'
    lines[5] = b"[1, 2]\n"
    (out / "index.journal").write_bytes(head + b"".join(lines))
    read.clear()
    assert index(slides, out).slides == N
    assert sum(read.values()) == 3
    assert (out / "index.journal").read_bytes() == good
    (out / "index.journal").write_bytes(b"\0" * 100)
    assert (index(slides, out).reused, (out / "index.journal").read_bytes()) == (0, good)


def test_a_replaced_index_whose_line_was_never_written_is_not_trusted(
    slides, tmp_path, read, monkeypatch
):
    """s00 is read at another µm/px, saved, and the run dies: then the old µm/px is asked for again."""
    out, table = tmp_path / "c", tmp_path / "mpp.csv"
    table.write_text("file,mpp\ns00.svs,0.5\n")
    index(slides, out)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pathfm.index.journal.Journal.add", dies)
    with pytest.raises(KeyboardInterrupt):
        index(slides, out, mpp_overrides=table)
    monkeypatch.undo()
    assert SlideIndex.load(out / "slides" / "s00.index").mpp == 0.5
    assert index(slides, out).slides == N
    assert SlideIndex.load(out / "slides" / "s00.index").mpp == pytest.approx(0.2531)


def test_a_slide_that_changed_and_an_index_that_is_gone_are_made_anew(slides, tmp_path, read):
    out = tmp_path / "c"
    index(slides, out)
    read.clear()
    os.utime(slides / "s03.svs", ns=(1, 1))
    (out / "slides" / "s04.index").unlink()
    (out / "slides" / "s05.index").write_bytes(b"short")
    assert index(slides, out).reused == N - 3
    assert read == {"s03.svs": 1, "s04.svs": 1, "s05.svs": 1}
    assert SlideIndex.load(out / "slides" / "s03.index").token.endswith("-1")


def test_of_a_slide_of_several_objects_each_is_looked_at(tmp_path, read):
    picture = np.random.default_rng(1).integers(0, 256, (100, 130, 3), np.uint8)
    for name in ("one", "two"):
        write_dicom(tmp_path / "in" / name, [picture, picture[::2, ::2]])
    index(tmp_path / "in", tmp_path / "c")
    told = pq.read_table(tmp_path / "c" / "slides.parquet").to_pylist()
    assert [(row["slide_id"], row["container"], row["objects"]) for row in told] == [
        ("one", "dicom", 2),
        ("two", "dicom", 2),
    ]
    os.utime(tmp_path / "in" / "two" / "level-1.dcm", ns=(1, 1))
    read.clear()
    assert index(tmp_path / "in", tmp_path / "c").reused == 1
    assert read == {"two": 1}


def test_what_a_store_refused_is_tried_again(slides, tmp_path, monkeypatch, read):
    def away(row: CohortRow, *more: Any, **others: Any) -> Any:
        if row.uri.endswith("s07.svs"):
            raise StoreUnavailableError(row.uri, "failed 3 times.")
        if row.uri.endswith("s08.svs"):
            raise ZeroDivisionError("one of ours")
        return index_row(row, *more, **others)

    with monkeypatch.context() as patched:
        patched.setattr("pathfm.index.reading.index_row", away)
        first = index(slides, tmp_path / "c")
    assert first.skipped == {"truncated": 1, "not_a_slide": 1, "unavailable": 1, "error": 1}
    told = {Path(row["uri"]).name: row for row in rows(tmp_path / "c" / "skipped.csv")}
    assert told["s07.svs"]["reason"] == "failed 3 times."
    assert "ZeroDivisionError: one of ours" in told["s08.svs"]["reason"]
    assert index(slides, tmp_path / "c").slides == N
    assert read == {"s07.svs": 1, "s08.svs": 1}


def test_nothing_usable_leaves_a_corpus_as_it_was(slides, tmp_path):
    out = tmp_path / "c"
    index(slides, out)
    before = content(out)
    with pytest.raises(PathfmError, match="no reader opens it"):
        index(slides / "text.svs", out)
    assert content(out) == before


def test_a_mark_that_went_with_another_run_is_no_lock(slides, tmp_path, monkeypatch):
    out = tmp_path / "c"
    lock = fcntl.flock

    def late(file, how):  # the other run ends between our opening of its mark and the lock
        (out / "index.unfinished").unlink()
        (out / "index.unfinished").touch()
        lock(file, how)

    monkeypatch.setattr("pathfm.index.journal.fcntl.flock", late)
    with pytest.raises(PathfmError, match="another `pathfm index` is writing there"):
        index(slides, out)


def test_two_runs_at_a_time_are_refused(slides, tmp_path):
    from pathfm.index.journal import opened

    index(slides, tmp_path / "c")
    with opened(tmp_path / "c"), pytest.raises(PathfmError, match="another `pathfm index`"):
        index(slides, tmp_path / "c")


# --- many at a time ---


def test_slides_are_read_at_the_same_time_through_one_set_of_clients(
    source, tmp_path, fault_server: FaultServer, monkeypatch
):
    made = []

    class Counted(stores.Stores):
        def __init__(self, *more: Any) -> None:
            made.append(1)
            super().__init__(*more)

    monkeypatch.setattr(stores, "Stores", Counted)
    for number in range(N):
        shutil.copy(source, fault_server.root / f"s{number}.svs")
    table = tmp_path / "t.csv"
    table.write_text("uri\n" + "".join(f"{fault_server.url}/s{k}.svs\n" for k in range(N)))
    together: list[int] = []
    running: set[str] = set()

    def one(row: CohortRow, *more: Any, **others: Any) -> Any:
        running.add(row.uri)
        together.append(len(running))
        try:
            return index_row(row, *more, **others)
        finally:
            running.discard(row.uri)

    monkeypatch.setattr("pathfm.index.reading.index_row", one)
    assert index(table, tmp_path / "c", threads=6).slides == N
    assert 2 <= max(together) <= 6
    assert len(made) == 1


def test_no_more_indexes_are_held_than_slides_are_read_at_a_time(slides, tmp_path, monkeypatch):
    alive: list[int] = []
    counting = threading.Lock()

    def facts(of: SlideIndex) -> dict[str, Any]:
        with counting:  # a list of all objects holds them while another thread counts
            gc.collect()
            alive.append(sum(type(thing) is SlideIndex for thing in gc.get_objects()))
        return facts_of(of)

    monkeypatch.setattr("pathfm.index.reading.facts_of", facts)
    gc.collect()
    gc.freeze()  # what was there before is not looked at
    try:
        index(slides, tmp_path / "c", threads=2)
    finally:
        gc.unfreeze()
    assert len(alive) == N
    assert max(alive) <= 2 * 3  # as read, named, and with its id: of each thread's slide


def test_known_slides_of_a_bucket_cost_one_listing(source, tmp_path, monkeypatch, read):
    import fsspec

    bucket = fsspec.filesystem("memory")
    for number in range(40):
        bucket.pipe(f"/listed/{number % 4}/s{number:02d}.svs", source.read_bytes())
    table = tmp_path / "t.csv"
    names = [f"memory://listed/{number % 4}/s{number:02d}.svs" for number in range(40)]
    table.write_text("uri\n" + "\n".join(names) + "\n")
    assert index(table, tmp_path / "c").slides == 40
    asked: list[str] = []
    listings: list[str] = []
    true_one = stores.Stores.version

    def listing(self: stores.Stores, prefix: str) -> list[Listed]:
        listings.append(prefix)
        return [Listed(uri, *true_one(self, uri)) for uri in sorted(names)]

    def version(self: stores.Stores, uri: str) -> tuple[int, str]:
        asked.append(uri)
        return true_one(self, uri)

    bucket.pipe("/listed/0/s00.svs", source.read_bytes())  # another version of it
    monkeypatch.setattr(stores.Stores, "version", version)
    monkeypatch.setattr(stores.Stores, "list", listing)
    read.clear()
    assert index(table, tmp_path / "c").reused == 39
    assert listings == ["memory://listed"]
    assert read == {"s00.svs": 1}
    assert {uri for uri in asked if uri.startswith("memory")} <= {names[0]}
