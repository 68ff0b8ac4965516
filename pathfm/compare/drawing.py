"""Pictures of scores: one look says who is ahead, by how much, and how sure that is."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

from pathfm.compare.ablation import Ablation
from pathfm.compare.curves import Curve
from pathfm.compare.published import LABEL
from pathfm.compare.records import Robustness, Score, Shots, Task
from pathfm.pictures import COLOURS

SOFTWARE = "pathfm compare"
"""Written into every picture: the next page in the folder replaces those, and no others."""

_SOFT = "#8a8a8a"
_MOST_TICKS = 6  # where the points are so few each has its number
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


def sheet(columns: int, rows: int, width: float, height: float) -> tuple[Any, Any]:
    """A light figure of that many inches and its panels (rows, columns), without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plain_words(text: str) -> str:
    """Text that matplotlib writes as it stands: a name may hold a dollar sign, which begins a formula."""
    return text.replace("$", r"\$")


def save(figure: Any) -> bytes:
    """The figure as a PNG that says whose it is; the same figure gives the same bytes."""
    stored = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in any script: boxes
        figure.savefig(stored, format="png", dpi=120, metadata={"Software": SOFTWARE})
    return stored.getvalue()


def draw_leaderboard(
    ours: Sequence[tuple[str, Score]], theirs: Sequence[Score], tasks: Sequence[Task]
) -> bytes:
    """A panel a data set, a row a model: dot and interval; published figures are hollow diamonds.

    Rows are in the order of the tables: the best of the first data set on top.
    """
    means: dict[str, dict[Task, float]] = {}
    for name, score in [*ours, *((s.model, s) for s in theirs)]:
        means.setdefault(name, {})[score.task] = score.mean
    rows = sorted(means, key=lambda name: tuple(means[name].get(task, -1.0) for task in tasks))
    at = {name: i for i, name in enumerate(rows)}
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    height = 0.3 + lines * (0.9 + 0.3 * len(rows))
    figure, panels = sheet(columns, lines, 3.0 + 2.6 * columns, max(2.3, height))
    figure.suptitle(plain_words(tasks[0].protocol), fontsize=10)
    for panel, task in zip(panels.flat, tasks, strict=False):
        for name, score in ours:
            if score.task == task:
                _dot(panel, at[name], score)
        for score in theirs:
            if score.task == task:
                style = {"marker": "D", "markerfacecolor": "white", "color": _SOFT}
                panel.plot(
                    [100 * score.mean], [at[score.model]], linestyle="", markersize=5, **style
                )
        _name_rows(panel, [name.replace(f" ({LABEL})", " (published)") for name in rows])
        panel.set_title(plain_words(task.data), fontsize=9)
        panel.set_xlabel(f"{task.metric}, %", fontsize=8)
        _at_least(panel, 4.0)
    for panel in panels.flat[len(tasks) :]:
        panel.set_visible(False)
    for row in panels:
        for panel in row[1:]:
            panel.set_yticklabels([])
    return save(figure)


def draw_curves(curves: Sequence[Curve]) -> bytes:
    """Panels of one axis: points with intervals, a line for each way the rest differs."""
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure, panels = sheet(columns, lines, 1.0 + 3.6 * columns, 0.4 + 3.0 * lines)
    for panel, curve in zip(panels.flat, curves, strict=False):
        for n, (name, points) in enumerate(curve.lines.items()):
            x, y = [p.x for p in points], [100 * p.mean for p in points]
            style = {"color": COLOURS[n % len(COLOURS)], "marker": _MARKS[n % len(_MARKS)]}
            panel.plot(x, y, markersize=4, linewidth=1.3, label=plain_words(name) or None, **style)
            for p in points:
                if p.interval is not None:
                    ends = [100 * end for end in p.interval]
                    panel.plot([p.x, p.x], ends, color=style["color"], linewidth=1, alpha=0.6)
        xs = sorted({p.x for points in curve.lines.values() for p in points})
        if min(xs) > 0 and max(xs) / min(xs) >= 8:
            panel.set_xscale("log")
        if len(xs) <= _MOST_TICKS:
            panel.set_xticks(xs, [f"{x:,g}" for x in xs])
            panel.minorticks_off()
        if any(curve.lines):
            panel.legend(fontsize=7)
        panel.set_title(plain_words(f"{curve.task.data}\n{curve.task.protocol}"), fontsize=8)
        panel.set_xlabel(curve.axis, fontsize=8)
        panel.set_ylabel(f"{curve.task.metric}, %", fontsize=8)
        _plain(panel)
    for panel in panels.flat[len(curves) :]:
        panel.set_visible(False)
    return save(figure)


def draw_shots(task: Task, curves: Sequence[Shots]) -> bytes:
    """Score over the number of training samples a class, a band of one sd over draws."""
    figure, ((panel,),) = sheet(1, 1, 5.2, 3.6)
    for n, curve in enumerate(curves):
        y = [100 * mean for mean in curve.mean]
        low, high = (
            [v + sign * 100 * s for v, s in zip(y, curve.sd, strict=True)] for sign in (-1, 1)
        )
        style = {"color": COLOURS[n % len(COLOURS)], "marker": _MARKS[n % len(_MARKS)]}
        panel.plot(
            curve.shots, y, markersize=4, linewidth=1.3, label=plain_words(curve.model), **style
        )
        panel.fill_between(curve.shots, low, high, color=style["color"], alpha=0.15, linewidth=0)
    panel.set_xscale("log", base=2)
    every = sorted({k for curve in curves for k in curve.shots})
    panel.set_xticks(every, [str(k) for k in every])
    panel.set_title(plain_words(f"{task.data}, {task.protocol}"), fontsize=9)
    panel.set_xlabel("training samples a class", fontsize=8)
    panel.set_ylabel(f"{task.metric}, %", fontsize=8)
    panel.legend(fontsize=8)
    _plain(panel)
    return save(figure)


