"""Results of runs and files: read by their form, told with n and what selected, never across protocols."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from pathfm import probe_slides
from pathfm.compare import CompareConfig, run
from pathfm.compare.ablation import ablations, changes
from pathfm.compare.curves import scaling
from pathfm.compare.gathering import READERS, Gathered, chosen, from_files, gather
from pathfm.compare.published import _ROWS, published_scores
from pathfm.compare.records import EVA, Found, Task
from pathfm.compare.tables import Table, every_table, leaderboards
from pathfm.datasets import DATASETS
from pathfm.probing.protocol import HeadProtocol
from pathfm.probing.result import ProbeResult
from pathfm.robustness.results import RobustnessResult
from pathfm.runtime import PathfmError
from pathfm.segmentation.probe_result import SegmentationResult
from pathfm.tracking import TrackingConfig, open_run
from tests.comparing import backbone, corrupted, paired, probe, robustness, scores, write
from tests.mlflow_store import new_store
from tests.test_compare import record

quiet_mlflow = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def found_in(folder: Path) -> Gathered:
    return gather(from_files([folder]))


def two_models() -> dict[str, object]:
    a = backbone("init", logistic=scores(0.8, (0.75, 0.84)), knn=scores(0.7))
    b = backbone("long", logistic=scores(0.85, (0.81, 0.9)), knn=scores(0.69))
    return probe([a, b], paired=[paired("init", "long", 0.05, [0.01, 0.09])])


def eva_settings(**changed: object) -> str:
    told = {f.name: getattr(HeadProtocol(), f.name) for f in fields(HeadProtocol)} | changed
    told["learning_rates"] = list(told["learning_rates"])  # as YAML has it
    told["betas"] = list(told["betas"])
    return json.dumps({"eva": told})  # JSON is YAML


def test_the_files_made_here_are_what_the_stages_write() -> None:
    TypeAdapter(ProbeResult).validate_python(two_models())
    TypeAdapter(RobustnessResult).validate_python(robustness([corrupted("a", [100.0, None])]))


def test_a_leaderboard_has_mean_sd_and_interval_best_first_and_says_what_selected(
    tmp_path: Path,
) -> None:
    write(tmp_path / "p" / "probe.json", two_models())
    logistic, knn = leaderboards(found_in(tmp_path).found)
    assert logistic.columns == ("model", "mini")
    assert logistic.rows == (
        ("long", "85.0 ± 1.0 [81.0, 90.0]"),
        ("init", "80.0 ± 1.0 [75.0, 84.0]"),
    )
    assert "40 pictures; 5 splits, 20 train / 20 test; a part of train selects" in logistic.notes[0]
    assert [row[0] for row in knn.rows] == ["init", "long"]
    assert knn.rows[0][1] == "70.0 ± 1.0"  # no interval: none is shown
    assert "kNN, k = 20" in knn.title


def test_validation_that_selects_and_reports_is_said(tmp_path: Path) -> None:
    own = probe(
        [backbone("init", logistic=scores(0.8, n=1))], own_splits=True, n_val=9, reported_on="val"
    )
    write(tmp_path / "probe.json", own)
    (table,) = leaderboards(found_in(tmp_path).found)
    assert "own splits, 20 / 9; validation selects and reports" in table.notes[0]
    assert table.rows == (("init", "80.0"),)  # one repeat has no sd


def bach(folder: Path, settings: str | None, **more: object) -> list[Table]:
    facts = DATASETS["bach"].facts
    same = {
        "data": "bach",
        "n": sum(facts.counts.values()),
        "own_splits": True,
        "reported_on": "val",
        "n_val": 132,
        "n_train": 268,
    }
    write(
        folder / "probe.json",
        probe([backbone("mine", eva=scores(0.8), logistic=scores(0.9))], **(same | more)),
    )
    if settings is not None:
        (folder / "probe.yaml").write_text(settings)
    return list(leaderboards(found_in(folder).found))


def test_published_rows_stand_beside_heads_trained_as_eva_does_and_say_where_they_are_from(
    tmp_path: Path,
) -> None:
    eva, logistic = bach(tmp_path, eva_settings(seed=7))
    assert eva.title == f"{EVA}: balanced accuracy, %"
    rows = dict(eva.rows)
    assert rows["UNI2-h (published, eva leaderboard)"] == "91.5"
    assert rows["lunit S/16 (published, eva leaderboard)"] == "78.3"
    assert rows["mine"] == "80.0 ± 1.0"
    assert [eva.rows[i][0] for i in eva.marked] == [r[0] for r in eva.rows if "published" in r[0]]
    assert "not run here" in eva.notes[-1]
    assert [row[0] for row in logistic.rows] == ["mine"]  # another protocol


@pytest.mark.parametrize(
    ("settings", "more", "title"),
    [
        (eva_settings(n_steps=300), {}, "(n_steps 300)"),
        (eva_settings(learning_rates=(3e-4, 1e-3)), {}, "(learning_rates [0.0003, 0.001])"),
        (eva_settings(), {"input_px": 112}, "(input 112 px)"),
        (None, {}, "(settings not known)"),
        (eva_settings(), {"own_splits": False}, ": balanced"),
        (eva_settings(), {"reported_on": "test"}, ": balanced"),
        (eva_settings(), {"n": 399}, ": balanced"),
        (eva_settings(), {"data": "my bach"}, ": balanced"),
    ],
)
def test_published_rows_stay_away_from_anything_else(
    settings: str | None, more: dict[str, object], title: str, tmp_path: Path
) -> None:
    table = bach(tmp_path, settings, **more)[0]
    assert title in table.title
    assert [row[0] for row in table.rows] == ["mine"]


def test_published_figures_are_those_of_the_leaderboard_column_by_column() -> None:
    # sums of the columns of the published table, added up apart from this code
    sums = (5.948, 5.592, 6.681, 5.300, 5.773, 6.468)
    for column, total in enumerate(sums):
        assert sum(row[column] for row in _ROWS.values()) == pytest.approx(total, abs=1e-9)
    n = sum(DATASETS["patch_camelyon"].facts.counts.values())
    task = Task(EVA, "balanced accuracy", "patch_camelyon", "", n, "", "test")
    shown = {score.model.split(" (")[0]: score.mean for score in published_scores([task])}
    assert shown["Virchow2"] == 0.938
    assert len(shown) == 7


def test_models_of_one_name_are_told_apart_and_a_rerun_replaces_its_row(tmp_path: Path) -> None:
    other = backbone("init", logistic=scores(0.6)) | {"backbone_digest": "f" * 64}
    for n, models in enumerate(
        (
            [backbone("init", logistic=scores(0.7))],
            [other],
            [backbone("init", logistic=scores(0.75))],
        )
    ):
        write(tmp_path / str(n) / "probe.json", probe(models))
    (table,) = leaderboards(found_in(tmp_path).found)
    assert table.rows == (("init (aaaaaaaa)", "75.0 ± 1.0"), ("init (ffffffff)", "60.0 ± 1.0"))
    assert "1 earlier figures of the same models are left out." in table.notes


def test_a_model_at_two_input_sizes_has_two_rows_that_say_so(tmp_path: Path) -> None:
    for px, mean in ((112, 0.7), (224, 0.8)):
        write(
            tmp_path / str(px) / "probe.json",
            probe([backbone("init", logistic=scores(mean))], input_px=px),
        )
    (table,) = leaderboards(found_in(tmp_path).found)
    assert [row[0] for row in table.rows] == ["init, 224 px", "init, 112 px"]


def test_the_same_file_in_two_places_counts_once(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write(tmp_path / place / "probe.json", two_models())
    assert len(found_in(tmp_path).found.scores) == 4


def test_scores_of_slides_and_masks_are_read(tmp_path: Path) -> None:
    model = {
        "name": "uni",
        "protocol": "conv",
        "values": [0.6, 0.7],
        "mean": 0.65,
        "sd": 0.05,
        "interval": [0.6, 0.7],
        "interval_of": "mean over runs, pictures resampled",
        "per_class": {"x": 0.5},
    }
    told = "test (val chose the epoch)"
    masks = {"data": "consep=a/b", "n": 14, "told": told, "metric": "mean_dice", "models": [model]}
    slides = masks | {"data": "x/labels.csv", "models": [model | {"protocol": "abmil"}]}
    write(tmp_path / "segmentation_probe.json", masks)
    write(tmp_path / "slide_probe.json", slides)
    first, second = leaderboards(found_in(tmp_path).found)
    assert (first.title, first.columns) == ("conv: mean dice, %", ("model", "consep"))
    assert first.rows == (("uni", "65.0 ± 5.0 [60.0, 70.0]"),)
    assert first.notes[0] == "consep: 14 reported: test (val chose the epoch)."
    assert "over pictures of the reported part" in first.notes[-1]
    assert (second.title.split(":")[0], second.columns[1]) == ("slides, ABMIL", "labels.csv")


def test_what_the_slide_and_mask_probes_write_has_all_that_is_read() -> None:
    for result in (probe_slides.SlideProbeResult, SegmentationResult):
        names = {part.name for part in fields(result)}
        assert {"data", "data_digest", "n", "told", "metric", "models", "caveats"} <= names


def test_a_corruption_left_out_is_no_zero(tmp_path: Path) -> None:
    write(
        tmp_path / "robustness.json",
        robustness([corrupted("init", [100.0, None]), corrupted("long", [80.4, None])]),
    )
    summary, each = every_table(found_in(tmp_path).found)
    assert summary.rows[1] == ("long", "10.0", "30.0", "90.0 [89.0, 91.0]", "none")
    assert each.columns == ("corruption", "init", "long")
    assert each.rows == (("jpeg", "100", "80"), ("defocus", "−", "−"))


@pytest.mark.parametrize("name", sorted(READERS))
@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is no JSON"),
        ("[]", "is not as expected at its root"),
        ('{"models": [{"mean": NaN}], "backbones": [{"name": 3}]}', "is not as expected at"),
        ("[" * 100_000, "is no JSON|is not as expected"),
    ],
)
def test_a_damaged_file_is_an_error_in_one_line(
    name: str, content: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PathfmError, match=why) as caught:
        found_in(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p["backbones"][0]["probes"]["logistic"].update(confusion=[[1, 2]]),
        lambda p: p["backbones"][0]["few_shot"].update(x={"shots": [1], "mean": [], "sd": [1.0]}),
        lambda p: p["backbones"][0]["probes"]["logistic"].update(values=[]),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(change: object, tmp_path: Path) -> None:
    content = two_models()
    change(content)  # type: ignore[operator]
    write(tmp_path / "probe.json", content)
    with pytest.raises(PathfmError, match="is not as expected at"):
        found_in(tmp_path)


def test_only_results_are_read_and_links_are_not_followed(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside" / "probe.json", two_models())
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "probe.json").symlink_to(outside)
    (inside / "down").symlink_to(outside.parent)
    with pytest.raises(PathfmError, match=r"no probe\.json, robustness\.json.* in it or below"):
        from_files([inside])
    with pytest.raises(PathfmError, match="not a result file"):
        from_files([write(tmp_path / "x.json", {})])
    with pytest.raises(PathfmError, match="no such file"):
        from_files([tmp_path / "gone"])


def test_a_file_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathfm.compare.gathering._MOST_BYTES", 100)
    path = write(tmp_path / "probe.json", two_models())
    with pytest.raises(PathfmError, match="no result of pathfm"):
        from_files([path])


# --- pretraining behind a score ---------------------------------------------------------------------


def pretrained(folder: Path, name: str, steps: int, score: float, digest: str, lr: float) -> None:
    """A pretraining run and a probe of what it made."""
    write(
        folder / name / "summary.json",
        {"backbone_digest": digest, "patches_seen": steps * 8, "probe_logistic_end": score - 0.1},
    )
    (folder / name / "config.yaml").write_text(
        json.dumps(
            {"steps": steps, "optim": {"lr": lr}, "seed": 3, "watch": {"probe_folder": "x/y"}}
        )
    )
    one = backbone(name, logistic=scores(score, (score - 0.02, score + 0.02)))
    write(folder / f"probe_{name}" / "probe.json", probe([one | {"backbone_digest": digest}]))


def test_scores_get_the_params_of_the_run_that_made_their_backbone(tmp_path: Path) -> None:
    for n, (steps, score) in enumerate([(10, 0.6), (100, 0.7), (1000, 0.75)]):
        pretrained(tmp_path, f"run{n}", steps, score, str(n) * 64, 0.1)
    gathered = found_in(tmp_path)
    assert {"steps", "optim.lr"} <= gathered.params
    assert "watch.probe_folder" not in gathered.params
    curves = scaling(gathered.found.scores, gathered.params, [])
    logistic = [c for c in curves if c.task.protocol == "logistic regression"]
    assert sorted(c.axis for c in logistic) == ["patches_seen", "steps"]
    (line,) = next(c for c in logistic if c.axis == "steps").lines.values()
    assert [(p.x, p.mean) for p in line] == [(10, 0.6), (100, 0.7), (1000, 0.75)]
    assert line[0].interval == pytest.approx((0.58, 0.62))
    training = [c for c in curves if "probe in training" in c.task.protocol and c.axis == "steps"]
    assert [p.mean for c in training for p in c.lines[""]] == pytest.approx([0.5, 0.6, 0.65])
    assert training[0].task.data == "y"


def test_a_param_that_the_axis_does_not_explain_makes_lines_of_its_own(tmp_path: Path) -> None:
    cases = [(10, 0.1, 0.5), (100, 0.1, 0.6), (10, 0.2, 0.55), (100, 0.2, 0.7)]
    for n, (steps, lr, score) in enumerate(cases):
        pretrained(tmp_path, f"run{n}", steps, score, str(n) * 64, lr)
    gathered = found_in(tmp_path)
    curves = scaling(gathered.found.scores, gathered.params, ["steps"])
    curve = next(c for c in curves if c.task.protocol == "logistic regression")
    lines = {name: [p.mean for p in points] for name, points in curve.lines.items()}
    assert lines == {"optim.lr 0.1": [0.5, 0.6], "optim.lr 0.2": [0.55, 0.7]}


def test_an_axis_nothing_differs_in_is_told_with_those_that_are_known(tmp_path: Path) -> None:
    pretrained(tmp_path, "one", 10, 0.6, "1" * 64, 0.1)
    gathered = found_in(tmp_path)
    with pytest.raises(PathfmError, match=r"differ in 'depth'; .*optim\.lr.*steps"):
        scaling(gathered.found.scores, gathered.params, ["depth"])


def test_an_ablation_is_named_by_what_was_changed(tmp_path: Path) -> None:
    params = frozenset({"lr", "seed", "depth", "same"})
    before = {"lr": "1", "seed": "0", "depth": "12", "same": "x", "patches_seen": "9", "run": "r1"}
    after = {"lr": "2", "seed": "1", "same": "x", "patches_seen": "10", "run": "r2"}
    assert changes(before, after, params) == ["depth 12 → none", "lr 1 → 2"]
    assert (
        changes({"lr": "1"}, after, params) == []
    )  # ImageNet weights: nothing of ours was changed
    write(tmp_path / "probe.json", two_models())
    gathered = found_in(tmp_path)
    (one,) = ablations(gathered.found, gathered.params, None)
    assert (one.baseline, one.rows) == ("init", ("long",))
    assert one.panels["logistic regression"][0].interval == (0.01, 0.09)
    with pytest.raises(PathfmError, match="nothing is compared with 'long', but with: init"):
        ablations(gathered.found, gathered.params, "long")
    assert ablations(Found(), frozenset(), None) == []


def test_runs_are_chosen_by_name_and_bring_their_children() -> None:
    runs = [record("a1"), record("child", "a1"), record("grandchild", "child"), record("b")]
    assert [r.run_id for r in chosen(runs, ["a*"])] == ["a1", "child", "grandchild"]
    assert chosen(runs, []) == runs
    with pytest.raises(PathfmError, match=r"no run is called 'c\?'; there are: a1, b, child"):
        chosen(runs, ["c?"])


# --- the page ---------------------------------------------------------------------------------------


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
    assert "mlflow ui --backend-store-uri" in capsys.readouterr().out
    broken = next((tmp_path / "mlflow-artifacts").rglob("probe.json"))
    broken.chmod(0o644)
    broken.write_text("{")
    with pytest.raises(PathfmError, match=r"(first|second): probe\.json is no JSON"):
        run(CompareConfig(uri=uri))
