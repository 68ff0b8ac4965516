"""What failed in a stream, which slides are quarantined for it, and when a run must stop.

Everything here is a function of the global stream: of failures in the order of (draw, attempt), all
ranks together, and never of how many workers, ranks or batches it took to make it.

Quarantine. The stream is cut into windows of `window_draws` draws. A slide on which at least
`quarantine_after` patches failed within window w, and at least half as many as the window's draws that
chose it, is not drawn from any more from the first draw of window w + 2 on. The window between gives
every process time to have delivered w before anybody asks for w + 2 (`may_request`).

Bounded. However much fails, a ledger holds at most `MAX_NAMED` names of failures (the rest are counted by
reason), `MAX_WATCHED` slides of the window under way and `MAX_QUARANTINED` quarantines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from online_patching.errors import FailureBudgetError, LoaderError
from online_patching.loading.batch import DrawSource, Failure

MAX_NAMED = 64
MAX_WATCHED = 256
MAX_QUARANTINED = 512
LOST = ("ObjectNotFoundError", "ObjectChangedError")
"""Kinds of failures that say that a whole slide is gone or another, not that a part of it is damaged."""
_PROBATION_DRAWS = 100
_QUARANTINE_SHARE = 0.5
_CHUNK = 4096
_OTHERS = "other slides"


@dataclass(frozen=True)
class Rule:
    """When a slide is quarantined; `quarantine_after` None: never."""

    quarantine_after: int | None = 8
    window_draws: int = 2**16

    def __post_init__(self) -> None:
        if self.window_draws < 1 or (
            self.quarantine_after is not None and self.quarantine_after < 1
        ):
            raise LoaderError(
                f"quarantine_after {self.quarantine_after} and window_draws {self.window_draws} must be at "
                "least 1 (quarantine_after None: no quarantine)."
            )

    def refuse_step(self, draws: int) -> None:
        """Raise LoaderError when a global step of so many draws cannot be delivered under the rule."""
        if self.quarantine_after is not None and draws > self.window_draws:
            raise LoaderError(
                f"a step of {draws:,} draws (batch_size x world_size) is longer than the quarantine's window "
                f"of {self.window_draws:,}. Give a larger window_draws, or quarantine_after=None for none."
            )


@dataclass(frozen=True)
class Watched:
    """Failures on one slide in one window: the first one's draw and attempt, and how many by reason."""

    draw: int
    attempt: int
    failed: Counter[str]


@dataclass(frozen=True)
class Quarantine:
    """`slide_id`, in row `row` of the corpus, is not drawn from at draw `from_draw` or later."""

    slide_id: str
    row: int
    from_draw: int
    failed: dict[str, int]


