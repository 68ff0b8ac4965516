"""What a cell of a study is told: its corpus, labels, weights and probe; how it stops; a thinned grid."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from online_patching import Corpus, GridSampler
from pathfm.config import load_config
from pathfm.runtime import PathfmError
from pathfm.study import StudyConfig, StudyResult, running, working
from pathfm.study.cell import (
    Stopped,
    _refuse_other_data,
    curve_of,
    facts_of,
    pretrain_config,
    robust_metrics,
)
from pathfm.study.offline import thinned
from pathfm.study.plan import Cell, Study, cells_of
from pathfm.study.preparing import Prepared
from pathfm.tracking import TrackingConfig
from tests.test_study import TINY

OFF = TrackingConfig(enabled=False)
PREPARED = Prepared(
    corpus=Path("corpus"),
    patches=Path("patches"),
    train={0.0: Path("train"), 0.2: Path("noisy")},
    offline={"offline": Path("grid")},
    facts={"corpus": "digest"},
)


def study(*arms: dict[str, Any], **changes: Any) -> Study:
    first, other = ({"name": "a"}, {"name": "b"})
    contrast = {"contrasts": [{"arm": arms[0]["name"], "against": "other"}]} if arms else {}
    every = [*arms, {"name": "other"}] if arms else [first, other]
    criterion = TINY["criterion"] | contrast
    return Study.model_validate(TINY | {"arms": every, "criterion": criterion} | changes)


def told(found: Study, seed: int = 2) -> Any:
    return pretrain_config(found, Cell(found.arms[0], seed), PREPARED, Path("cell"), OFF)


def test_an_arm_of_slides_reads_the_corpus_from_the_study_s_weights_at_its_seed() -> None:
    config = told(study({"name": "a"}, data={"weights": "w.safetensors"}))
    assert (config.corpus, config.weights, config.seed) == (Path("corpus"), "w.safetensors", 2)
    assert config.labels.source is None
    assert config.out == Path("cell/pretrain")


def test_random_weights_are_other_ones_at_every_seed() -> None:
    found = study({"name": "a", "pretrain": {"weights": "random"}})
    assert [told(found, seed).weights for seed in (0, 1)] == ["random:0", "random:1"]


def test_an_offline_arm_reads_its_grid_without_classes() -> None:
    config = told(study({"name": "offline", "reads": "offline"}, offline={}))
    assert (config.labels.patches, config.labels.balanced) == (Path("grid"), False)


@pytest.mark.parametrize(("noise", "folder"), [(0.0, "train"), (0.2, "noisy")])
def test_a_labelled_arm_reads_the_training_part_and_no_probe_sees_its_test(
    noise: float, folder: str
) -> None:
    arm = {"name": "a", "reads": "labelled", "label_noise": noise}
    learns = {
        "pretrain": {**TINY["pretrain"], "watch": {"probe_every_steps": 2}, "method": "supcon"}
    }
    config = told(study(arm, split_labelled=True, **learns))
    assert config.labels.patches == Path(folder)
    assert config.watch.probe_folder is None


def test_what_is_watched_in_training_is_the_labelled_folder() -> None:
    watched = {"pretrain": {**TINY["pretrain"], "watch": {"probe_every_steps": 2}}}
    assert told(study({"name": "a"}, **watched)).watch.probe_folder == Path("patches")
    assert told(study({"name": "a"})).watch.probe_folder is None


def test_a_digest_s_facts_change_with_all_that_figures_depend_on_and_nothing_else() -> None:
    def facts(found: Study, seed: int = 0, prepared: Prepared = PREPARED) -> str:
        return json.dumps(facts_of(found, Cell(found.arms[0], seed), prepared), sort_keys=True)

    base = facts(study())
    other_data = Prepared(None, None, {}, {}, {"corpus": "another"})
    changed = [
        facts(study(), seed=1),
        facts(study(), prepared=other_data),
        facts(study(probe={"k": 3})),
        facts(study(views=[{"name": "x"}])),
        facts(study(robustness={})),
        facts(study(pretrain={**TINY["pretrain"], "steps": 7})),
    ]
    assert base not in changed
    assert len(set(changed)) == len(changed)
    for told_otherwise in (
        {"title": "x"},
        {"seeds": 9},
        {"caveats": ["x"]},
        {"equal": ["views_seen"]},
    ):
        assert facts(study(**told_otherwise)) == base


def test_the_start_is_another_with_another_backbone_or_other_weights() -> None:
    def facts(prepared: Prepared = PREPARED, **changes: Any) -> dict[str, Any]:
        found = study(**changes)
        return facts_of(found, cells_of(found)[0], prepared)

    other = {**TINY["pretrain"], "backbone": "vit_tiny_patch16_224"}
    assert facts() != facts(pretrain=other)
    assert facts() == facts(pretrain={**TINY["pretrain"], "steps": 9})
    known = replace(PREPARED, facts={"corpus": "digest", "weights start": "abc"})
    assert facts(known) != facts(replace(known, facts=known.facts | {"weights start": "def"}))


def test_a_cell_knows_nothing_of_other_arms_and_of_more_seeds() -> None:
    found, more = study(), {"weights start-c": "other", "offline c": "grid"}
    cell = Cell(found.arms[0], 0)
    beside = replace(PREPARED, facts=PREPARED.facts | more)
    assert facts_of(found, cell, PREPARED) == facts_of(found, cell, beside)
    own = replace(PREPARED, facts=PREPARED.facts | {"weights start": "w", "offline a": "g"})
    assert facts_of(found, cell, PREPARED) != facts_of(found, cell, own)


def test_a_curve_has_the_steps_that_have_the_number(tmp_path: Path) -> None:
    rows = [{"step": 0, "loss": 1.0}, {"step": 1, "probe_knn": 0.5}, {"step": 3, "probe_knn": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert curve_of(tmp_path, "probe_knn") == [[2, 0.5], [4, 0.75]]


def test_figures_of_robustness_keep_what_is_there() -> None:
    model = {
        "clean_error": {"value": 0.1}, "mean_corrupted_error": {"value": 0.2}, "mce": {"value": 90.0},
        "relative_mce": None, "noisy_labels": [{"share": 0.4, "error": 0.3}],
        "corruptions": [{"name": "stain", "ce": None, "errors": [0.2, 0.4]}],
    }  # fmt: skip
    assert robust_metrics(model) == pytest.approx(
        {
            "robust/clean_error": 0.1, "robust/mean_corrupted_error": 0.2, "robust/mce": 90.0,
            "robust/noise/0.4": 0.3, "robust/error/stain": 0.3,
        }
    )  # fmt: skip


@pytest.mark.parametrize("code", [143, 138])
def test_a_study_told_to_stop_ends_with_the_signal_s_code(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _stopped(code, tmp_path, monkeypatch).exit_code == code


def test_a_page_s_commands_do_it_again_and_hold_no_password() -> None:
    uri = "postgresql://me:hidden@host/db"
    config = StudyConfig(
        name="tiny", out=Path("o"), seeds=2, set=("pretrain.steps=3",), tracking={"uri": uri}
    )
    words = running.command_words(study(), config)
    assert load_config(StudyConfig, None, words, ("name",)) == config
    told = running.commands_of(study(), config)[0]
    assert told.startswith("pathfm study tiny --out o --seeds 2 --set pretrain.steps=3")
    assert "hidden" not in told


def test_ctrl_c_ends_a_study_as_it_ends_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _stopped(130, tmp_path, monkeypatch)


def _stopped(code: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> StudyResult:
    def stop(*_: object) -> None:
        raise Stopped(code)

    monkeypatch.setattr(running, "missing", lambda _: [])
    monkeypatch.setattr(running, "prepare", lambda *_: PREPARED)
    monkeypatch.setattr(running, "work", stop)
    return running.run_study(study(), StudyConfig(out=out, tracking=OFF, processes=1))


def _worked_on(
    monkeypatch: pytest.MonkeyPatch, out: Path, run_cell: Callable[..., dict[str, Any]], **more: Any
) -> StudyResult:
    """A study whose cells are what `run_cell` says."""
    monkeypatch.setattr(running, "missing", lambda _: [])
    monkeypatch.setattr(running, "prepare", lambda *_: PREPARED)
    monkeypatch.setattr(working, "run_cell", run_cell)
    return running.run_study(study(), StudyConfig(out=out, tracking=OFF, processes=1, **more))


def test_a_cell_that_breaks_in_any_way_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No memory at one, a figure that JSON has no word for at another."""
    tried = []

    def run_cell(_: Study, cell: Cell, *__: Any) -> dict[str, Any]:
        tried.append(cell.name)
        print(f"a table of {cell.name}")
        if cell.name == "a-s0":
            raise MemoryError
        value = float("nan") if cell.name == "b-s0" else 0.5
        held = {"run/patches_seen": 24.0, "run/optimizer_steps": 6.0, "run/views_seen": 240.0}
        return {"cell": cell.name, "metrics": {**held, "probe/224/knn": value}, "curves": {}}

    with pytest.raises(PathfmError, match=r"2 cell\(s\) failed, first a-s0: MemoryError"):
        _worked_on(monkeypatch, tmp_path, run_cell)
    assert sorted(tried) == ["a-s0", "a-s1", "a-s2", "b-s0", "b-s1", "b-s2", "start"]  # none twice
    told = {path.parent.name[:4]: path.read_text() for path in tmp_path.rglob("failed.txt")}
    assert told["b-s0"].startswith("ValueError: Out of range float")
    assert len(list(tmp_path.rglob("result.json"))) == 5
    told_so = capsys.readouterr().out
    assert "5 of 7 cells done" in told_so  # and the grid is shown as it goes
    assert "a table of" not in told_so
    said = sorted(path.read_text() for path in tmp_path.glob("tiny/cells/*/words.log"))
    assert said == [f"a table of {name}\n" for name in sorted(tried)]


