"""What an evaluation prints."""

from __future__ import annotations

import math

from rich.markup import escape
from rich.table import Table

from pathfm.foreground_evaluate import (
    RESULT,
    TABLE,
    ForegroundEvaluateConfig,
    ForegroundEvaluateResult,
)
from pathfm.foreground_evaluate.summing import Score, Summary
from pathfm.runtime import console
from pathfm.segmentation.truth import INSIDE, OUTSIDE

LABELS = {
    "dice": "Dice",
    "iou": "IoU",
    "mcc": "MCC",
    "boundary_f": "boundary F",
    "tissue_lost": "tissue lost",
    "glass_taken": "glass taken",
}


def show(result: ForegroundEvaluateResult, config: ForegroundEvaluateConfig) -> None:
    """Prints a table of means and one of worst pictures and kinds, then the targets."""
    out = console()
    for part in (result.drawn, result.synthetic):
        if part is None:
            continue
        which = (
            f"drawn pictures ({config.split})" if part.data == "drawn" else "synthetic thumbnails"
        )
        out.print(
            f"{part.pictures} {which} of {part.sources} sources. Mean, 95 % interval over sources; "
            f"below it the worst picture:",
            markup=False,
            highlight=False,
        )
        out.print(_scores(part))
        out.print(_shares(part))
        for line in _lines(part):
            out.print(line, markup=False, highlight=False)
    if result.drawn is not None:
        out.print(f"overlays, worst first: {result.page}", markup=False, highlight=False)
    out.print(
        f"written: {config.out / RESULT}, {config.out / TABLE}", markup=False, highlight=False
    )


def _scores(part: Summary) -> Table:
    table = Table("method", show_lines=True)
    for label in LABELS.values():
        table.add_column(label, justify="right", no_wrap=True)
    for name, method in part.methods.items():
        table.add_row(escape(name), *(_cell(method.scores[score]) for score in LABELS))
    return table


def _cell(score: Score) -> str:
    if math.isnan(score.mean):
        return "-"
    return f"{score.mean:.3f} {score.low:.3f}..{score.high:.3f}\n{score.worst:.3f}"


def _shares(part: Summary) -> Table:
    """Dice by stain group, and the kinds."""
    groups = sorted({group for m in part.methods.values() for group in m.groups["dice"]})
    table = Table("method", *(f"Dice {escape(group)}" for group in groups))
    for kind in OUTSIDE:
        table.add_column(f"{kind} outside", justify="right")
    for kind in INSIDE:
        table.add_column(f"{kind} inside", justify="right")
    table.add_column("worst picture by Dice", overflow="fold")
    for name, method in part.methods.items():
        cells = [f"{method.groups['dice'][group]:.3f}" for group in groups]
        cells += [share(1 - method.inside[kind]) for kind in OUTSIDE]
        cells += [share(method.inside[kind]) for kind in INSIDE]
        table.add_row(escape(name), *cells, escape(method.scores["dice"].worst_picture))
    return table


def share(value: float) -> str:
    """A share in per cent, or a dash for none."""
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _lines(part: Summary) -> list[str]:
    lines = [
        f"{d.model} minus {d.threshold}, Dice, paired: {d.mean:+.4f} ({d.low:+.4f}..{d.high:+.4f}), "
        f"better on {d.better_on} of {d.pictures}"
        for d in part.differences
    ]
    if part.agreement:
        each = ", ".join(f"{name} {dice:.4f}" for name, dice in part.agreement.items())
        lines.append(f"the drawer with themself, Dice: {part.agreement_mean:.4f} ({each})")
    elif part.data == "drawn":
        lines.append("the drawer with themself: no picture was drawn twice")
    for target in part.targets:
        verdict = "not judged" if target.met is None else "yes" if target.met else "NO"
        lines.append(f"{target.method}: {target.name}: {verdict} ({target.said})")
    return lines
