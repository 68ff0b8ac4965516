"""Slides to bags: the features of the very patches that the coordinates name, once a slide."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from online_patching import Corpus, ForegroundMask, SlideIndex, open_slide, read_slide_index
from pathfm.embed import EmbedConfig, SlideOptions, run
from pathfm.embed.slide_tasks import Task, choose, open_grid, share
from pathfm.embed.slides import is_corpus
from pathfm.embeddings.bags import Bag, find_bags, read_bag
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig

QUIET = TrackingConfig(enabled=False)
MODEL = """
import torch
from torch import nn

class Colour(nn.Module):
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x[:, :, 3, 5]], dim=1)

def make(): return Colour()
"""


def config(corpus: Path, **change: object) -> EmbedConfig:
    told = {
        "data": corpus,
        "weights": "python:colour_model:make",
        "name": "colour",
        "out": Path("out"),
        "input_px": 64,
        "mpp": 1.1,
        "precision": "fp32",
        "slides": SlideOptions(overlap_px=8),
        "tracking": QUIET,
    }
    return EmbedConfig(**(told | change))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colour_model.py").write_text(MODEL)


def bags(folder: str = "out/colour") -> dict[str, Bag]:
    return {slide_id: read_bag(path) for slide_id, path in find_bags(Path(folder)).items()}


def test_a_bag_holds_the_features_of_the_patches_at_its_coordinates(
    small_corpus: Path, small_indexes: list[SlideIndex]
) -> None:
    assert is_corpus(small_corpus) and not is_corpus(small_corpus / "slides")
    result = run(config(small_corpus))
    found = bags()
    assert result.path == Path("out/colour")
    assert sorted(found) == sorted(index.slide_id for index in small_indexes)
    for index in small_indexes:
        bag, slide = found[index.slide_id], open_slide(index.uri)
        side_px0 = 64 * 1.1 / index.mpp_x
        step = side_px0 * 56 / 64
        across, down = (
            1 + int(np.ceil((side - side_px0) / step - 1e-6)) for side in index.dimensions
        )
        assert len(bag.features) == across * down == len({*map(tuple, bag.coords_px0)})
        for i in (0, 7, len(bag.features) - 1):
            x, y = bag.coords_px0[i].tolist()
            pixels = slide.read_patch(
                x_um=x * index.mpp_x, y_um=y * index.mpp_y, mpp=1.1, size_px=64
            )
            scaled = (pixels / 255 - 0.5) / 0.25
            wanted = np.concatenate([scaled.mean(axis=(0, 1)), scaled[3, 5]])
            np.testing.assert_allclose(bag.features[i], wanted, atol=1e-4)
        assert bag.facts.mpp == 1.1
        assert bag.facts.level0_mpp == pytest.approx(index.mpp_x)
        assert bag.attributes["patch_size_level0"] == round(side_px0)


def test_a_slide_is_embedded_once_and_again_when_anything_changed(small_corpus: Path) -> None:
    run(config(small_corpus))
    paths = find_bags(Path("out/colour"))
    first = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    assert run(config(small_corpus)).skipped
    gone, *rest = sorted(paths)
    paths[gone].unlink()
    paths[rest[0]].write_bytes(b"torn")
    assert not run(config(small_corpus)).skipped
    after = {name: path.stat().st_mtime_ns for name, path in find_bags(Path("out/colour")).items()}
    assert {name for name in after if after[name] != first[name]} == {gone, rest[0]}
    keys = {name: bag.facts.key for name, bag in bags().items()}
    for change in ({"mpp": 1.2}, {"std": (1, 1, 1)}, {"slides": SlideOptions()}):
        assert not run(config(small_corpus, **change)).skipped
        assert all(bag.facts.key != keys[name] for name, bag in bags().items())


def test_patches_drawn_of_a_slide_follow_from_seed_and_slide_alone(
    small_corpus: Path, small_indexes: list[SlideIndex]
) -> None:
    told = config(small_corpus, slides=SlideOptions(patches_per_slide=5))
    run(told)
    grid = open_grid(told)
    for row in range(len(grid.corpus)):
        all_of = grid.draw_batch(choose(grid, row, None, 0))
        bag = bags()[grid.corpus.slide_id(row)]
        corners = {*zip(all_of.x_px0.tolist(), all_of.y_px0.tolist(), strict=True)}
        assert len(bag.features) == 5
        assert {tuple(c) for c in bag.coords_px0.tolist()} < corners
        assert choose(grid, row, 5, 0).tolist() != choose(grid, row, 5, 1).tolist()
    alone = Path("alone")
    index = small_indexes[1]
    index.save(alone / "slides" / f"{index.slide_id}.index")
    ForegroundMask.everything(index).save(alone / "masks" / f"{index.slide_id}.png")
    Corpus.build(alone)
    run(told.model_copy(update={"data": alone, "out": Path("other")}))
    both = bags()[index.slide_id], bags("other/colour")[index.slide_id]
    np.testing.assert_array_equal(both[0].coords_px0, both[1].coords_px0)
    assert both[0].facts.key == both[1].facts.key


def test_a_larger_patch_is_resized_to_the_input(small_corpus: Path) -> None:
    run(config(small_corpus, slides=SlideOptions(size_px=128), mpp=0.55))
    bag = next(iter(bags().values()))
    assert (bag.facts.patch_px, bag.facts.mpp) == (128, 0.55)


def test_tasks_are_shared_so_that_every_rank_has_about_as_much() -> None:
    sizes = [100, 90, 40, 30, 30, 10]
    tasks = [Task(row, np.arange(n), None, Path(str(row))) for row, n in enumerate(sizes)]  # type: ignore[arg-type]
    shares = [share(tasks, rank, 3) for rank in range(3)]
    assert sorted(task.row for one in shares for task in one) == [*range(6)]
    assert [sum(len(task.chosen) for task in one) for one in shares] == [100, 100, 100]


@pytest.fixture
def damaged(small_slides: list[Path], tmp_path: Path) -> Path:
    """A corpus of two slides, one of which was deleted since."""
    folder = tmp_path / "corpus"
    for source in small_slides[:2]:
        copy = tmp_path / source.name
        shutil.copy(source, copy)
        index = read_slide_index(str(copy))
        index.save(folder / "slides" / f"{index.slide_id}.index")
        ForegroundMask.everything(index).save(folder / "masks" / f"{index.slide_id}.png")
    Corpus.build(folder)
    copy.unlink()
    return folder


def test_a_slide_that_cannot_be_read_is_listed_and_too_many_are_an_error(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PathfmError, match=r"1 of 2 slides could not be read, first rgb") as caught:
        run(config(damaged))
    assert "\n" not in str(caught.value)
    assert "rgb" in Path("out/colour/failed.csv").read_text()
    assert [*bags()] == ["ycbcr"]  # what was read is kept
    result = run(config(damaged, slides=SlideOptions(overlap_px=8, max_failed_fraction=0.5)))
    assert not result.skipped
    assert "1 slides could not be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mpp": None}, "is a corpus: set mpp"),
        ({"storage": "bf16"}, "storage = 'bf16' has no effect"),
        ({"per_class": 3}, "per_class = 3 has no effect"),
    ],
)
def test_settings_that_a_corpus_cannot_follow_are_told(
    small_corpus: Path, change: dict[str, object], words: str
) -> None:
    with pytest.raises(PathfmError, match=words):
        run(config(small_corpus, **change))


def test_a_corpus_that_is_not_finished_is_refused(damaged: Path) -> None:
    (damaged / "index.unfinished").write_text("")
    with pytest.raises(PathfmError, match="indexing was not finished"):
        run(config(damaged))


@pytest.mark.slow
def test_two_ranks_write_the_bags_that_one_writes(small_corpus: Path) -> None:
    run(config(small_corpus))
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words += ["--master-port", str(29_900 + os.getpid() % 90), "-m", "pathfm", "embed"]
    words += ["--data", str(small_corpus), "--weights", "python:colour_model:make"]
    words += ["--name", "colour", "--out", "shared", "--input_px", "64", "--mpp", "1.1"]
    words += ["--precision", "fp32", "--slides.overlap_px", "8", "--tracking.enabled", "false"]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "3 slides" in done.stdout
    alone, shared = bags(), bags("shared/colour")
    assert [*alone] == [*shared]
    for name, bag in alone.items():
        np.testing.assert_array_equal(bag.features, shared[name].features)
        np.testing.assert_array_equal(bag.coords_px0, shared[name].coords_px0)
