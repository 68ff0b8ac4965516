"""Pictures of a study that a reader grasps at a look: every seed, the differences, the curves."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from online_patching.stores.local import atomic_write_bytes
from pathfm.compare.drawing import plain_words, save, sheet
from pathfm.pictures import COLOURS
from pathfm.study.judging import Judged, Results
from pathfm.study.metrics import higher_is_better, scale_of, unit_of, words_of, words_of_curve
from pathfm.study.plan import Study

_SOFT = "#8a8a8a"
_SAYS = {"yes": "#009e73", "no": "#d55e00", "cannot tell": "#8a8a8a", "not finished": "#8a8a8a"}


def draw_verdict(study: Study, judged: Judged, path: Path) -> Path:
    """Left every seed of every arm, right the differences that are judged, with intervals and margin."""
    rows = max(len(study.arms), len(judged.differences))
    figure, panels = sheet(2, 1, 11.5, 1.6 + 0.5 * rows)
    _values(study, judged, study.criterion.metric, panels[0][0])
    _differences(study, judged, panels[0][1])
    return atomic(path, save(figure))


def draw_others(study: Study, judged: Judged, path: Path) -> Path | None:
    """A panel for each further metric; None where there is none."""
    names = [m for m in study.also_shown if any(judged.values[m].values())]
    if not names:
        return None
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, panels = sheet(columns, lines, 4.6 * columns, lines * (1.3 + 0.36 * len(study.arms)))
    for number, panel in enumerate(panels.reshape(-1)):
        if number < len(names):
            _values(study, judged, names[number], panel)
        else:
            panel.set_axis_off()
    return atomic(path, save(figure))


def draw_curves(study: Study, results: Results, path: Path) -> Path | None:
    """The number watched in training against optimizer steps: a line an arm, faint ones for its seeds."""
    name = study.curves
    found = {arm.name: _curves(study, results, arm.name) for arm in study.arms} if name else {}
    if not any(found.values()) or name is None:
        return None
    scale = 100.0 if name.startswith("probe_") else 1.0
    figure, panels = sheet(1, 1, 8.0, 4.2)
    panel = panels[0][0]
    for number, (arm, curves) in enumerate(found.items()):
        colour = COLOURS[number % len(COLOURS)]
        for points in curves:
            panel.plot(points[:, 0], scale * points[:, 1], color=colour, alpha=0.3, linewidth=1)
        if curves:
            n = min(len(points) for points in curves)  # as far as all seeds have come
            mean = np.mean([points[:n] for points in curves], axis=0)
            panel.plot(
                mean[:, 0],
                scale * mean[:, 1],
                "o-",
                color=colour,
                linewidth=2.4,
                markersize=4,
                clip_on=False,
            )
            panel.annotate(
                plain_words(arm), (mean[-1, 0], scale * mean[-1, 1]), (6, 0), color=colour,
                textcoords="offset points", va="center", fontsize=10,
            )  # fmt: skip
    panel.margins(x=0.16)
    panel.set_xlim(left=0)
    panel.set_xlabel("optimizer steps")
    percent = ", %" if scale == 100 else ""
    title = f"{words_of_curve(name)}{percent}; thin: each seed"
    panel.set_title(title, fontsize=10, loc="left")
    _plain(panel)
    return atomic(path, save(figure))


def _curves(study: Study, results: Results, arm: str) -> list[Any]:
    cells = [results.get(f"{arm}-s{seed}") for seed in range(study.seeds)]
    found = [np.asarray(c["curves"].get(study.curves, []), float) for c in cells if c is not None]
    return [points for points in found if len(points)]


def _values(study: Study, judged: Judged, metric: str, panel: Any) -> None:
    """A row an arm: a dot a seed, a bar for the mean; a dashed line where everything began."""
    scale, unit = scale_of(metric), unit_of(metric)
    names = [arm.name for arm in study.arms][::-1]
    for row, name in enumerate(names):
        values = [scale * value for value in judged.values[metric][name]]
        if values:
            panel.plot(
                [np.mean(values)] * 2, [row - 0.28, row + 0.28], color=COLOURS[0], linewidth=3
            )
        panel.plot(values, [row] * len(values), "o", color=COLOURS[0], alpha=0.55, markersize=7)
    for name, values in judged.values[metric].items():
        if name not in names and values:
            _line(panel, scale * float(np.mean(values)), name, "--")
    panel.set_yticks(range(len(names)), [plain_words(name) for name in names])
    panel.set_ylim(-0.7, len(names) - 0.3)
    better = "" if metric.startswith("run/") else f", {_better(metric)}"
    title = f"{words_of(metric)}{f', {unit}' if unit else ''}{better}"
    panel.set_title(textwrap.fill(title, 52), fontsize=10, loc="left")
    _plain(panel)


def _better(metric: str) -> str:
    return "better →" if higher_is_better(metric) else "← better"


def _line(panel: Any, at: float, name: str, style: str, foot: bool = False) -> None:
    """A vertical line with its name at the top, or at the foot."""
    panel.axvline(at, color=_SOFT, linestyle=style, linewidth=1.2)
    panel.annotate(
        plain_words(name), (at, 0.0 if foot else 1.0), (3, 3 if foot else -3), color=_SOFT, fontsize=8,
        va="bottom" if foot else "top", xycoords=("data", "axes fraction"), textcoords="offset points",
    )  # fmt: skip


def _differences(study: Study, judged: Judged, panel: Any) -> None:
    """A row a difference: a dot a seed, a bar for the interval; a line that the whole bar must be beyond for a yes."""
    criterion = study.criterion
    scale = scale_of(criterion.metric)
    sign = 1.0 if higher_is_better(criterion.metric) else -1.0
    rows = list(zip(judged.differences, judged.answers, strict=True))[::-1]
    for row, (each, said) in enumerate(rows):
        colour = _SAYS["not finished" if judged.verdict == "not finished" else said]
        if math.isfinite(each.low):
            panel.plot([scale * each.low, scale * each.high], [row, row], color=colour, linewidth=3)
        values = [scale * value for value in each.values]
        panel.plot(values, [row] * len(values), "o", color=colour, alpha=0.55)
        if values:
            panel.plot([scale * each.mean] * 2, [row - 0.2, row + 0.2], color=colour, linewidth=3)
            told = "" if judged.verdict == "not finished" else said
            panel.annotate(
                told, (scale * each.mean, row + 0.24), color=colour, ha="center", fontsize=9
            )
    panel.axvline(0.0, color=_SOFT, linewidth=0.8, linestyle=":")
    beyond = ("right", "left") if sign > 0 else ("left", "right")
    where = "all of the bar {} of this"
    _line(panel, scale * sign * criterion.margin, f"a yes: {where.format(beyond[0])}", "-")
    if criterion.matters is not None:
        no = f"a no: {where.format(beyond[1])}"
        _line(panel, scale * sign * criterion.matters, no, "-", foot=True)
    labels = [plain_words(f"{each.arm}\n− {each.against}") for each, _ in rows]
    panel.set_yticks(range(len(rows)), labels)
    panel.set_ylim(-0.7, len(rows) - 0.3)
    of = "points, " if unit_of(criterion.metric) == "%" else ""
    level = f"{100 * criterion.level:g} % interval over {study.seeds} seeds"
    title = f"difference, {of}{_better(criterion.metric)}; bar: {level}"
    panel.set_title(textwrap.fill(title, 60), fontsize=10, loc="left")
    _plain(panel)


def atomic(path: Path, content: bytes) -> Path:
    """Writes a picture whole or not at all."""
    atomic_write_bytes(path, content)
    return path


def _plain(panel: Any) -> None:
    panel.tick_params(labelsize=9)
    panel.grid(axis="x", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
