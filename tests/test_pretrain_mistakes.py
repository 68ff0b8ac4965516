"""Mistakes around `pathfm pretrain`: each is said before anything is lost or begun."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pathfm.pretrain import PretrainConfig, run
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


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of eight grey pictures each."""
    root = tmp_path_factory.mktemp("labelled")
    for shade, name in ((60, "a"), (200, "b")):
        (root / name).mkdir()
        for i in range(8):
            Image.new("L", (20, 20), shade + i).save(root / name / f"{i}.png")
    return root


def watching(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run that probes this folder."""
    return {"curves": False, "probe_folder": folder, "probe_px": 32} | changes


def no_run_in(out: Path) -> bool:
    """Whether nothing was begun there: no config, no tracked run, no picture."""
    return not out.exists() or {path.name for path in out.iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_px": 65}, "input_px = 65 is no multiple of the 16 px patches of test_vit: try 64"),
        ({"watch": {"probe_px": 65}}, "watch.probe_px = 65 is no multiple of the 16 px patches"),
    ],
)
def test_a_size_that_the_backbone_cannot_be_fed_is_refused_before_the_run(
    small_corpus, labelled, tmp_path, changes, said
):
    watch = watching(labelled, **changes.get("watch", {}))
    with pytest.raises(PathfmError, match=said):
        run(config(small_corpus, tmp_path / "run", **(changes | {"watch": watch})))
    assert no_run_in(tmp_path / "run")


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("missing", "no such folder"),
        ("one class", "only the class 'a'"),
        ("few", "too few"),
        ("no picture", r"a/0\.png: not a readable picture"),
        ("corpus", r"holds a corpus \(corpus\.json\)"),
        ("slides", r"holds a corpus \(slides\.parquet\)"),
    ],
)
def test_a_probe_folder_that_is_none_is_refused_before_there_is_a_run_folder(
    small_corpus, labelled, tmp_path, mistake, said
):
    folder = tmp_path / "probed"
    shutil.copytree(labelled, folder)
    if mistake == "missing":
        shutil.rmtree(folder)
    elif mistake == "one class":
        shutil.rmtree(folder / "b")
    elif mistake == "few":
        for i in range(1, 8):
            (folder / "b" / f"{i}.png").unlink()
    elif mistake == "no picture":
        for i in range(8):
            (folder / "a" / f"{i}.png").write_text("no picture")
    elif mistake == "corpus":
        shutil.copy(small_corpus / "corpus.json", folder)
    else:
        (folder / "slides.parquet").touch()
    said = said.replace(r"a/0\.png", r"a/\d\.png")
    with pytest.raises(PathfmError, match=said) as caught:
        run(config(small_corpus, tmp_path / "run", watch=watching(folder)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_probes_picture_that_is_torn_is_refused_before_the_run_is_begun(
    small_corpus, labelled, tmp_path
):
    folder = tmp_path / "probed"
    shutil.copytree(labelled, folder)
    for path in folder.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-30])  # the header is whole
    with pytest.raises(PathfmError, match="not a readable picture"):
        run(config(small_corpus, tmp_path / "run", watch=watching(folder)))
    assert no_run_in(tmp_path / "run")


def test_a_finished_run_asks_for_its_probe_folder_no_more(small_corpus, finished, capsys):
    run(config(small_corpus, finished, steps=2, watch=watching(Path("/nowhere"))))
    assert "up to date" in capsys.readouterr().out


ALONE: list[tuple[dict[str, Any], str]] = [
    ({"method": "simclr"}, "simclr compares patches"),
    ({"method": "supcon"}, "supcon compares patches"),
    ({"method": "dinov2"}, "the koleo term of dinov2 compares patches"),
    ({"method": "dinov2", "dinov2": {"regulariser": "kde"}}, "the kde term of dinov2"),
]


@pytest.mark.parametrize(("changes", "said"), ALONE)
def test_a_batch_of_one_is_refused_where_patches_are_compared(changes, said):
    with pytest.raises(ValueError, match=f"batch_size 1: {said}.*give at least 2"):
        PretrainConfig(batch_size=1, **changes)
    assert PretrainConfig(batch_size=2, **changes).batch_size == 2


def test_a_batch_of_one_may_learn_where_nothing_is_compared():
    for method in ("dino", "supervised"):
        assert PretrainConfig(batch_size=1, method=method).batch_size == 1
    PretrainConfig(batch_size=1, method="dinov2", dinov2={"regulariser_weight": 0})
