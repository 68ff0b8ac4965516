"""Confusion matrices of a backbone's probes as one picture: counts, and shares of the true class."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from online_patching.stores.local import atomic_write_bytes
from pathfm.probing.scoring import Scores

_MOST_WRITTEN = 14  # classes; of more, cells are too small for their numbers
_CELL_INCHES, _LEAST_INCHES, _MOST_INCHES = 0.52, 2.6, 9.0
_MOST_LETTERS = 18


def draw_matrices(
    name: str, probes: Mapping[str, Scores], classes: Sequence[str], path: Path
) -> Path:
    """Writes a PNG with a panel a probe: row = true class, column = predicted, colour = share of the row.

    A cell says the share in per cent, and below it the count, summed over repeats; nothing where it is 0.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = min(_MOST_INCHES, max(_LEAST_INCHES, _CELL_INCHES * len(classes)))
    figure = Figure(figsize=((side + 1.3) * len(probes), side + 1.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(probes), squeeze=False)[0]
    shown = [_short(each) for each in classes]
    for panel, (probe, scores) in zip(panels, probes.items(), strict=True):
        _draw(panel, np.asarray(scores.confusion, np.int64), shown)
        repeats = f"{len(scores.values)} repeat{'' if len(scores.values) == 1 else 's'}"
        panel.set_title(
            f"{probe}: balanced accuracy {100 * scores.mean:.1f} %, {repeats}", fontsize=9
        )
    said = "large: % of the true class; small: pictures, repeats together; empty: none"
    if len(classes) > _MOST_WRITTEN:
        said = "colour: share of the true class"
    figure.suptitle(f"{_short(name, 60)} ({said})", fontsize=10)
    stored = io.BytesIO()
    figure.savefig(stored, format="png", dpi=110, metadata={"Software": None})
    atomic_write_bytes(path, stored.getvalue())
    return path


def _draw(panel: Any, counts: np.ndarray[Any, Any], classes: Sequence[str]) -> None:
    total = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if len(classes) <= _MOST_WRITTEN and count:
            dark = shares[row, column] > 0.55
            style = {"ha": "center", "color": "white" if dark else "#222222"}
            panel.text(
                column,
                row - 0.02,
                f"{100 * shares[row, column]:.0f}",
                va="bottom",
                fontsize=9,
                **style,
            )
            panel.text(column, row + 0.08, f"{count:,}", va="top", fontsize=7, **style)
    places = range(len(classes))
    panel.set_xticks(places, classes, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    panel.set_yticks(places, classes, fontsize=8)
    panel.set_xlabel("predicted", fontsize=8)
    panel.set_ylabel("true", fontsize=8)
    panel.tick_params(length=0)


def _short(text: str, most: int = _MOST_LETTERS) -> str:
    """Text that fits, with a dollar sign (which begins a formula) as it stands."""
    kept = text if len(text) <= most else f"{text[: most - 1]}…"
    return kept.replace("$", r"\$")
