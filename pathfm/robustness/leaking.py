"""Tested pictures that a model has seen in pretraining: refused, or told in the table's notes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pathfm.datasets import Benchmark
from pathfm.leakage import check_beside, refuse_or_mark, salt_at_hand
from pathfm.robustness.features import clean_place
from pathfm.robustness.settings import RobustnessConfig

if TYPE_CHECKING:
    from pathfm.models import Embedder


def leaks_of(
    models: Mapping[str, Embedder],
    samples: Benchmark,
    tested: NDArray[np.int64],
    config: RobustnessConfig,
) -> list[str]:
    """A line for each model of which not everything is known to be clean; () where all are.

    Looked for before any feature is made, once a model and data set: `<out>/features/<model>/clean.leaks.json`
    keeps it. Also of the reference, which every ratio rests on. Raises `PathfmError` where a tested row
    was seen and `config.leaks` is "refuse".
    """
    ids, weights = salt_at_hand(config.out), config.named_models()
    lines = []
    for name, model in models.items():
        path, key = clean_place(name, model, samples, config)
        found = check_beside(path, key, weights[name], samples, config.threads, ids)
        line = refuse_or_mark(found, config.leaks, tested, samples.paths)
        if line:
            lines.append(f"{name}: {line}")
    return lines
