"""Counters that prove what the loader did: requests, bytes, waits, failures."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Stats:
    """What was read so far. Add under `lock` when several threads share one.

    `bytes_wanted` are the bytes of the tiles touched; `bytes_read` are the bytes asked of the
    store for them, so `bytes_read - bytes_wanted` is the excess that merging ranges costs. `failures`
    are patches that were replaced, by reason; `from_states` counts parts of tiles that were decoded from
    remembered states in this process meanwhile; `cache_hits` and `cache_misses` tiles of remote slides that the
    disk cache had and had not; `filtered` patches that a pixel filter refused, by filter.
    """

    patches: int = 0
    tiles: int = 0
    requests: int = 0
    retries: int = 0
    bytes_wanted: int = 0
    bytes_read: int = 0
    from_states: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    wait_s: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        """Add to counters by name, atomically."""
        with self.lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def fail(self, reason: str) -> None:
        """Count one failed patch under a reason."""
        with self.lock:
            self.failures[reason] += 1

    def refuse(self, reason: str) -> None:
        """Count one patch that a pixel filter refused."""
        with self.lock:
            self.filtered[reason] += 1

    def merge(self, other: dict[str, Any]) -> None:
        """Add another process's counters (its `as_dict`)."""
        with self.lock:
            for name, amount in other.items():
                if name in ("failures", "filtered"):
                    getattr(self, name).update(amount)
                else:
                    setattr(self, name, getattr(self, name) + amount)

    def told(self) -> str:
        """One line for people: what was read, and what merging ranges cost beyond the tiles."""
        now = self.as_dict()
        excess = now["bytes_read"] / now["bytes_wanted"] - 1 if now["bytes_wanted"] else 0.0
        failed = sum(now["failures"].values())
        return (
            f"read {now['tiles']:,} tiles in {now['requests']:,} requests, {now['bytes_read'] / 1e6:,.1f} MB "
            f"(+{excess:.1%} beyond the tiles touched), {now['retries']:,} retries, {failed:,} patches replaced"
            + (
                f", {refused:,} refused by filters"
                if (refused := sum(now["filtered"].values()))
                else ""
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON, a log line or another process."""
        with self.lock:
            counts = {"failures": dict(self.failures), "filtered": dict(self.filtered)}
            return {**asdict(self), **counts}
