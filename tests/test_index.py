import csv
import os
from pathlib import Path
from typing import Any

import pytest

from online_patching import SlideIndex
from online_patching.errors import StoreError
from online_patching.testing import SyntheticSlide, write_ome_zarr, write_tiff
from pathfm.cli import main
from pathfm.cohorts import CohortRow, index_row
from pathfm.index import IndexConfig, run
from pathfm.runtime import PathfmError

SIZES_PX0 = ((900, 700), (610, 1030))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two TIFF slides, one of them without µm/px, and a Zarr: read only."""
    folder = tmp_path_factory.mktemp("slides")
    write_tiff(folder / "a.svs", SyntheticSlide(1, *SIZES_PX0[0]))
    write_tiff(folder / "bare.svs", SyntheticSlide(2, *SIZES_PX0[1]), with_mpp=False)
    write_ome_zarr(folder / "c.zarr", SyntheticSlide(3, *SIZES_PX0[0]))
    return folder


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    """The same slides with files that are none beside them."""
    (tmp_path / "in").mkdir()
    for path in drawn.iterdir():
        (tmp_path / "in" / path.name).symlink_to(path, target_is_directory=path.is_dir())
    (tmp_path / "in" / "broken.svs").write_bytes(b"II*\0" + b"\xff" * 300)
    whole = (drawn / "a.svs").read_bytes()
    (tmp_path / "in" / "cut.svs").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "in" / "notes.txt").write_text("not a slide")
    return tmp_path / "in"


def overrides(folder: Path, text: str = "file,mpp\nbare.svs,0.5\n") -> Path:
    path = folder.parent / "mpp.csv"
    path.write_text(text)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_usable_slides_are_saved_and_the_others_listed_with_a_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(IndexConfig(slides=(str(folder),), out=tmp_path / "c"))
    assert (result.slides, result.skipped) == (2, {"no_mpp": 1, "truncated": 2})
    saved = SlideIndex.load(tmp_path / "c" / "slides" / "a.index")
    assert saved.dimensions == SIZES_PX0[0]
    reasons = {Path(row["uri"]).name: row["reason"] for row in rows(tmp_path / "c" / "skipped.csv")}
    assert {"bare.svs", "broken.svs", "cut.svs"} <= set(reasons)
    assert "µm/px" in reasons["bare.svs"]
    table = rows(tmp_path / "c" / "slides.csv")
    assert [row["slide_id"] for row in table] == ["a", "c"]
    assert result.tiles == sum(int(row["tiles"]) for row in table) > 0
    shown = capsys.readouterr().out
    for said in ("900 x 700", "0.25", "vendor tag", "broken.svs", "bare.svs"):
        assert said in shown


def test_an_override_makes_a_slide_usable_and_unmatched_rows_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = overrides(folder, "file,mpp\nbare.svs,0.5\ntypo.svs,1\n")
    result = run(IndexConfig(slides=(str(folder),), out=tmp_path / "c", mpp_overrides=table))
    assert result.slides == 3
    bare = SlideIndex.load(tmp_path / "c" / "slides" / "bare.index")
    assert (bare.mpp, bare.mpp_source) == (0.5, "override table")
    assert "what is not among the slides: typo.svs" in capsys.readouterr().out


def test_an_override_finds_a_file_that_a_table_calls_otherwise(
    folder: Path, tmp_path: Path
) -> None:
    table = folder / "cohort.csv"
    table.write_text("slide_id,uri\nS-17,bare.svs\n")
    config = IndexConfig(slides=(str(table),), out=tmp_path / "c", mpp_overrides=overrides(folder))
    assert run(config).slides == 1
    assert [row["mpp_source"] for row in rows(tmp_path / "c" / "slides.csv")] == ["override table"]


def test_a_rerun_takes_over_what_did_not_change(folder: Path, tmp_path: Path) -> None:
    config = IndexConfig(
        slides=(str(folder / "*.svs"),), out=tmp_path / "c", mpp_overrides=overrides(folder)
    )
    assert run(config).reused == 0
    assert run(config).reused == 2
    overrides(folder, "file,mpp\nbare.svs,0.6\n")  # another µm/px: made anew
    again = run(config)
    assert again.reused == 1
    assert SlideIndex.load(tmp_path / "c" / "slides" / "bare.index").mpp == 0.6
    (folder / "a.svs").unlink()
    (folder / "a.svs").write_bytes((folder / "bare.svs").read_bytes())  # other bytes: refused now
    last = run(config)
    assert (last.slides, last.reused) == (1, 1)
    assert not (tmp_path / "c" / "slides" / "a.index").exists()


def test_a_damaged_index_of_an_earlier_run_is_made_anew(folder: Path, tmp_path: Path) -> None:
    config = IndexConfig(slides=(str(folder / "a.svs"),), out=tmp_path / "c")
    run(config)
    path = tmp_path / "c" / "slides" / "a.index"
    path.write_bytes(path.read_bytes()[:40])
    assert run(config).reused == 0
    assert SlideIndex.load(path).dimensions == SIZES_PX0[0]


def test_a_cohort_table_names_slides_and_patients(folder: Path, tmp_path: Path) -> None:
    table = folder / "cohort.csv"
    table.write_text("uri,patient,mpp\na.svs,p1,\nbare.svs,p2,0.5\n")
    run(IndexConfig(slides=(str(table),), out=tmp_path / "c", cohort={"ids": "plain"}))
    told = {row["slide_id"]: row["patient"] for row in rows(tmp_path / "c" / "slides.csv")}
    assert told == {"a": "p1", "bare": "p2"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone.svs", "there is no such file"),
        ("broken.svs", "broken.svs"),
        ("bare.svs", "µm/px"),
        ("notes.txt", "notes.txt"),
    ],
)
def test_one_file_named_that_is_no_use_is_one_line_and_exit_2(
    folder: Path, tmp_path: Path, name: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(folder / name), "--out", str(tmp_path / "c")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_a_folder_without_any_slide_is_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(PathfmError, match=r"no slides found|usable slide"):
        run(IndexConfig(slides=(str(tmp_path / "in"),), out=tmp_path / "c"))


def test_a_folder_that_may_not_be_listed_is_one_refusal_among_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(0)
    _as_any_user(monkeypatch, closed)
    assert run(IndexConfig(slides=(str(folder),), out=tmp_path / "c")).skipped["access"] == 1
    with pytest.raises(PathfmError, match="closed: cannot be listed: permission denied"):
        run(IndexConfig(slides=(str(closed),), out=tmp_path / "d"))


def _as_any_user(monkeypatch: pytest.MonkeyPatch, closed: Path) -> None:
    """Make a closed folder closed to root too, whom permissions do not stop."""
    listed, allowed = os.listdir, os.access

    def listdir(path: Any = ".") -> list[Any]:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", listdir)
    monkeypatch.setattr(os, "access", lambda p, m, **k: Path(p) != closed and allowed(p, m, **k))


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_neither_file_nor_folder_is_told(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "pipe" if kind == "pipe" else Path(os.devnull)
    if kind == "pipe":
        os.mkfifo(source)
    with pytest.raises(PathfmError, match="neither a file nor a folder"):
        run(IndexConfig(slides=(str(source),), out=tmp_path / "c"))


def test_an_unwritable_output_is_told(folder: Path) -> None:
    with pytest.raises(PathfmError, match="cannot make the folder"):  # not even for root
        run(IndexConfig(slides=(str(folder),), out=Path("/proc/corpus")))


def test_an_output_that_is_a_file_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c").write_text("in the way")
    with pytest.raises(PathfmError, match="cannot make the folder"):
        run(IndexConfig(slides=(str(folder),), out=tmp_path / "c"))


def test_tables_hold_no_secrets(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = "http://bob:s3cret@h.invalid/a.svs?X-Amz-Signature=SIG"
    corpus = tmp_path / "c"

    def one(row: CohortRow, *more: Any, **others: Any) -> Any:
        if row.uri == uri:
            raise StoreError(uri, f"{uri} is gone")
        return index_row(row, *more, **others)

    monkeypatch.setattr("pathfm.index.reading.index_row", one)
    table = tmp_path / "cohort.csv"
    table.write_text(f"uri\n{drawn / 'a.svs'}\n{uri}\n")
    run(IndexConfig(slides=(str(table),), out=corpus))
    written = [path for path in corpus.rglob("*") if path.is_file()]
    assert {"skipped.parquet", "index.journal"} <= {path.name for path in written}
    for path in written:
        assert b"s3cret" not in path.read_bytes()
        assert b"SIG" not in path.read_bytes()
    said = capsys.readouterr()
    assert "s3cret" not in said.out + said.err
    assert "SIG" not in said.out + said.err


def test_another_set_of_slides_drops_the_packed_corpus(drawn: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    run(IndexConfig(slides=(str(drawn / "a.svs"),), out=corpus))
    (corpus / "corpus.json").write_text("{}")
    run(IndexConfig(slides=(str(drawn / "a.svs"),), out=corpus))
    assert (corpus / "corpus.json").exists()
    run(IndexConfig(slides=(str(drawn / "c.zarr"),), out=corpus))
    assert not (corpus / "corpus.json").exists()
