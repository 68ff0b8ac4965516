"""What an index run makes of a corpus folder: slides added, names, tables, reason codes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from online_patching import Corpus, SlideIndex
from online_patching.errors import CODES
from pathfm.cli import main
from pathfm.index.naming import slide_ids
from pathfm.index.tables import SLIDE_COLUMNS
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
    with pytest.raises(PathfmError, match="holds 1 indexes of other slides"):
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


def test_a_killed_run_that_appended_to_nothing_goes_on_with_the_same_command(
    slides, tmp_path, read
):
    out = tmp_path / "c"
    index(slides, out, append=True)
    journal = out / "index.journal"
    head, *lines = journal.read_bytes().splitlines(keepends=True)
    head = head.replace(f'"committed":{len(lines)}'.encode(), b'"committed":0')
    journal.write_bytes(
        head + b"".join(lines[:5])
    )  # as kill -9 leaves it; 4 slides and a refusal are done
    (out / "index.unfinished").touch()
    read.clear()
    other = slides / "s00.svs"
    with pytest.raises(PathfmError, match="of a run that has not finished"):
        index(other, out, append=True)
    result = index(slides, out, append=True)
    assert (result.slides, result.reused, sum(read.values())) == (N, 4, N + 2 - 5)


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


def test_slides_that_a_corpus_loses_are_named(slides, tmp_path, capsys):
    words = ["index", str(slides), "--out", str(tmp_path / "c")]
    assert main([*words, "--cohort.exclude", "s00"]) == 0
    assert "not in it any more" not in capsys.readouterr().out
    assert main([*words, "--cohort.exclude", "s01"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "note: 1 of the slides that this corpus had are not in it any more (s01): if" in told


def test_what_is_printed_is_bounded_and_refusals_are_counted_by_code(slides, tmp_path, capsys):
    words = ["index", str(slides), "--out", str(tmp_path / "c"), "--show", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "s00" in out
    table, _, notes = out.partition("note:")
    assert "s01" not in table
    assert "show the image of another one (s01 that of s00; s02 that of s00; s03" in notes
    assert "s04" not in notes
    assert f"... and {N - 1} more: {tmp_path / 'c' / 'slides'}.parquet" in out
    assert "2 not used: truncated 1, not_a_slide 1" in out


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
