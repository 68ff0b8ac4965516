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
    """A failure that may be gone in a moment; carries what was seen, never a credential.

    `after_s` is how long the server asked to be left alone, 0 when it said nothing.
    """

    def __init__(self, what: str, after_s: float = 0.0) -> None:
        super().__init__(what)
        self.after_s = after_s


@dataclass(frozen=True)
class RetryPolicy:
    """`attempts` tries in all, waiting `first_delay_s` doubling up to `max_delay_s` between them.

    Each delay is drawn from the upper half of its range, so that a thousand readers that failed
    together do not come back together. `timeout_s` bounds one try from its request to its last byte,
    `first_byte_timeout_s` the wait for the answer to begin, `connect_timeout_s` a connection (with
    its TLS handshake). A server that says when to come back (Retry-After) is heeded up to
    `longest_wait_s`.
    """

    attempts: int = 5
    first_delay_s: float = 0.2
    max_delay_s: float = 5.0
    timeout_s: float = 30.0
    connect_timeout_s: float = 10.0
    first_byte_timeout_s: float = 15.0
    longest_wait_s: float = 30.0

    def delay_s(self, failed: int, after_s: float = 0.0) -> float:
        """How long to wait after the `failed`-th failure (1 is the first), at least `after_s` seconds."""
        most = min(self.first_delay_s * 2.0 ** min(failed - 1, 60), self.max_delay_s)
        # Jitter is about spreading load, not about randomness anyone reproduces or guards.
        backoff = most * (0.5 + random.random() / 2)  # noqa: S311
        return max(backoff, min(after_s, self.longest_wait_s))

    def given_up(self, key: str, last: TransientError) -> StoreUnavailableError:
        """The error after the last attempt."""
        return StoreUnavailableError(
            key,
            f"failed {self.attempts} times, last with: {last}. "
            "Check the server; the run can be resumed.",
        )


async def with_retries(
    policy: RetryPolicy, key: str, once: Callable[[], Awaitable[T]], on_retry: Callable[[], None]
) -> T:
    """Run `once` until it succeeds; TransientError is retried, everything else passes."""
    for attempt in range(1, policy.attempts + 1):
        try:
            return await once()
        except TransientError as error:
            if attempt == policy.attempts:
                raise policy.given_up(key, error) from None
            after_s = error.after_s
        on_retry()
        await asyncio.sleep(policy.delay_s(attempt, after_s))
    raise AssertionError("unreachable: the last attempt returns or raises")
