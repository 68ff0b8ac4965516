"""When to try again: backoff with jitter, for what is worth retrying."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from online_patching.errors import StoreUnavailableError

T = TypeVar("T")


class TransientError(Exception):
    """A failure that may be gone in a moment; carries what was seen, never a credential."""


@dataclass(frozen=True)
class RetryPolicy:
    """`attempts` tries in all, waiting `first_delay_s` doubling up to `max_delay_s` between them.

    Each delay is drawn from the upper half of its range, so that a thousand readers that failed
    together do not come back together. `timeout_s` bounds one try from start to last byte.
    """

    attempts: int = 5
    first_delay_s: float = 0.2
    max_delay_s: float = 5.0
    timeout_s: float = 30.0
    connect_timeout_s: float = 10.0


async def with_retries(
    policy: RetryPolicy, key: str, once: Callable[[], Awaitable[T]], on_retry: Callable[[], None]
) -> T:
    """Run `once` until it succeeds; TransientError is retried, everything else passes."""
    delay_s = policy.first_delay_s
    for attempt in range(1, policy.attempts + 1):
        try:
            return await once()
        except TransientError as error:
            if attempt == policy.attempts:
                raise StoreUnavailableError(
                    key,
                    f"failed {attempt} times, last with: {error}. "
                    "Check the server; the run can be resumed.",
                ) from None
        on_retry()
        # Jitter is about spreading load, not about randomness anyone reproduces or guards.
        await asyncio.sleep(delay_s * (0.5 + random.random() / 2))  # noqa: S311
        delay_s = min(2 * delay_s, policy.max_delay_s)
    raise AssertionError("unreachable: the last attempt returns or raises")
