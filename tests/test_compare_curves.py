"""Scores joined to the runs that made their backbones: curves, ablations, the choice of runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pathfm.compare import CompareConfig, run
from pathfm.compare.ablation import ablations, changes
from pathfm.compare.curves import over_mpp, scaling
from pathfm.compare.gathering import chosen
from pathfm.compare.records import Found
from pathfm.compare.tables import by_mpp
from pathfm.runtime import PathfmError
from tests.comparing import (
    backbone,
    found_in,
    probe,
    scores,
    two_models,
    write,
)
from tests.test_compare import record


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


def test_scores_at_several_mpp_are_a_table_and_a_curve_a_model(tmp_path: Path) -> None:
    def at(mpp: float, n: int, mean: float) -> dict[str, object]:
        interval = (mean - 0.05, mean + 0.05) if mpp < 2 else None
        return {"mpp": mpp, "n": n, "probes": {"logistic": scores(mean, interval)}}

    a = backbone("init", logistic=scores(0.8)) | {"by_mpp": [at(2.0, 5, 0.5), at(0.5, 7, 0.9)]}
    b = backbone("long", logistic=scores(0.7)) | {"by_mpp": [at(0.5, 7, 0.8), at(1.0, 8, 0.75)]}
    lone = backbone("lone", logistic=scores(0.6)) | {"by_mpp": [at(1.0, 8, 0.6)]}  # nothing differs
    file = write(tmp_path / "in" / "probe.json", probe([a, b, lone]))
    found = found_in(tmp_path / "in").found
    (curve,) = over_mpp(found.over_mpp)
    assert list(curve.lines) == ["init", "long"]
    assert [(p.x, p.mean) for p in curve.lines["init"]] == [(0.5, 0.9), (2.0, 0.5)]
    assert curve.lines["init"][1].interval is None
    (table,) = by_mpp(found)
    assert table.columns == ("model", "0.5 µm/px", "1 µm/px", "2 µm/px")
    assert table.rows[0] == ("init", "90.0 [85.0, 95.0]", "", "50.0")
    assert table.rows[1] == ("long", "80.0 [75.0, 85.0]", "75.0 [70.0, 80.0]", "")
    assert "7 at 0.5, 8 at 1, 5 at 2" in table.notes[0]
    run(CompareConfig(results=[tmp_path / "in"], out=tmp_path / "out"))
    assert (tmp_path / "out" / "mpp_1.png").read_bytes().startswith(b"\x89PNG")
    a["by_mpp"][0]["mpp"] = -1.0  # type: ignore[index]
    write(file, probe([a]))
    with pytest.raises(PathfmError, match=r"by_mpp\.0\.mpp"):
        found_in(tmp_path / "in")


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
