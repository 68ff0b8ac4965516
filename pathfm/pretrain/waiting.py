"""How long a step did nothing but wait for data.

On a CPU every wait for a batch counts. A GPU works on beside the host: of a wait only what exceeds the
device's own time counts, in the step whose end it put off.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Waited(Protocol):
    """A batch that was waited for: since when (time.perf_counter), for how long."""

    @property
    def began_s(self) -> float: ...  # noqa: D102
    @property
    def wait_s(self) -> float: ...  # noqa: D102


class DataWait:
    """The waits of one step after the other: `begins`, `queued`, then `of_step`."""

    def __init__(self, device: torch.device, event: Callable[..., Any] | None = None) -> None:
        """event: makes what marks a moment of the device: torch.cuda.Event, or a test's own."""
        self._on_gpu = device.type == "cuda"
        self._event = event or torch.cuda.Event
        # that of our GPU, which need not be the process's current one
        ours = self._on_gpu and event is None
        self._stream = torch.cuda.current_stream(device) if ours else None
        self._queued_s = 0.0

    def begins(self) -> None:
        """Just before a step's work is queued."""
        if self._on_gpu:
            self._queued_s = time.perf_counter()
            self._first, self._last = (self._event(enable_timing=True) for _ in range(2))
            self._first.record(self._stream)

    def queued(self) -> None:
        """All of a step's work but its update is queued."""
        if self._on_gpu:
            self._last.record(self._stream)

    def of_step(self, step_began_s: float, given: Waited, ahead: Waited | None) -> float:
        """Seconds of the step; call it after something has waited for the device.

        given: the batch worked on; ahead: the one read meanwhile. The device is taken to have begun
        when the step's work was queued. Where it was still at the update before, it ended that much
        later, and as much of a wait may be counted that was hidden.
        """
        if not self._on_gpu:
            return given.wait_s
        # read when nothing was queued: all of it was idle
        idle_s = given.wait_s if given.began_s >= step_began_s else 0.0
        if ahead is not None:
            device_s: float = self._first.elapsed_time(self._last) / 1000
            free_s = self._queued_s + device_s
            idle_s += beyond(ahead, free_s)
        return idle_s


def beyond(waited: Waited, free_s: float) -> float:
    """How much of a wait lay after the moment `free_s`, when the device had nothing left to do."""
    ended_s = waited.began_s + waited.wait_s
    return max(0.0, ended_s - max(waited.began_s, free_s))
