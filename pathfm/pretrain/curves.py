"""pictures/curves.png: loss, probe, spread of features, learning rate and speed over the steps.

The points are kept thinned: a run of a million steps costs no more memory than one of thousands.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from online_patching.stores.local import atomic_write_bytes
from pathfm.pictures import COLOURS

_MOST_POINTS = 4000
_PANELS = (
    ("loss", ("loss",), False),
    ("teacher entropy, nats", ("teacher_entropy", "teacher_marginal_entropy"), False),
    ("alignment, uniformity", ("alignment", "uniformity"), False),
    ("probe, balanced accuracy", ("probe_logistic", "probe_knn"), False),
    ("RankMe", ("rankme",), False),
    ("feature std", ("feature_std",), False),
    ("learning rate", ("lr",), False),
    ("gradient norm", ("grad_norm",), True),
    ("patches/s", ("patches_per_s",), False),
    ("waiting for data, share", ("wait_share",), False),
)
_FROM_ZERO = ("learning rate", "patches/s", "waiting for data, share")
_SELDOM = ("rankme", "feature_std", "probe_knn", "probe_logistic")
_WANTED = {key for _, keys, _ in _PANELS for key in keys}


class Curves:
    """Rows of a run as they come; every stride-th is kept, those with a seldom number always."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._stride = 1

    def add(self, step: int, row: Mapping[str, float]) -> None:
        """The numbers of one step, in the order of steps; -1: of the weights a run began with."""
        kept = {key: float(value) for key, value in row.items() if key in _WANTED}
        if step % self._stride and not any(key in kept for key in _SELDOM):
            return
        self._rows.append((step, kept))
        if len(self._rows) > _MOST_POINTS:
            self._stride *= 2
            self._rows = [
                (at, kept)
                for at, kept in self._rows
                if at % self._stride == 0 or any(key in kept for key in _SELDOM)
            ]

    def points(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number; what is not finite is left out.

        A loss is of the weights before its step; what is measured seldom is of those after it.
        """
        after = 1 if key in _SELDOM else 0
        pairs = [
            (step + after, row[key])
            for step, row in self._rows
            if key in row and math.isfinite(row[key])
        ]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def draw(self, path: Path, title: str, marks: Mapping[str, int]) -> None:
        """A panel for each group of numbers the run has; red lines at `marks` (name -> step)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # without pyplot: no global state, no window

        panels = [panel for panel in _PANELS if any(self.points(key)[0] for key in panel[1])]
        if not panels:
            return
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        height = 2.6 * rows + 0.4
        figure = Figure(figsize=(4.2 * columns, height), dpi=100)
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=10)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        # fixed margins: a layout engine takes twice as long as the drawing
        figure.subplots_adjust(
            left=0.6 / (4.2 * columns),
            right=1 - 0.15 / (4.2 * columns),
            bottom=0.5 / height,
            top=1 - 0.62 / height,
            wspace=0.22,
            hspace=0.28,
        )
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, (label, keys, log) in zip(axes, panels, strict=False):
            self._panel(axis, label, keys, log=log, marks=marks)
        for axis in axes[max(0, len(panels) - columns) : len(panels)]:  # each column's lowest
            axis.set_xlabel("optimizer steps", fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, buffer.getvalue())

    def _panel(
        self, axis: Any, label: str, keys: Sequence[str], *, log: bool, marks: Mapping[str, int]
    ) -> None:
        for colour, key in zip(COLOURS, keys, strict=False):
            x, y = self.points(key)
            many = len(x) > 60
            axis.plot(
                x, y, color=colour, lw=1.1, label=key, alpha=0.35 if many else 1.0,
                marker="o" if len(x) <= 30 else None, ms=3,
            )  # fmt: skip
            if many:
                axis.plot(*_smoothed(x, y), color=colour, lw=1.4)
            if log and y and min(y) > 0:
                axis.set_yscale("log")
        for step in marks.values():
            axis.axvline(step, color="#d62728", lw=0.9, ls="--")
        axis.set_title(label, fontsize=9)
        axis.margins(y=0.1)  # room above the highest point
        axis.tick_params(which="both", labelsize=7)
        if label in _FROM_ZERO:
            highest = max((max(y) for _, y in map(self.points, keys) if y), default=0.0)
            axis.set_ylim(0, 1.1 * highest or 1.0)
        axis.grid(alpha=0.25)
        if len(keys) > 1:
            axis.legend(fontsize=7)


def _smoothed(x: Sequence[int], y: Sequence[float]) -> tuple[list[int], list[float]]:
    """A centred mean over a fortieth of the points."""
    width = max(3, len(x) // 40)
    means = [sum(y[i : i + width]) / width for i in range(len(y) - width + 1)]
    return list(x[width // 2 : width // 2 + len(means)]), means
