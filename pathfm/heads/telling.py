"""A probe of heads, as a person reads it."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from pathfm.heads.result import HeadResult, HeadScores
from pathfm.runtime import console


def show(result: HeadResult, judged: str, score: str) -> None:
    """Prints what was judged by which score, the table, paired differences and the caveats.

    judged: such as "48 slides, 2 classes, 12 reported". score: such as "Balanced accuracy".
    """
    out = console()
    out.print(
        f"{result.data}: {judged}: {result.told}. {score}, %{_over(result.models[0])}:",
        markup=False,
        highlight=False,
    )
    out.print(score_table(result))
    for pair in result.paired:
        out.print(pair.told, markup=False, highlight=False)
    for caveat in result.caveats:
        out.print(f"note: {caveat}", markup=False, highlight=False)


def _over(scores: HeadScores) -> str:
    """What the intervals are over, and how many: "18 patients"."""
    if not scores.interval:
        return ", without an interval"
    groups = scores.interval_of.removeprefix("mean over runs, ").removesuffix(" resampled")
    return f", with the mean's 95 % interval over {scores.n_patients:,} {groups}"


def score_table(result: HeadResult) -> Table:
    """One row a model and head: mean, sd over runs, runs, mean epochs, and each class's own score."""
    table = Table("model", "head")
    by_class = any(m.per_class for m in result.models)
    for column in ("mean [interval]", "sd over runs", "runs", "epochs"):
        table.add_column(column, justify="right", no_wrap=column.startswith("mean"))
    for column in result.classes if by_class else ():
        table.add_column(escape(column), justify="right")
    for m in result.models:
        between = ", ".join(f"{100 * v:.1f}" for v in m.interval)
        each = [m.per_class.get(c) for c in result.classes] if by_class else []
        table.add_row(
            escape(m.name),
            m.protocol,
            f"{100 * m.mean:.1f} [{between}]" if m.interval else f"{100 * m.mean:.1f}",
            f"{100 * m.sd:.1f}" if len(m.values) > 1 else "-",
            f"{len(m.values)}",
            f"{m.epochs:.0f}",
            *("-" if v is None else f"{100 * v:.0f}" for v in each),
        )
    return table
