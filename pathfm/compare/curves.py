"""Scaling curves: scores over a number that differs between runs, a line for each way the rest differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pathfm.compare.records import OverMpp, Score, Task
from pathfm.compare.tables import entity, labels, latest, protocols
from pathfm.runtime import PathfmError

_ALWAYS = ("patches_seen", "slides_seen", "dim", "input_px")
"""Figures that are no params and yet worth an axis; any other is one when it is asked for."""
_MOST_LINES = 7
_MOST_AXES = 6
_NEVER = ("seed", "run", "weights", "labels.", "probe_folder")


@dataclass(frozen=True)
class Point:
    """One score on a curve."""

    x: float
    mean: float
    interval: tuple[float, float] | None
    model: str


@dataclass(frozen=True)
class Curve:
    """Scores of one task over one axis; lines by what else differs ("" where nothing does)."""

    task: Task
    axis: str
    lines: Mapping[str, tuple[Point, ...]]
    note: str


def scaling(scores: Sequence[Score], params: frozenset[str], axes: Sequence[str]) -> list[Curve]:
    """The curves of every task and axis.

    axes: names of facts, each needs two values of a number on some task (else `PathfmError`); none
    given: those params and `_ALWAYS` with three values or more. params: which facts are params.
    """
    curves = []
    for tasks in protocols(scores).values():
        for task in tasks:
            here = latest(scores, [task])
            wanted = list(axes) or _differing(here, params)
            curves += [c for axis in wanted if (c := _curve(task, here, axis, params, bool(axes)))]
    missing = [axis for axis in axes if not any(curve.axis == axis for curve in curves)]
    if missing:
        known = sorted({k for s in scores for k, v in s.facts.items() if _number(v) is not None})
        raise PathfmError(
            f"axes: no task has two models that differ in {missing[0]!r}; numbers that are known: "
            f"{', '.join(known[:40]) or 'none (no pretraining run ended with a backbone that was probed)'}"
        )
    return curves


def over_mpp(found: Sequence[OverMpp]) -> list[Curve]:
    """Scores over the µm/px of the tested pictures, a curve a task, a line a model."""
    lines: dict[Task, dict[str, tuple[Point, ...]]] = {}
    names = labels(found)
    for one in found:
        points = tuple(
            Point(mpp, mean, interval, one.model)
            for mpp, (mean, interval) in zip(one.mpp, one.scores, strict=True)
        )
        lines.setdefault(one.task, {})[names[entity(one)]] = (
            points  # of one name the last, as in tables
        )
    note = "Lines of {0} models are more than can be told apart: {1} of them are drawn."
    return [
        Curve(
            task,
            "µm/px",
            dict(list(models.items())[:_MOST_LINES]),
            note.format(len(models), _MOST_LINES) if len(models) > _MOST_LINES else "",
        )
        for task, models in lines.items()
    ]


def _differing(scores: Sequence[Score], params: frozenset[str]) -> list[str]:
    names = sorted({k for s in scores for k in s.facts if k in params or k in _ALWAYS})
    found = [
        name
        for name in names
        if not name.startswith(_NEVER)
        and len({x for s in scores if (x := _x(s, name)) is not None}) >= 3
    ]
    return found[:_MOST_AXES]


def _curve(
    task: Task, scores: Sequence[Score], axis: str, params: frozenset[str], asked: bool
) -> Curve | None:
    on = [(x, score) for score in scores if (x := _x(score, axis)) is not None]
    if len({x for x, _ in on}) < (2 if asked else 3):
        return None
    rest = _others(on, axis, params)
    lines: dict[str, list[Point]] = {}
    for x, score in sorted(on, key=lambda pair: pair[0]):
        name = ", ".join(f"{key} {score.facts.get(key, '?')}" for key in rest)
        point = Point(x, score.mean, score.interval, score.model)
        lines.setdefault(name, []).append(point)
    note = ""
    if len(lines) > _MOST_LINES:
        note = f"Not told apart: {', '.join(rest)} differ too, in {len(lines)} ways."
        lines = {"": [point for line in lines.values() for point in line]}
    return Curve(
        task, axis, {k: tuple(sorted(v, key=lambda p: p.x)) for k, v in lines.items()}, note
    )


def _others(on: Sequence[tuple[float, Score]], axis: str, params: frozenset[str]) -> list[str]:
    """Params that differ where the axis does not: what the axis alone does not explain."""
    found = []
    for name in sorted({key for _, score in on for key in score.facts if key in params}):
        if name == axis or name.startswith(_NEVER):
            continue
        values: dict[float, set[str]] = {}
        for x, score in on:
            values.setdefault(x, set()).add(score.facts.get(name, ""))
        if any(len(each) > 1 for each in values.values()):
            found.append(name)
    return found


def _x(score: Score, axis: str) -> float | None:
    return _number(score.facts.get(axis, ""))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