def test_a_rank_does_not_end_the_others_with_a_cell_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_cell(*_: Any) -> dict[str, Any]:
        raise PathfmError("broken")

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert _worked_on(monkeypatch, tmp_path, run_cell).exit_code == 0
    assert "7 cell(s) failed, first start: broken" in capsys.readouterr().err


@pytest.mark.parametrize("code", [2, 1, -9])
def test_a_process_that_ends_without_its_cells_is_an_error(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = "kill -9 $$" if code == -9 else f"exit {code}"
    (tmp_path / "python").write_text(f"#!/bin/sh\n{ending}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("pathfm.study.working.sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr(running, "missing", lambda _: [])
    monkeypatch.setattr(running, "prepare", lambda *_: PREPARED)
    config = StudyConfig(out=tmp_path / "out", tracking=OFF, processes=2)
    with pytest.raises(PathfmError, match=rf"a process ended with {code}; its words are in"):
        running.run_study(study(), config)


def test_other_slides_than_a_grid_was_begun_with_are_refused_at_the_cell_s_end() -> None:
    cell = Cell(study().arms[0], 0)
    _refuse_other_data(cell, PREPARED, {"corpus_digest": "digest"})
    with pytest.raises(PathfmError, match="has changed since this grid was begun"):
        _refuse_other_data(cell, PREPARED, {"corpus_digest": "another"})


def test_a_thinned_grid_has_so_many_of_each_slide_and_magnification(small_corpus: Path) -> None:
    grid = GridSampler(Corpus.open(small_corpus), size_px=64, mpp=[0.5, 1.0], min_foreground=0.0)
    every = grid.draw_batch(np.arange(len(grid)))
    there = Counter(zip(every.slide.tolist(), every.mpp.tolist(), strict=True))
    chosen = thinned(grid, 20)
    kept = grid.draw_batch(chosen)
    assert Counter(zip(kept.slide.tolist(), kept.mpp.tolist(), strict=True)) == {
        sheet: min(20, n) for sheet, n in there.items()
    }
    assert np.array_equal(chosen, np.unique(chosen))
    assert set(thinned(grid, 5).tolist()) < set(chosen.tolist())
    assert len(thinned(grid, None)) == len(grid)
