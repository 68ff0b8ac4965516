"""What a run may be told to draw: laws over µm/px, a share of the slides, few patches of each."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from online_patching import Corpus
from online_patching.sampling.magnification import Continuous, MaxAvg, MinMax
from online_patching.sampling.weights import share_of_slides
from pathfm.config import load_config
from pathfm.pictures import told_mpps
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.records import choose_for_mosaic, sampling_facts
from pathfm.pretrain.sampler import magnifications, sampler_of
from pathfm.runtime import PathfmError, as_dict
from tests.pretraining import config


@pytest.mark.parametrize(
    ("law", "policy"),
    [
        (None, (0.5, 1.0)),
        ("uniform", Continuous(0.5, 1.0, "uniform")),
        ("log", Continuous(0.5, 1.0, "log")),
        ("max-avg", MaxAvg(0.5, 1.0)),
        ("min-max", MinMax(0.5, 1.0)),
    ],
)
def test_a_law_draws_between_the_finest_and_the_coarsest(law, policy):
    assert magnifications(PretrainConfig(mpp=(0.5, 1.0), mpp_law=law)) == policy


def test_a_run_draws_any_magnification_of_its_law(small_corpus: Path, tmp_path: Path):
    sampler = sampler_of(config(small_corpus, tmp_path, mpp_law="log"), Corpus.open(small_corpus))
    drawn = sampler.draw_batch(np.arange(2000)).mpp
    assert len(set(drawn.tolist())) > 1000
    assert 0.5 <= drawn.min() < 0.51
    assert 0.99 < drawn.max() <= 1.0
    assert np.median(np.log2(drawn)) == pytest.approx(-0.5, abs=0.05)  # half of it in each half


def test_a_share_of_the_slides_is_that_of_the_run_s_seed(small_corpus: Path, tmp_path: Path):
    corpus = Corpus.open(small_corpus)
    for seed in range(4):
        settings = config(small_corpus, tmp_path, slide_share=0.67, seed=seed)
        drawn = set(sampler_of(settings, corpus).draw_batch(np.arange(400)).slide.tolist())
        kept = share_of_slides(corpus.slide_ids, 0.67, seed=seed)
        assert drawn == set(np.flatnonzero(kept).tolist())
        assert len(drawn) == 2


def test_a_slide_yields_no_more_than_its_patches(small_corpus: Path, tmp_path: Path):
    settings = config(small_corpus, tmp_path, patches_per_slide=5)
    drawn = sampler_of(settings, Corpus.open(small_corpus)).draw_batch(np.arange(600))
    places = set(zip(*(c.tolist() for c in (drawn.slide, drawn.x_px0, drawn.y_px0)), strict=True))
    assert len(places) == 3 * 5


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--mpp 0.5 --mpp_law log", "mpp_law log draws between two µm/px, mpp has one: 0.5"),
        ("--slide_share 0.1 --labels.column label", "slide_share is of slides without labels"),
        ("--patches_per_slide 9 --labels.patches x", "patches_per_slide is of slides without"),
        ("--mpp_law log --labels.patches x", "mpp_law is of slides without labels"),
        ("--slide_share 0", "slide_share = '0': should be greater than 0"),
        (
            "--mpp_law cubic",
            "mpp_law = 'cubic': should be 'uniform', 'log', 'max-avg' or 'min-max'",
        ),
    ],
)
def test_limits_that_cannot_be_kept_are_refused_in_one_line(words: str, reason: str):
    with pytest.raises(PathfmError, match=reason):
        load_config(PretrainConfig, None, words.split())


def test_a_run_begun_before_there_were_such_limits_goes_on():
    """A setting that an old run's file lacks counts as unset."""
    now: dict[str, Any] = as_dict(PretrainConfig())
    new = ("mpp_law", "slide_share", "patches_per_slide")
    assert [now[name] for name in new] == [None] * 3


def test_few_magnifications_are_told_as_they_are_and_many_in_half_doublings():
    assert told_mpps([0.25, 0.6, 2.0]) == [0.25, 0.6, 2.0]
    many = np.geomspace(0.25, 2.0, 200)
    told = told_mpps(many.tolist())
    assert sorted(set(told)) == [0.25, 0.354, 0.5, 0.707, 1.0, 1.41, 2.0]
    assert np.abs(np.log2(told) - np.log2(many)).max() <= 0.2501
    rows = [{"slide_id": "a", "x_px0": 0, "y_px0": 0, "mpp": mpp} for mpp in many]
    facts = sampling_facts(rows)
    assert len(facts["mpp_share"]) == 7
    assert facts["distinct_patches"] == 200
    refs: Any = [SimpleNamespace(slide_id="a", mpp=mpp) for mpp in many]
    assert choose_for_mosaic(refs)[0] == [i for v in sorted(set(told)) for i in _first_two(told, v)]


def _first_two(told: list[float], value: float) -> list[int]:
    return [i for i, each in enumerate(told) if each == value][:2]