def draw_ablation(ablation: Ablation) -> bytes:
    """Bars from the baseline at 0, paired intervals across their ends; a panel a protocol."""
    columns, n = len(ablation.panels), len(ablation.rows)
    width = min(16.0, 2.6 + 2.7 * columns)
    lines = sum(1 + name.count("\n") for name in ablation.rows)
    figure, panels = sheet(columns, 1, width, 1.5 + 0.3 * n + 0.17 * lines)
    figure.suptitle(plain_words(f"{ablation.data}: against {ablation.baseline}"), fontsize=10)
    for panel, (protocol, bars) in zip(panels[0], ablation.panels.items(), strict=True):
        for row, bar in enumerate(reversed(bars)):
            if bar is None:
                continue
            sure = bar.interval is not None and (bar.interval[0] > 0 or bar.interval[1] < 0)
            sure = sure and (bar.p is None or bar.p < 0.05)  # few groups: intervals are too short
            colour = (COLOURS[2] if bar.mean > 0 else COLOURS[1]) if sure else _SOFT
            panel.barh(row, 100 * bar.mean, height=0.55, color=colour, alpha=0.75)
            if bar.interval is not None:
                ends = [100 * end for end in bar.interval]
                panel.plot(
                    ends, [row, row], color="#222222", linewidth=1.4, marker="|", markersize=7
                )
        panel.axvline(0, color="#222222", linewidth=1)
        _name_rows(panel, list(reversed(ablation.rows)))
        panel.set_title(plain_words(textwrap.fill(protocol, 26)), fontsize=9)
        panel.set_xlabel(plain_words(f"points above {ablation.baseline}"), fontsize=8)
    reach = max(1.0, *(abs(x) for panel in panels[0] for x in panel.get_xlim()))
    for panel in panels[0]:
        panel.set_xlim(-reach, reach)  # one scale: bars of two protocols can be compared
    for panel in panels[0][1:]:
        panel.set_yticklabels([])
    return save(figure)


def draw_corruptions(result: Robustness) -> bytes:
    """CE of every corruption, reference at 100, and beside it the plain errors that CE hides."""
    names = ["mCE", *result.corruptions]
    figure, ((left, right),) = sheet(2, 1, 10.5, 1.6 + 0.36 * len(names))
    for n, model in enumerate(result.models):
        style = {"color": COLOURS[n % len(COLOURS)], "marker": _MARKS[n % len(_MARKS)]}
        ce = [model.mce[0] if model.mce else None, *model.ce]
        errors = [model.mean_corrupted_error, *model.errors]
        rows = list(range(len(names)))[::-1]
        if model.name != result.reference:
            shown = [(row, value) for row, value in zip(rows, ce, strict=True) if value is not None]
            x, y = [value for _, value in shown], [row for row, _ in shown]
            left.plot(x, y, linestyle="", markersize=6, label=plain_words(model.name), **style)
            if model.mce:
                left.plot(
                    model.mce[1:], [rows[0]] * 2, color=style["color"], linewidth=2, alpha=0.6
                )
        x = [100 * error for error in errors]
        right.plot(x, rows, linestyle="", markersize=6, label=plain_words(model.name), **style)
        right.axvline(100 * model.clean_error, color=style["color"], linewidth=1, linestyle=":")
    left.axvline(100, color="#222222", linewidth=1)
    reference = plain_words(result.reference)
    left.set_xlabel(f"CE, % of {reference}'s error (left is better)", fontsize=8)
    right.set_xlabel("error, % (dotted: on clean pictures)", fontsize=8)
    _name_rows(left, names[::-1])
    _name_rows(right, ["mean", *result.corruptions][::-1])
    right.set_xlim(left=0)
    for panel in (left, right):
        panel.axhline(len(names) - 1.5, color="#cccccc", linewidth=0.8)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8)
    return save(figure)


def _dot(panel: Any, row: int, score: Score) -> None:
    """A mean with its interval; without one a thin line of one sd over repeats to either side."""
    panel.plot([100 * score.mean], [row], "o", color=COLOURS[0], markersize=5)
    if score.interval is not None:
        ends, width = score.interval, 1.8
    elif score.sd is not None:
        ends, width = (score.mean - score.sd, score.mean + score.sd), 0.6
    else:
        return
    panel.plot([100 * end for end in ends], [row, row], color=COLOURS[0], linewidth=width)


def _at_least(panel: Any, points: float) -> None:
    """Widens an axis that shows less: a tenth of a point should not fill a panel."""
    low, high = panel.get_xlim()
    lack = max(0.0, points - (high - low)) / 2
    panel.set_xlim(low - lack, high + lack)


def _name_rows(panel: Any, names: Sequence[str]) -> None:
    panel.set_yticks(range(len(names)), [plain_words(name) for name in names], fontsize=8)
    panel.set_ylim(-0.6, len(names) - 0.4)
    panel.grid(axis="x", alpha=0.25)
    _plain(panel)


def _plain(panel: Any) -> None:
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
