"""The picture of effective receptive fields."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from pathfm.erf.fields import SHARES, Field2d

_SCALE_BARS_PX = (500, 200, 100, 50, 20, 10, 5, 2, 1)
_PANEL_IN, _TITLE_IN = 1.85, 0.5


def drawn(fields: Sequence[Field2d], size_px: int) -> bytes:
    """A PNG: a column for each output, untrained above trained, gradients on one log scale.

    Shown is the root of the energy over its maximum, down to 1/1000, with circles that hold the shares.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((f.network, f.output) for f in fields))
    rows = sorted({f.trained for f in fields})
    width, height = 1.2 + _PANEL_IN * len(columns), 0.1 + (_PANEL_IN + _TITLE_IN) * len(rows)
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)

    def place(x: float, y: float, wide: float, tall: float) -> Any:
        """Axes in inches from the upper left corner."""
        return figure.add_axes((x / width, 1 - (y + tall) / height, wide / width, tall / height))

    shown: Any = None
    for field in fields:
        row, column = rows.index(field.trained), columns.index((field.network, field.output))
        y = _TITLE_IN + row * (_PANEL_IN + _TITLE_IN)
        axis = place(0.3 + column * _PANEL_IN, y, _PANEL_IN - 0.1, _PANEL_IN - 0.1)
        amplitude = np.sqrt(field.energy / field.energy.max()).clip(1e-3, 1)
        extent = (0, size_px, size_px, 0)
        shown = axis.imshow(amplitude, cmap="magma", norm=LogNorm(1e-3, 1), extent=extent)
        axis.set_axis_off()
        _annotate(axis, field, size_px)
    for row, trained in enumerate(rows):
        middle = 1 - (_TITLE_IN + row * (_PANEL_IN + _TITLE_IN) + _PANEL_IN / 2) / height
        name = "trained" if trained else "untrained"
        figure.text(0.08 / width, middle, name, rotation=90, va="center", fontsize=9)
    bar = place(width - 0.75, _TITLE_IN + 0.1, 0.12, _PANEL_IN - 0.3)
    figure.colorbar(shown, cax=bar).ax.tick_params(labelsize=7)
    bar.set_title("gradient\n/ largest", fontsize=7)
    page = io.BytesIO()
    figure.savefig(page, format="png", metadata={"Software": None})
    return page.getvalue()


def _annotate(axis: Any, field: Field2d, size_px: int) -> None:
    """Circles of the shares, a scale bar, the radii in words."""
    from matplotlib.patches import Circle

    y, x = field.centre
    radii = [field.radius_px(share) for share in SHARES]
    for radius, style in zip(radii, ("-", "--"), strict=True):
        axis.add_patch(Circle((x, y), radius, fill=False, color="#5ce1e6", lw=0.9, ls=style))
    axis.set_xlim(0, size_px)
    axis.set_ylim(size_px, 0)
    left, low = 0.06 * size_px, 0.94 * size_px
    bar_px = next((length for length in _SCALE_BARS_PX if length <= 0.45 * size_px), 1)
    axis.plot([left, left + bar_px], [low, low], color="white", lw=2, solid_capstyle="butt")
    axis.text(left, low - 0.02 * size_px, f"{bar_px} px", color="white", fontsize=6.5)
    words_ = ", ".join(f"{s:.0%}: {r:.0f} px" for s, r in zip(SHARES, radii, strict=True))
    axis.set_title(f"{field.network}\n{field.output}\n{words_}", fontsize=7)
