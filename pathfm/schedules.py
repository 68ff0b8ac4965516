"""Values that change with the optimizer step: learning rate, weight decay, EMA momentum.

Pure functions of (step, total): nothing to save in a checkpoint, nothing to get out of step on
resume. Steps count *optimizer* steps, also under gradient accumulation.
"""

from __future__ import annotations

import math


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at the last step, `steps - 1`; flat after it.

    value = end + (start - end) (1 + cos(pi step / (steps - 1))) / 2. One step alone is `start`.
    """
    if steps <= 1:
        return start
    done = min(max(step / (steps - 1), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def warmup_cosine(
    peak: float, end: float, step: int, steps: int, warmup_steps: int, *, start: float = 0.0
) -> float:
    """A line from `start` that reaches `peak` at step `warmup_steps`, then a cosine to `end`.

    `start` is the value at step 0, as in DINO's `cosine_scheduler`. Without warm-up the first
    step has `peak` already. A warm-up as long as the run is a line and no cosine.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    return cosine(peak, end, step - warmup_steps, steps - warmup_steps)


def linear(start: float, end: float, step: int, steps: int) -> float:
    """A line from `start` at step 0 to `end` at `steps`, flat after it; `end` when steps is 0."""
    if steps <= 0:
        return end
    return start + (end - start) * min(step / steps, 1.0)
