"""Results of runs and files: read by their form, told with n and what selected, never across protocols."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from pathfm.compare.gathering import READERS, from_files
from pathfm.compare.published import _ROWS, published_scores
from pathfm.compare.records import EVA, Task
from pathfm.compare.tables import (
    Table,
    differences,
    every_table,
    few_shots,
    labels,
    leaderboards,
)
from pathfm.datasets import DATASETS
from pathfm.embeddings.info import describe_transform
from pathfm.heads.result import HeadResult
from pathfm.probing.protocol import HeadProtocol
from pathfm.probing.result import ProbeResult
from pathfm.robustness.results import RobustnessResult
from pathfm.runtime import PathfmError
from tests.comparing import (
    backbone,
    corrupted,
    found_in,
    paired,
    probe,
    robustness,
    scores,
    two_models,
    write,
)


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


def bach(
    folder: Path, settings: str | None, mine: dict[str, object] | None = None, **more: object
) -> list[Table]:
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
        probe([mine or backbone("mine", eva=scores(0.8), logistic=scores(0.9))], **(same | more)),
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


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"pooling": "cls+mean"}, "(pooling cls+mean)"),
        ({"transform": describe_transform("as the test says", 224, [], []), "mpp": 1.0}, "1 µm/px"),
        ({"transform": "", "mpp": 0.5}, "(input not known)"),
    ],
)
def test_published_rows_stay_away_from_other_features_and_these_replace_no_others(
    model: dict[str, object], told: str, tmp_path: Path
) -> None:
    same, other = tmp_path / "a", tmp_path / "b"
    bach(same, eva_settings(seed=7))
    bach(other, eva_settings(seed=7), backbone("mine", eva=scores(0.85)) | model)
    tables = list(leaderboards(found_in(tmp_path).found))
    (plain,) = [table for table in tables if table.title.startswith(f"{EVA}:")]
    (changed,) = [table for table in tables if told in table.title]
    assert dict(plain.rows)["mine"] == "80.0 ± 1.0"  # not replaced by the later figure
    assert [row[1] for row in changed.rows] == ["85.0 ± 1.0"]


def test_few_shot_confusions_and_differences_of_two_input_sizes_are_told_apart(
    tmp_path: Path,
) -> None:
    for px in (112, 224):
        models = [backbone(name, logistic=scores(0.8)) for name in ("init", "long")]
        for model in models:
            model["few_shot"] = {"logistic": {"shots": [1], "mean": [px / 1000], "sd": [0.0]}}
        pairs = [paired("init", "long", px / 1000, [])]
        write(tmp_path / str(px) / "probe.json", probe(models, paired=pairs, input_px=px))
    found = found_in(tmp_path).found
    (shots,) = few_shots(found)
    assert [row[0] for row in shots.rows] == [
        *("init, 112 px", "long, 112 px"),
        *("init, 224 px", "long, 224 px"),
    ]
    (table,) = differences(found)
    assert table.columns[:2] == ("models", "from")
    told = {Path(row[1]).parent.name: row[4] for row in table.rows}
    assert told == {"112": "+11.2", "224": "+22.4"}
    assert set(labels(found.confusions).values()) == {row[0] for row in shots.rows}


def test_one_model_by_two_poolings_has_two_rows_that_say_so(tmp_path: Path) -> None:
    write(tmp_path / "a" / "probe.json", probe([backbone("m", knn=scores(0.8))]))
    mean = backbone("m", knn=scores(0.7)) | {"pooling": "mean"}
    write(tmp_path / "b" / "probe.json", probe([mean]))
    (table,) = leaderboards(found_in(tmp_path).found)
    assert [row[0] for row in table.rows] == ["m, cls", "m, mean"]


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
    names = {part.name for part in fields(HeadResult)}
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
