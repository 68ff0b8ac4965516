"""Which metrics a store holds already: the last step of each key decides what is still to send.

Rows go out in the order of their steps, one request after the other, so a store that holds step s
of a key holds all before it that were ever sent. What is at or below the mark is never sent again:
not after an answer that got lost, not when steps after a checkpoint are done a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LARGEST = 1.7976931348623157e308  # what MLflow's SQL stores keep for an infinity


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    key: str
    value: float
    time_ms: int
    step: int


class HighWater:
    """The latest point of each key that one run of a store holds, as far as the store has told."""

    def __init__(self, latest: Iterable[Point] = ()) -> None:
        self._latest = {point.key: point for point in latest}

    @property
    def steps(self) -> Mapping[str, int]:
        """The mark of every key."""
        return {key: point.step for key, point in self._latest.items()}

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Those of the points that lie above their key's mark, in order, no (key, step) twice."""
        marks, kept = dict(self.steps), []
        for point in points:
            if point.step > marks.get(point.key, -1):
                marks[point.key] = point.step
                kept.append(point)
        return kept

    def missing_summary(self, points: Sequence[Point]) -> list[Point]:
        """Results of a whole run, at step 0, that the store does not show yet.

        Left out: a value it has already, and a key that was logged step by step, whose last value is
        what the store shows beside the params anyway; at step 0 it would be a second point.
        """
        return [point for point in points if not self._shows(point)]

    def _shows(self, point: Point) -> bool:
        held = self._latest.get(point.key)
        return held is not None and (held.step > 0 or _same(held.value, point.value))

    def reached(self, points: Sequence[Point]) -> None:
        """The store has acknowledged these."""
        for point in points:
            held = self._latest.get(point.key)
            if held is None or (point.step, point.time_ms) >= (held.step, held.time_ms):
                self._latest[point.key] = point

    def lacks(self, shipped: Mapping[str, int]) -> bool:
        """Whether a key's mark lies below a step that was acknowledged: the store lost something."""
        marks = self.steps
        return any(marks.get(key, -1) < step for key, step in shipped.items())


def points_of(row: Mapping[str, Any], values: Mapping[str, float]) -> list[Point]:
    """The values of one row of the journal as points."""
    return [
        Point(key, value, int(row["time_ms"]), int(row["step"])) for key, value in values.items()
    ]


def _same(a: float, b: float) -> bool:
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    a, b = (max(-_LARGEST, min(_LARGEST, value)) for value in (a, b))
    return a == b
