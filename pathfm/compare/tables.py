"""What was found as tables of text, the same for the terminal, the page and Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pathfm.compare.published import LABEL, published_scores
from pathfm.compare.records import Confusion, CorruptedModel, Found, OverMpp, Score, Shots, Task
from pathfm.compare.runs import Comparison

Measured = Score | Shots | OverMpp | Confusion
"""What says whose it is."""


@dataclass(frozen=True)
class Table:
    """A heading, what must be known to read it, and rows; the first column names, others are figures."""

    title: str
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: tuple[int, ...] = ()  # rows that are not ours


def leaderboards(found: Found, published: bool = True) -> Iterator[Table]:
    """One table a protocol: models as rows, data sets as columns, best of the first column first.

    Cells: mean over repeats ± their sd, and [interval of the mean], in per cent. Published rows stand
    in the table of eva's own protocol alone.
    """
    for protocol, tasks in protocols(found.scores).items():
        ours = latest(found.scores, tasks)
        names = labels(ours)
        cells = {(names[entity(s)], s.task): s for s in ours}
        theirs = list(published_scores(tasks)) if published else []
        cells |= {(s.model, s.task): s for s in theirs}
        rows = list(dict.fromkeys(name for name, _ in cells))
        rows.sort(key=lambda name: tuple(-_mean(cells.get((name, task))) for task in tasks))
        body = tuple((name, *(cell(cells.get((name, task))) for task in tasks)) for name in rows)
        marked = tuple(i for i, name in enumerate(rows) if name.endswith(f"({LABEL})"))
        heads = tuple(_heads(tasks))
        metric = tasks[0].metric
        yield Table(
            f"{protocol}: {metric}, %",
            (*_told(tasks, heads), *_left_out(found.scores, ours, tasks), *_about(ours, theirs)),
            ("model", *heads),
            body,
            marked,
        )


def differences(found: Found) -> Iterator[Table]:
    """Every model against its baseline on the same samples: points, [paired interval], p."""
    if not found.differences:
        return
    several = len({d.source for d in found.differences}) > 1
    rows = tuple(
        (
            f"{d.other} − {d.baseline}",
            *((d.source,) if several else ()),
            d.task.data,
            d.task.protocol,
            signed(d.mean),
            f"[{signed(d.interval[0])}, {signed(d.interval[1])}]" if d.interval else "none",
            "" if d.p is None else f"{d.p:.2g}",
        )
        for d in found.differences
    )
    note = (
        "Points of balanced accuracy, other minus baseline, on the same samples and splits. Intervals are of the mean "
        "difference, samples drawn again in pairs; p is of no difference at all, not corrected for the number of rows."
    )
    source = ("from",) if several else ()
    columns = ("models", *source, "data", "protocol", "difference, points", "95 % interval", "p")
    yield Table("Against the baseline", (note,), columns, rows)


def few_shots(found: Found) -> Iterator[Table]:
    """Few-shot scores, a column a number of samples a class."""
    by_task: dict[Task, list[Shots]] = {}
    for curve in found.shots:
        by_task.setdefault(curve.task, []).append(curve)
    for task, curves in by_task.items():
        names = labels(curves)
        every = sorted({k for curve in curves for k in curve.shots})
        rows = []
        for curve in curves:
            at = {k: (m, s) for k, m, s in zip(curve.shots, curve.mean, curve.sd, strict=True)}
            figures = (
                f"{100 * at[k][0]:.1f} ± {100 * at[k][1]:.1f}" if k in at else "" for k in every
            )
            rows.append((names[entity(curve)], *figures))
        notes = (f"{task.told}. Mean ± sd over draws of the training samples.",)
        columns = ("model", *(f"{k} a class" for k in every))
        yield Table(f"{task.data}, {task.protocol}: {task.metric}, %", notes, columns, tuple(rows))


def by_mpp(found: Found) -> Iterator[Table]:
    """Scores at each µm/px of the tested pictures: a table a task, a row a model."""
    by_task: dict[Task, dict[tuple[str, ...], OverMpp]] = {}
    for one in found.over_mpp:
        by_task.setdefault(one.task, {})[entity(one)] = one
    for task, models in by_task.items():
        names = labels(list(models.values()))
        sizes = {mpp: n for one in models.values() for mpp, n in zip(one.mpp, one.n, strict=True)}
        rows = []
        for name, one in models.items():
            at = dict(zip(one.mpp, one.scores, strict=True))
            rows.append(
                (names[name], *(_over(at[mpp]) if mpp in at else "" for mpp in sorted(sizes)))
            )
        counts = ", ".join(f"{sizes[mpp]:,} at {mpp:g}" for mpp in sorted(sizes))
        note = f"{task.told}. One probe for all; reported samples of each µm/px alone: {counts}."
        columns = ("model", *(f"{mpp:g} µm/px" for mpp in sorted(sizes)))
        title = f"{task.data}, {task.protocol}, by µm/px: {task.metric}, %"
        yield Table(title, (note,), columns, tuple(rows))


def _over(score: tuple[float, tuple[float, float] | None]) -> str:
    mean, interval = score
    text = f"{100 * mean:.1f}"
    return (
        text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    )


def robustness_tables(found: Found) -> Iterator[Table]:
    """Two tables a result: mCE and the plain errors of each model, and CE corruption by corruption."""
    for one in found.robustness:
        note = (
            f"{one.told}. Errors are 1 − balanced accuracy. CE: errors of a corruption as per cent of those of "
            f"{one.reference}; mCE is their mean: 100 is no better, less is better."
        )
        yield Table(
            f"{one.data}, corrupted test pictures",
            (note,),
            ("model", "clean error, %", "corrupted error, %", "mCE", "relative mCE"),
            tuple(_robust_row(model) for model in one.models),
        )
        names = tuple(model.name for model in one.models)
        ce = zip(one.corruptions, *(model.ce for model in one.models), strict=True)
        yield Table(
            f"{one.data}, CE of each corruption, % of {one.reference}'s error",
            ("− is left out: the reference hardly errs there, and a share of that is noise.",)
            if any(x is None for model in one.models for x in model.ce)
            else (),
            ("corruption", *names),
            tuple((name, *("−" if x is None else f"{x:.0f}" for x in row)) for name, *row in ce),
        )


def protocols(scores: Sequence[Score]) -> dict[str, list[Task]]:
    """Tasks by protocol and metric, in the order in which they come."""
    tasks: dict[str, list[Task]] = {}
    for score in scores:
        known = tasks.setdefault(score.task.protocol, [])
        if score.task not in known:
            known.append(score.task)
    return tasks


def latest(scores: Sequence[Score], tasks: Sequence[Task]) -> list[Score]:
    """One score of every model on every task: the one that came last, as reruns do."""
    kept = {(entity(s), s.task): s for s in scores if s.task in tasks}
    return list(kept.values())


def entity(score: Measured) -> tuple[str, ...]:
    """What makes a row: the name, the weights, the input size, the pooling, the µm/px asked for."""
    facts = (score.facts.get(key, "") for key in ("input_px", "pooling", "input_mpp"))
    return score.model, score.backbone_digest, *facts


def labels(scores: Sequence[Measured]) -> Mapping[tuple[str, ...], str]:
    """A name for every row: the model's, with what sets it apart from others of that name."""
    every = list(dict.fromkeys(entity(score) for score in scores))
    found = {}
    for one in every:
        name, digest, *inputs = one
        alike = [other for other in every if other[0] == name]
        for at, unit in enumerate(("{} px", "{}", "{} µm/px"), 2):
            if one[at] and len({other[at] for other in alike}) > 1:
                name += f", {unit.format(one[at])}"
        if len({other[1] for other in alike if list(other[2:]) == inputs}) > 1:
            name += f" ({digest[:8] or 'no digest'})"
        found[one] = name
    return found


