"""The stream as it was when it was committed: a change here changes every resumed run.

A wanted change (a new stream, said so in the changelog) writes the file anew:
`python -m tests.test_sampler_golden`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from online_patching import PatchSampler
from online_patching.sampling.draws import Sampler
from online_patching.sampling.grid import EpochSampler, GridSampler
from online_patching.sampling.magnification import Continuous, MaxAvg, MinMax
from tests.sampling import three_corpus

GOLDEN = Path(__file__).parent / "golden" / "draws.json"
DRAWS = np.concatenate([np.arange(160), 2**40 + np.arange(40)])

RECIPES: dict[str, dict[str, Any]] = {
    "fixed": {"mpp": 0.6},
    "list": {"mpp": [0.25, 1.0], "mpp_weights": [3, 1]},
    "uniform": {"mpp": Continuous(0.25, 2.0)},
    "log": {"mpp": Continuous(0.25, 2.0, "log")},
    "maxavg info": {"mpp": MaxAvg(0.25, 2.0)},
    "maxavg abs": {"mpp": MaxAvg(0.25, 2.0, "abs", 0.5)},
    "minmax info": {"mpp": MinMax(0.25, 2.0)},
    "minmax abs": {"mpp": MinMax(0.25, 2.0, "abs")},
    "weighted slides": {"slide_weights": [1, 6, 2], "min_foreground": 0.8},
    "four a read": {"patches_per_read": 4},
    "few a slide": {"patches_per_slide": 30},
}


def samplers() -> dict[str, Callable[[], Sampler]]:
    corpus = three_corpus()
    settings = {"size_px": 128, "mpp": [0.25, 1.0], "seed": 0x123456789ABCDEF0}
    made: dict[str, Callable[[], Sampler]] = {
        name: lambda recipe=recipe: PatchSampler(corpus, **(settings | recipe))
        for name, recipe in RECIPES.items()
    }
    grid = {"size_px": 64, "mpp": [0.3, 1.0], "overlap_px": 10}
    made["epochs"] = lambda: EpochSampler(GridSampler(corpus, **grid), seed=77)
    made["context"] = lambda: PatchSampler(corpus, **settings, context=(4.0, 0.5))
    return made


def table(sampler: Sampler) -> dict[str, list[Any]]:
    first = sampler.draw_batch(DRAWS)
    again = sampler.draw_batch(DRAWS[:40], attempt=3)
    parts = [sampler.expand(first) if sampler.context else first, again]
    names = ("attempt", "slide", "mpp", "x_px0", "y_px0")
    return {name: np.concatenate([getattr(p, name) for p in parts]).tolist() for name in names}


@pytest.mark.parametrize("name", [*RECIPES, "epochs", "context"])
def test_the_stream_stays_what_it_was(name):
    assert table(samplers()[name]()) == json.loads(GOLDEN.read_text())[name]


def test_that_test_fails_on_another_stream():
    expected = json.loads(GOLDEN.read_text())
    corpus = three_corpus()
    other = PatchSampler(corpus, size_px=128, mpp=0.6, seed=1)
    assert table(other) != expected["fixed"]


if __name__ == "__main__":
    lines = [
        f"{json.dumps(name)}: {json.dumps(table(make()))}" for name, make in samplers().items()
    ]
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
