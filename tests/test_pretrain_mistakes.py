"""Mistakes around `pathfm pretrain`: each is said before anything is lost or begun."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pathfm.pretrain import run
from pathfm.runtime import PathfmError
from tests.pretraining import TINY, config


@pytest.fixture(scope="module")
def finished(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert run(config(small_corpus, out, steps=2)).finished
    return out


@pytest.fixture
def bare(finished: Path, tmp_path: Path) -> Path:
    """The same run without its checkpoints."""
    out = tmp_path / "bare"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("checkpoints"))
    return out


def written(out: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("gone", [[], ["summary.json"]])
def test_a_finished_run_stays_finished_when_its_checkpoints_are_gone(
    small_corpus, bare, capsys, gone
):
    for name in gone:
        (bare / name).unlink()
    before = written(bare)
    assert run(config(small_corpus, bare, steps=2)).finished
    assert "up to date (2 steps)" in capsys.readouterr().out
    assert written(bare) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method": "simclr", "views": {**TINY["views"], "n_local": 0}},
            "method = dino, asked for is simclr",
        ),
        ({"seed": 1}, "seed = 0, asked for is 1"),
        ({"weights": "random:4"}, "weights = random:3, asked for is random:4"),
    ],
)
def test_another_run_never_replaces_a_finished_one_without_checkpoints(
    small_corpus, bare, changes, said
):
    before = written(bare)
    with pytest.raises(PathfmError, match=f"{said}.*another --out"):
        run(config(small_corpus, bare, steps=2, **changes))
    assert written(bare) == before


def test_nothing_replaces_a_finished_run_whose_settings_or_corpus_are_not_its_own(
    small_corpus, bare
):
    summary = (bare / "summary.json").read_text()
    (bare / "summary.json").write_text(summary.replace('"corpus_digest": "', '"corpus_digest": "f'))
    with pytest.raises(PathfmError, match=r"on the corpus f.*another --out"):
        run(config(small_corpus, bare, steps=2))
    (bare / "config.yaml").unlink()
    with pytest.raises(PathfmError, match=r"no config.yaml to compare.*another --out"):
        run(config(small_corpus, bare, steps=2))


def damage(out: Path) -> int:
    """Cuts every checkpoint short; how many there are."""
    states = sorted(out.glob("checkpoints/step_*/state.json"))
    for state in states:
        state.write_bytes(state.read_bytes()[:-9])
    return len(states)


def test_that_no_checkpoint_is_whole_is_said_and_where_the_run_begins(
    small_corpus, finished, tmp_path, capsys
):
    out = tmp_path / "finished"
    shutil.copytree(finished, out)
    assert damage(out) == 1
    assert run(config(small_corpus, out, steps=2)).finished
    told = capsys.readouterr().out
    assert "none of the 1 checkpoint(s)" in told
    assert "no earlier one, but the run is finished" in told

    out = tmp_path / "unfinished"
    run(config(small_corpus, out, checkpoint_every_steps=1, stop_after_steps=2))
    assert damage(out) == 2
    capsys.readouterr()
    with pytest.raises(PathfmError, match="seed = 0, asked for is 1"):
        run(config(small_corpus, out, seed=1))
    run(config(small_corpus, out, stop_after_steps=1))
    told = capsys.readouterr().out
    assert "none of the 2 checkpoint(s)" in told
    assert "no earlier one, so the run starts at step 0" in told


def test_a_run_killed_before_its_first_checkpoint_says_that_it_starts_at_step_0(
    small_corpus, tmp_path, capsys
):
    asked = config(small_corpus, tmp_path, stop_after_steps=1)
    run(asked)
    assert (
        "no checkpoint yet" not in capsys.readouterr().out
    )  # of a new run there is nothing to say
    shutil.rmtree(tmp_path / "checkpoints")
    run(asked)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "no checkpoint yet" in line]) == 1
    assert any(line.endswith("starts at step 0") for line in lines)


def test_settings_that_a_finished_run_does_not_heed_are_said(small_corpus, finished, capsys):
    words = "(watch and tracking settings given now have no effect on it)"
    run(config(small_corpus, finished, steps=2))
    assert words not in capsys.readouterr().out
    for changes in (
        {"watch": {"curves": False, "every_steps": 7}},
        {"tracking": {"enabled": True}},
    ):
        run(config(small_corpus, finished, steps=2, **changes))
        assert words in capsys.readouterr().out