def cell(score: Score | None) -> str:
    """ "87.8 ± 1.3 [85.9, 89.4]", in per cent; what is not known is left out."""
    if score is None:
        return ""
    text = f"{100 * score.mean:.1f}"
    if score.sd is not None:
        text += f" ± {100 * score.sd:.1f}"
    if score.interval is not None:
        low, high = score.interval
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


def signed(share: float) -> str:
    """Points with a sign, a true minus."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _heads(tasks: Sequence[Task]) -> Iterator[str]:
    """Names of columns, numbered where data sets of one name differ."""
    names = [task.data for task in tasks]
    for i, name in enumerate(names):
        before = names[: i + 1].count(name)
        yield name if names.count(name) == 1 else f"{name} ({before})"


def _told(tasks: Sequence[Task], heads: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{head}: {task.told}." for head, task in zip(heads, tasks, strict=True))


def _left_out(
    scores: Sequence[Score], ours: Sequence[Score], tasks: Sequence[Task]
) -> tuple[str, ...]:
    n = sum(score.task in tasks for score in scores) - len(ours)
    return (f"{n} earlier figures of the same models are left out.",) if n else ()


def _about(ours: Sequence[Score], theirs: Sequence[Score]) -> tuple[str, ...]:
    told = []
    if any(score.sd is not None for score in ours):
        told.append("± is the standard deviation over repeats.")
    over = sorted({score.interval_of for score in ours if score.interval and score.interval_of})
    if over:
        told.append(
            f"[ ] is the 95 % interval of the mean, over {' or '.join(over)} of the reported part."
        )
    if theirs:
        told.append(
            "Rows marked as published are means over runs from the public eva leaderboard, same protocol, not run here."
        )
    return (" ".join(told),) if told else ()


def _mean(score: Score | None) -> float:
    return -1.0 if score is None else score.mean


def _robust_row(model: CorruptedModel) -> tuple[str, ...]:
    return (
        model.name,
        f"{100 * model.clean_error:.1f}",
        f"{100 * model.mean_corrupted_error:.1f}",
        _figure(model.mce),
        _figure(model.relative_mce),
    )


def _figure(figure: tuple[float, float, float] | None) -> str:
    if figure is None:
        return "none"
    value, low, high = figure
    return f"{value:.1f} [{low:.1f}, {high:.1f}]" if low < high else f"{value:.1f}"


def stage_table(part: Comparison) -> Table:
    """The runs of one stage side by side: what differs between them, then what they measured."""
    rows = [(name, *(run.params.get(name, "") for run in part.runs)) for name in part.params]
    for name in part.metrics:
        numbers = (run.metrics.get(name) for run in part.runs)
        rows.append((name, *("" if n is None else f"{n:.5g}" for n in numbers)))
    heads = ("", *(run.name for run in part.runs))
    return Table(f"{part.stage or 'runs'}: params that differ, and metrics", (), heads, tuple(rows))


def every_table(found: Found, published: bool = True) -> list[Table]:
    """All tables in the order of the page."""
    return [
        *leaderboards(found, published),
        *differences(found),
        *few_shots(found),
        *by_mpp(found),
        *robustness_tables(found),
    ]
