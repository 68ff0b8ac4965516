"""The page: complete, escaped, loading nothing; and results out of an MLflow store."""

from __future__ import annotations

import csv
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pathfm.compare import CompareConfig, run
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig, open_run
from tests.comparing import (
    backbone,
    corrupted,
    probe,
    robustness,
    scores,
    two_models,
    write,
)
from tests.mlflow_store import new_store

quiet_mlflow = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Tags(HTMLParser):
    """Counts tags and keeps what is linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]


def test_the_page_holds_everything_escaped_and_loads_nothing(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|$x_{$`=1+1"
    content = two_models() | {"data": evil, "classes": [evil, "$b"]}
    content["backbones"][0]["name"] = f"={evil}"  # type: ignore[index]
    write(tmp_path / "in" / "probe.json", content)
    out = tmp_path / "out"
    result = run(CompareConfig(results=[tmp_path / "in"], out=out))
    page = (out / "compare.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.names
    assert tags.sources
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert "default-src 'none'" in page
    text = (out / "compare.md").read_text()
    assert "<script>" not in text
    for line in text.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 7)  # no cell became two
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    assert {row["model"] for row in rows} == {f"'={evil}", "long"}  # no formula in a spreadsheet
    assert rows[0]["mean"] == "0.8"
    assert all(path.exists() for path in result.written)


def test_a_page_made_again_keeps_no_picture_of_the_last_and_removes_nobody_else_s(
    tmp_path: Path,
) -> None:
    results, out = tmp_path / "in", tmp_path / "out"
    write(results / "probe.json", two_models())
    write(results / "robustness.json", robustness([corrupted("init", [100.0, 99.0])]))
    run(CompareConfig(results=[results], out=out))
    plain = Image.new("RGB", (9, 9))
    plain.save(out / "scaling_3.png")  # a name of ours, drawn by somebody else
    (out / "map_1.png").write_bytes(b"no picture")
    (out / "leaderboard_7.png").symlink_to(out / "leaderboard_1.png")
    shutil.copy(out / "ablation_1.png", out / "for_the_talk_1.png")  # ours, kept under their name
    drawn = {path.name for path in out.glob("*.png")}
    (results / "robustness.json").unlink()
    write(results / "probe.json", probe([backbone("init", logistic=scores(0.8))]))
    run(CompareConfig(results=[results], out=out))
    gone = {"ablation_1.png", "corruptions_1.png", "leaderboard_2.png", "confusion_2.png"}
    assert drawn - {path.name for path in out.glob("*.png")} == gone
    assert set(re.findall(r"\((\w+\.png)\)", (out / "compare.md").read_text())) == {
        "leaderboard_1.png",
        "confusion_1.png",
    }


def test_a_page_that_cannot_be_made_leaves_the_last_one_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "in" / "probe.json", two_models())
    run(CompareConfig(results=[tmp_path / "in"], out=tmp_path / "out"))
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    gone = [tmp_path / "gone.safetensors"]
    again = CompareConfig(results=[tmp_path / "in"], out=tmp_path / "out", maps=gone)
    with pytest.raises(PathfmError, match="no embeddings at"):
        run(again)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_there_is_no_page_about_nothing(tmp_path: Path) -> None:
    write(tmp_path / "probe.json", probe([]))
    with pytest.raises(PathfmError, match="nothing was measured"):
        run(CompareConfig(results=[tmp_path], out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@quiet_mlflow
def test_results_kept_with_runs_are_read_out_of_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = new_store(tmp_path)
    probed = write(tmp_path / "p" / "probe.json", two_models())
    made = {"backbone_digest": "b" * 64, "patches_seen": 80}
    summary = write(tmp_path / "t" / "summary.json", made)
    with open_run(
        TrackingConfig(uri=uri, run_name="train"), tmp_path / "t", {"lr": 0.5}
    ) as tracked:
        tracked.artifact(summary)
    for name in ("first", "second"):
        with open_run(
            TrackingConfig(uri=uri, run_name=name), tmp_path / name, {"k": 20}
        ) as tracked:
            tracked.artifact(probed)
    result = run(CompareConfig(uri=uri, out=tmp_path / "out"))
    assert (
        next(table.title for table in result.tables) == "logistic regression: balanced accuracy, %"
    )
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines()))
    assert [row["source"] for row in rows] == ["first"] * 4  # the second run kept the same file
    page = (tmp_path / "out" / "compare.md").read_text()
    heads = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    order = [heads.index("Against the baseline"), heads.index("Pictures")]
    assert order == sorted(order)
    assert all(heads.index(head) > order[1] for head in heads if "metrics" in head)
    assert "mlflow ui --backend-store-uri" in capsys.readouterr().out
    broken = next((tmp_path / "mlflow-artifacts").rglob("probe.json"))
    broken.chmod(0o644)
    broken.write_text("{")
    with pytest.raises(PathfmError, match=r"(first|second): probe\.json is no JSON"):
        run(CompareConfig(uri=uri))