@dataclass(frozen=True)
class Ledger:
    """Counts so far, failures of windows not decided yet, quarantines. A value: changes make new ones.

    `failed` counts by "slide: reason", `filtered` what pixel filters refused, by filter.
    """

    rule: Rule = Rule()
    failed: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    watched: dict[int, dict[str, Watched]] = field(default_factory=dict)
    quarantined: tuple[Quarantine, ...] = ()

    def after(self, failures: Iterable[Failure]) -> Ledger:
        """With these failures added: those of the stretch of the stream that follows what is here."""
        failures = sorted(failures)
        if not failures:
            return self
        failed, filtered = self.failed.copy(), self.filtered.copy()
        watched = {window: dict(slides) for window, slides in self.watched.items()}
        for failure in failures:
            if failure.filtered:
                filtered[failure.kind] += 1
                continue
            _count(failed, failure.slide_id, failure.kind)
            window = watched.setdefault(failure.draw // self.rule.window_draws, {})
            seen = window.get(failure.slide_id)
            if seen is None:
                seen = Watched(failure.draw, failure.attempt, Counter())
            more = Counter({failure.kind: 1})
            window[failure.slide_id] = replace(seen, failed=seen.failed + more)
        return replace(self, failed=failed, filtered=filtered, watched=watched)

    def decided(self, next_draw: int, source: DrawSource) -> Ledger:
        """With the quarantines of every window that ends at or before `next_draw`, all delivered."""
        ended = [w for w in sorted(self.watched) if (w + 1) * self.rule.window_draws <= next_draw]
        if not ended:
            return self
        after = self
        for window in ended:
            after = replace(after, quarantined=after.quarantined + after._decide(window, source))
        watched = {w: slides for w, slides in self.watched.items() if w not in ended}
        return replace(after, watched=watched)

    def forgetting(self, next_draw: int) -> Ledger:
        """Without the windows that ended: for a rank that cannot decide alone."""
        under_way = next_draw // self.rule.window_draws
        watched = {w: slides for w, slides in self.watched.items() if w >= under_way}
        return replace(self, watched=watched)

    @property
    def barred(self) -> dict[int, int]:
        """Corpus row -> first draw that may not use it."""
        return {q.row: q.from_draw for q in self.quarantined}

    def may_request(self, last_draw: int, next_draw: int) -> bool:
        """Whether what decides draw `last_draw` is known once everything before `next_draw` is delivered."""
        window = self.rule.window_draws
        return self.rule.quarantine_after is None or last_draw < (next_draw // window + 2) * window

    def check_budget(
        self, draws: int, max_failed_fraction: float, forgiven: Collection[str] = ()
    ) -> None:
        """Raise FailureBudgetError, with the list, when too many of so many draws failed.

        Failures of a kind in `forgiven` do not count.
        """
        counted = Counter({k: n for k, n in self.failed.items() if _split(k)[1] not in forgiven})
        failed = counted.total()
        if failed <= max_failed_fraction * max(draws, _PROBATION_DRAWS):
            return
        listed = "; ".join(f"{n:,} x {kind}" for kind, n in counted.most_common(5))
        raise FailureBudgetError(
            f"{failed:,} failures in {draws:,} draws, more than {max_failed_fraction:.1%} of at least "
            f"{_PROBATION_DRAWS}: {listed}. "
            "Leave these slides out, or raise max_failed_fraction."
        )

    def joined(self, other: Ledger) -> Ledger:
        """With another rank's counts of the same stretch added; quarantines are those here."""
        failed = self.failed.copy()
        for name, n in other.failed.items():
            _count(failed, *_split(name), n)
        watched = {window: dict(slides) for window, slides in self.watched.items()}
        for window, slides in other.watched.items():
            here = watched.setdefault(window, {})
            for slide_id, theirs in slides.items():
                ours = here.get(slide_id, theirs)
                draw, attempt = min((ours.draw, ours.attempt), (theirs.draw, theirs.attempt))
                both = theirs.failed + (ours.failed if ours is not theirs else Counter())
                here[slide_id] = Watched(draw, attempt, both)
            watched[window] = dict(_first_seen(here))
        return replace(
            self, failed=failed, filtered=self.filtered + other.filtered, watched=watched
        )

    def _decide(self, window: int, source: DrawSource) -> tuple[Quarantine, ...]:
        """The quarantines that one window's failures bring, in the order of their first failure."""
        least = self.rule.quarantine_after
        if least is None:
            return ()
        done = {q.slide_id for q in self.quarantined}
        suspects = {
            slide_id: seen
            for slide_id, seen in _first_seen(self.watched[window])
            if seen.failed.total() >= least and slide_id not in done
        }
        if not suspects:
            return ()
        rows = _rows(source, suspects.values())
        chosen = self._times_chosen(window, source)
        from_draw = (window + 2) * self.rule.window_draws
        found = [
            Quarantine(slide_id, row, from_draw, dict(seen.failed))
            for (slide_id, seen), row in zip(suspects.items(), rows, strict=True)
            if seen.failed.total() >= _QUARANTINE_SHARE * chosen[row]
        ]
        return tuple(found[: MAX_QUARANTINED - len(self.quarantined)])

    def _times_chosen(self, window: int, source: DrawSource) -> Counter[int]:
        """How many of a window's draws chose each slide at first. Drawn again: cheaper than kept."""
        start = window * self.rule.window_draws
        stop = start + self.rule.window_draws
        chosen: Counter[int] = Counter()
        for first in range(start, stop, _CHUNK):
            draws = np.arange(first, min(first + _CHUNK, stop))
            rows = source.draw_batch(draws, 0, self.barred).slide
            chosen.update(
                dict(zip(*(a.tolist() for a in np.unique(rows, return_counts=True)), strict=True))
            )
        return chosen

    def as_json(self, next_draw: int) -> dict[str, Any]:
        """As JSON types, at a moment when everything before `next_draw` is delivered and decided."""
        slides = self.watched.get(next_draw // self.rule.window_draws, {})
        return {
            "quarantine_after": self.rule.quarantine_after,
            "window_draws": self.rule.window_draws,
            "failed": dict(self.failed),
            "filtered": dict(self.filtered),
            # Lists: their order counts, and what is made of a state elsewhere may reorder mappings.
            "watched": [
                [slide_id, seen.draw, seen.attempt, dict(seen.failed)]
                for slide_id, seen in _first_seen(slides)
            ],
            "quarantined": [[q.slide_id, q.row, q.from_draw, q.failed] for q in self.quarantined],
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Ledger:
        """The ledger that `as_json` wrote."""
        rule = Rule(saved["quarantine_after"], saved["window_draws"])
        watched: dict[int, dict[str, Watched]] = {}
        for slide_id, draw, attempt, failed in saved["watched"]:
            window = watched.setdefault(draw // rule.window_draws, {})
            window[slide_id] = Watched(draw, attempt, Counter(failed))
        quarantined = tuple(Quarantine(*row) for row in saved["quarantined"])
        failed, filtered = Counter(saved["failed"]), Counter(saved["filtered"])
        return cls(rule, failed, filtered, watched, quarantined)


def _first_seen(slides: dict[str, Watched]) -> Iterator[tuple[str, Watched]]:
    """The slides that failed first, as many as are watched: the same however the stream was cut."""
    ordered = sorted(slides.items(), key=lambda item: (item[1].draw, item[1].attempt))
    yield from ordered[:MAX_WATCHED]


def _rows(source: DrawSource, seen: Iterable[Watched]) -> Sequence[int]:
    """The corpus rows of slides, drawn again: a failure knows its slide's name only."""
    seen = list(seen)
    draws, attempts = [s.draw for s in seen], [s.attempt for s in seen]
    return [int(row) for row in source.draw_batch(draws, attempts).slide]


def _count(failed: Counter[str], slide_id: str, kind: str, n: int = 1) -> None:
    """Count under "slide: reason" while there is room for names, under "other slides: reason" after."""
    name = f"{slide_id}: {kind}"
    if name not in failed and len(failed) >= MAX_NAMED:
        name = f"{_OTHERS}: {kind}"
    failed[name] += n


def _split(name: str) -> tuple[str, str]:
    slide_id, _, kind = name.rpartition(": ")
    return slide_id, kind
