"""A batch while it is being made, and one planned reading of some of its rows."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from online_patching.batch_plan import BatchPlan
from online_patching.canvases import Failed
from online_patching.errors import PatchingError
from online_patching.loading.batch import Failure
from online_patching.sampling.draws import Draws


@dataclass(eq=False)
class BatchInMaking:
    """A batch on its way. `left` counts patches (and context views) that are not there yet."""

    pixels: NDArray[np.uint8]
    barred: Mapping[int, int]
    columns: Draws | None = None
    failures: list[Failure] = field(default_factory=list)
    left: int = 0
    done: Future[None] = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def drawn(self) -> Draws:
        """Its columns, once they are drawn."""
        assert self.columns is not None
        return self.columns

    def fail(self, error: BaseException) -> None:
        """The first error is the batch's."""
        with self.lock:
            if not self.done.done():
                self.done.set_exception(error)


class Turn:
    """One planned reading of some rows of a batch: what is still missing of each.

    With context views a row has several places in a plan, in canvases that arrive at different
    times. It is settled when all are there, so that what is said of it does not depend on the order.
    """

    def __init__(
        self, batch: BatchInMaking, plan: BatchPlan, places: NDArray[np.int64], views: int
    ) -> None:
        self.batch, self.plan = batch, plan
        self._row_of = (places // views).tolist()
        self._missing = Counter(self._row_of)
        outputs = plan.canvases["first_output"].tolist(), plan.canvases["n_outputs"].tolist()
        self._outputs = list(zip(*outputs, strict=True))
        self._bad: dict[int, tuple[int, PatchingError]] = {}
        self._alone: set[int] = set()
        self._lock = threading.Lock()

    def arrived(
        self, canvases: Sequence[int], failed: Failed
    ) -> tuple[list[int], dict[int, PatchingError], list[int]]:
        """Rows of which all is there, rows that failed (with the error), rows to read by themselves."""
        good: list[int] = []
        bad: dict[int, PatchingError] = {}
        alone: list[int] = []
        with self._lock:
            for canvas in canvases:
                begin, count = self._outputs[canvas]
                error = failed.get(canvas)
                for place in self.plan.row[begin : begin + count].tolist():
                    row = self._row_of[place]
                    if error is not None and count > 1:
                        self._alone.add(row)
                    elif error is not None:
                        self._bad[row] = min(
                            (place, error), self._bad.get(row, (place, error)), key=_first
                        )
                    self._missing[row] -= 1
                    if self._missing[row]:
                        continue
                    if row in self._bad:
                        bad[row] = self._bad[row][1]
                    elif row in self._alone:
                        alone.append(row)
                    else:
                        good.append(row)
        return good, bad, alone


def _first(pair: tuple[int, PatchingError]) -> int:
    return pair[0]
