"""Confusion matrices as pictures: rows are true classes, shares of each add up to 100 %."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pathfm.compare.drawing import plain_words, save, sheet
from pathfm.compare.records import Confusion


def shares(confusion: Confusion) -> NDArray[np.float64]:
    """Counts as shares of their true class, (classes, classes); NaN for a class without samples."""
    counts = np.asarray(confusion.counts, np.float64)
    total = counts.sum(axis=1, keepdims=True)
    out = np.full_like(counts, np.nan)
    np.divide(counts, total, out=out, where=total > 0)
    return out


def draw_confusions(confusions: Sequence[Confusion]) -> bytes:
    """A panel a model, one task; numbers in per cent of the true class."""
    columns = min(3, len(confusions))
    lines = -(-len(confusions) // columns)
    names = [plain_words(name) for name in confusions[0].classes]
    n = len(names)
    side = min(7.0, 1.6 + 0.42 * n)
    figure, panels = sheet(columns, lines, side * columns, (side + 0.2) * lines)
    for panel, confusion in zip(panels.flat, confusions, strict=False):
        table = shares(confusion)
        panel.imshow(np.nan_to_num(table), cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(table):
            if n <= 12 and np.isfinite(share):
                colour = "white" if share > 0.55 else "#222222"
                text = f"{100 * share:.0f}"
                panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        panel.set_xticks(range(n), names, rotation=45, ha="right", fontsize=7)
        panel.set_yticks(range(n), names, fontsize=7)
        panel.set_xlabel("predicted", fontsize=8)
        panel.set_ylabel("true", fontsize=8)
        panel.set_title(plain_words(confusion.model), fontsize=9)
    for panel in panels.flat[len(confusions) :]:
        panel.set_visible(False)
    return save(figure)
