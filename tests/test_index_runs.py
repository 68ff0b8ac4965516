"""Indexing many slides: what is done stays done, whatever ends a run; slides are added, changed, named."""

from __future__ import annotations

import csv
import gc
import hashlib
import json
import os
import re
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

from online_patching import Corpus, SlideIndex, stores
from online_patching.errors import CODES, StoreUnavailableError
from online_patching.stores.listing import Listed
from online_patching.testing import SyntheticSlide, write_tiff
from online_patching.testing.dicom import write_dicom
from pathfm.cli import main
from pathfm.cohorts import CohortRow, index_row
from pathfm.index import IndexConfig, IndexResult, run
from pathfm.index.naming import slide_ids
from pathfm.index.tables import SLIDE_COLUMNS, facts_of
from pathfm.runtime import PathfmError
from tests.servers import FaultServer

N = 12
PLAIN: dict[str, Any] = {"cohort": {"fingerprints": False}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return write_tiff(folder / "x.svs", SyntheticSlide(1, 400, 300, mpp=0.2531))


@pytest.fixture
def slides(source: Path, tmp_path: Path) -> Path:
    """s00.svs to s11.svs, and two that are no use."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(N):
        shutil.copy(source, folder / f"s{number:02d}.svs")
    (folder / "cut.svs").write_bytes(source.read_bytes()[:2000])
    (folder / "text.svs").write_text("no slide")
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the headers of each slide are read, by name."""
    seen: Counter[str] = Counter()

    def one(row: CohortRow, *more: Any, **others: Any) -> Any:
        seen[Path(row.uri).name] += 1
        return index_row(row, *more, **others)

    monkeypatch.setattr("pathfm.index.reading.index_row", one)
    return seen


def index(source: Path | str, out: Path, **more: Any) -> IndexResult:
    return run(IndexConfig(slides=(str(source),), out=out, **{**PLAIN, **more}))


def rows(path: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def content(out: Path) -> dict[str, bytes]:
    """Everything that a corpus folder holds, but when it was made and the config's comment."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "index.yaml"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


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


def test_two_runs_at_a_time_are_refused(slides, tmp_path):
    from pathfm.index.journal import opened

    index(slides, tmp_path / "c")
    with opened(tmp_path / "c"), pytest.raises(PathfmError, match="another `pathfm index`"):
        index(slides, tmp_path / "c")


# --- appending ---


def test_appending_adds_slides_and_touches_no_other(slides, source, tmp_path, read):
    out, more = tmp_path / "c", tmp_path / "more"
    index(slides, out)
    kept = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (out / "slides").iterdir()}
    read.clear()
    shutil.rmtree(slides)  # what is there is not asked for again
    more.mkdir()
    for name in ("new.svs", "s00.svs"):
        shutil.copy(source, more / name)
    (out / "corpus.json").write_text("{}")
    result = index(more, out, append=True)
    assert (result.slides, read) == (N + 2, {"new.svs": 1, "s00.svs": 1})
    now = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (out / "slides").iterdir()}
    assert {name: now[name] for name in kept} == kept
    ids = [row["slide_id"] for row in rows(out / "slides.csv")]
    short = hashlib.sha256(str(more / "s00.svs").encode()).hexdigest()[:8]
    assert ids == [*(f"s{k:02d}" for k in range(N)), "new", f"s00-{short}"]
    assert {Path(row["uri"]).name for row in rows(out / "skipped.csv")} == {"cut.svs", "text.svs"}
    assert not (out / "corpus.json").exists()
    assert index(more, out, append=True).slides == N + 2  # once more: nothing to do
    assert sum(read.values()) == 2
    assert index(more, out).slides == 2  # without: the folder is what was asked for
    assert {p.name for p in (out / "slides").iterdir()} == {"new.index", "s00.index"}


def test_appending_to_a_killed_run_s_folder_or_to_a_stranger_s(slides, source, tmp_path):
    out = tmp_path / "c"
    (out / "slides").mkdir(parents=True)
    (out / "slides" / "old.index").write_bytes(b"?")
    with pytest.raises(PathfmError, match="no journal that tells of them"):
        index(slides, out, append=True)
    (out / "slides" / "old.index").unlink()
    assert index(slides, out, append=True).slides == N
    (out / "slides" / "s00.index").unlink()  # its row is there: it is made again
    table = slides / "one.csv"
    table.write_text("uri,label\ns01.svs,x\n")
    assert index(table, out, append=True).slides == N
    assert (out / "slides" / "s00.index").exists()
    with pytest.raises(PathfmError, match=r"text\.svs"):
        index(slides / "text.svs", out, append=True)
    assert len(rows(out / "slides.csv")) == N


@pytest.mark.parametrize("damage", ["cut", "nonsense"])
def test_a_damaged_journal_is_not_appended_to(damage, slides, source, tmp_path):
    out = tmp_path / "c"
    index(slides, out)
    lines = (out / "index.journal").read_bytes().splitlines(keepends=True)
    lines = lines[:-2] if damage == "cut" else [*lines[:-1], b"?" * 9 + b"\n"]
    (out / "index.journal").write_bytes(b"".join(lines))
    before = content(out)
    with pytest.raises(PathfmError, match="its journal has lost"):
        index(source, out, append=True)
    assert content(out) == before
    assert index(slides, out).slides == N


# --- names ---


def test_a_name_that_several_slides_share_is_given_to_none_of_them():
    uris = ["/b/1/a.svs", "/b/2/a.svs", "/b/2/B.tif", "/b/1/b.svs", "/b/alone.svs"]
    hashes = [hashlib.sha256(uri.encode()).hexdigest()[:8] for uri in uris]
    wanted = [f"a-{hashes[0]}", f"a-{hashes[1]}", f"B-{hashes[2]}", f"b-{hashes[3]}", "alone"]
    assert slide_ids(uris, uris) == wanted
    assert slide_ids(uris[::-1], uris[::-1]) == wanted[::-1]
    assert slide_ids(["/x/alone.svs"], ["/x/alone.svs"], taken=["Alone"])[0].startswith("alone-")


def test_a_picture_does_not_take_its_slide_s_name_and_long_names_are_cut():
    ids = slide_ids(["/a.jpg", "/a.svs", "/only.png"], ["/a.jpg", "/a.svs", "/only.png"])
    assert (ids[1], ids[2], ids[0][:2]) == ("a", "only", "a-")
    long = [f"/{letter}/{'é' * 119}.svs" for letter in "xy"]
    ids = slide_ids(long, long)
    assert len(set(ids)) == 2
    assert all(len(name.encode()) < 200 for name in ids)
    clash = hashlib.sha256(b"/1/a.svs").hexdigest()
    uris = ["/1/a.svs", "/2/a.svs", f"/3/a-{clash[:8]}.svs"]
    assert slide_ids(uris, uris)[0] == f"a-{clash[:16]}"


@pytest.mark.slow
def test_equal_names_in_many_folders_are_indexed_masked_and_packed(source, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        shutil.copy(source, tmp_path / "in" / folder / "slide.svs")
    out = tmp_path / "c"
    assert index(tmp_path / "in", out).slides == 2
    ids = [row["slide_id"] for row in rows(out / "slides.csv")]
    assert main(["foreground", str(out), "--method", "otsu", "--smallest_mm2", "0"]) == 0
    assert Corpus.open(out).slide_ids == sorted(ids)
    assert {Corpus.open(out).uri(row) for row in range(2)} == {
        str(tmp_path / "in" / name / "slide.svs") for name in ("one", "two")
    }


def test_addresses_that_differ_in_their_query_alone_are_one_slide(
    source, tmp_path, fault_server: FaultServer
):
    shutil.copy(source, fault_server.root / "a.svs")
    table = tmp_path / "t.csv"
    table.write_text(f"uri\n{fault_server.url}/a.svs?k=1\n{fault_server.url}/a.svs?k=2\n")
    result = index(table, tmp_path / "c")
    assert (result.slides, result.skipped) == (1, {"duplicate": 1})


# --- tables ---


def test_parquet_and_csv_hold_the_same_rows_and_columns_have_units(slides, tmp_path):
    table = slides / "cohort.csv"
    names = [f"s{k:02d}.svs" for k in range(N)] + ["cut.svs"]
    table.write_text("uri,label,mpp_x,mpp_y\n" + "".join(f"{n},L,0.5,0.75\n" for n in names))
    out = tmp_path / "c"
    index(table, out)
    parquet = pq.read_table(out / "slides.parquet")
    assert parquet.column_names == [column.name for column in SLIDE_COLUMNS]
    for column in SLIDE_COLUMNS:
        about = parquet.schema.field(column.name).metadata
        assert about[b"unit"].decode() == column.unit
        assert about[b"description"]
    told = parquet.to_pylist()
    assert {row["label"] for row in told} == {"L"}
    assert {(row["mpp_x"], row["mpp_y"], row["mpp_source"]) for row in told} == {
        (0.5, 0.75, "override table")
    }
    saved = SlideIndex.load(out / "slides" / "s00.index")
    assert (told[0]["width_px"], told[0]["height_px"]) == saved.dimensions == (400, 300)
    assert (told[0]["tiles"], told[0]["digest"]) == (saved.n_tiles, saved.digest)
    as_text = [{k: "" if v is None else f"{v}" for k, v in row.items()} for row in told]
    assert rows(out / "slides.csv") == as_text
    refused = pq.read_table(out / "skipped.parquet").to_pylist()
    assert [(Path(r["uri"]).name, r["code"]) for r in refused] == [("cut.svs", "truncated")]
    assert rows(out / "skipped.csv") == refused
    assert refused[0]["code"] in CODES


def test_a_table_half_written_is_never_seen(slides, tmp_path, monkeypatch):
    out = tmp_path / "c"
    index(slides, out)
    before = (out / "slides.parquet").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    (slides / "s00.svs").unlink()
    monkeypatch.setattr("pathfm.index.tables._onto_disk", full)
    assert main(["index", str(slides), "--out", str(out)]) == 2
    assert (out / "slides.parquet").read_bytes() == before
    assert not list(out.glob(".*.tmp"))


def test_names_that_are_no_text_are_written_as_escapes(source, tmp_path):
    name = os.fsdecode(b"in/n\xe9.svs")
    (tmp_path / "in").mkdir()
    shutil.copy(source, tmp_path / name)
    result = index(tmp_path / "in", tmp_path / "c")
    assert result.slides == 1
    assert rows(tmp_path / "c" / "slides.csv")[0]["uri"].endswith("n\\udce9.svs")
    assert index(tmp_path / "in", tmp_path / "c").reused == 1


def test_what_is_printed_is_bounded_and_refusals_are_counted_by_code(slides, tmp_path, capsys):
    words = ["index", str(slides), "--out", str(tmp_path / "c"), "--show", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "s00" in out
    assert "s01" not in out
    assert f"... and {N - 1} more: {tmp_path / 'c' / 'slides'}.parquet" in out
    assert "2 not used: truncated 1, not_a_slide 1" in out


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


# --- reason codes ---


def test_every_code_that_an_error_can_have_is_in_the_table_of_the_docs():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "indexing.md").read_text()
    for code, means in CODES.items():
        assert f"| `{code}` | {means} |" in page
    given = set()
    for path in (root / "online_patching").rglob("*.py"):
        given |= {json.loads(word) for word in _codes_in(path.read_text())}
    assert given <= set(CODES)


def _codes_in(text: str) -> list[str]:
    return re.findall(r"\bcode=(\"[a-z_]+\")", text) + re.findall(
        r"^    code = (\"[a-z_]+\")", text, re.MULTILINE
    )
