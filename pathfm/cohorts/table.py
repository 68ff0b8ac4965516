"""A cohort as a table: one row a slide, each slide once, what belongs together on one side of a split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

import numpy as np

from online_patching.errors import redact
from online_patching.philox import words
from pathfm.cohorts.overrides import check_mpp
from pathfm.cohorts.row import CohortRow, Skipped
from pathfm.cohorts.salting import Salt
from pathfm.runtime import PathfmError

_SPLIT_STREAM = 0x5_9117  # a stream of random words of its own


@dataclass(frozen=True)
class Cohort:
    """Slides in a fixed order, each URI once, each patient (case, image) in one split.

    `skipped` is what the sources named besides, `notes` what a person should be told, `salt` what ids
    that are read later (from a DICOM header) are hidden with.
    """

    rows: tuple[CohortRow, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    salt: Salt | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for row in self.rows:
            if row.uri in seen:
                raise PathfmError(f"cohort: slide {redact(row.uri)} is listed twice")
            seen.add(row.uri)
            if row.mpp is not None:
                check_mpp(row.mpp, f"cohort: slide {redact(row.uri)}")
        self._refuse_torn_groups()

    def _refuse_torn_groups(self) -> None:
        first: dict[str, CohortRow] = {}
        for row, group in zip(self.rows, groups_of(self.rows), strict=True):
            other = first.setdefault(group, row)
            if other.split != row.split:  # without the patient's name: this goes to logs
                raise PathfmError(
                    f"cohort: {redact(other.uri)} is in the split {other.split!r} and "
                    f"{redact(row.uri)} in {row.split!r}, but they are of one patient, case or image; "
                    "these must stay together"
                )

    @classmethod
    def of(cls, uris: Iterable[str]) -> Cohort:
        """A cohort of bare URIs."""
        return cls(tuple(CohortRow(uri) for uri in uris))

    @property
    def digest(self) -> str:
        """SHA-256 of the rows in their order; two equal cohorts have the same."""
        hasher = hashlib.sha256()
        for row in self.rows:
            hasher.update(json.dumps(astuple(row)).encode() + b"\n")
        return hasher.hexdigest()

    def with_splits(self, shares: Mapping[str, float], seed: int) -> Cohort:
        """The same slides, their patients divided anew among `shares` (name -> share, sum 1).

        What `groups_of` puts together counts as one patient. Groups are put in an order drawn by
        Philox from (seed, group), so the order of the rows does not matter; each split gets its share of
        them, rounded so that the sizes add up.
        """
        if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
            raise PathfmError(f"split shares {dict(shares)} must be >= 0 and add up to 1")
        group_of = groups_of(self.rows)
        groups = sorted(set(group_of), key=_lot(seed))
        edges = np.round(np.cumsum(list(shares.values())) * len(groups)).astype(int)
        side = dict(zip(groups, np.repeat(list(shares), np.diff(edges, prepend=0)), strict=True))
        rows = zip(self.rows, group_of, strict=True)
        return replace(
            self, rows=tuple(replace(row, split=str(side[group])) for row, group in rows)
        )


def groups_of(rows: Sequence[CohortRow]) -> list[str]:
    """For each row the name of the group that a split must not tear apart.

    Rows of one patient belong together; where no patient is told, rows of one case; a row that is
    `twin_of` a slide belongs to that one's group, and so on from link to link.
    """
    own = [_own_group(row) for row in rows]
    if not any(row.twin_of for row in rows):
        return own
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    by_image: dict[str, str] = {}
    for row, name in zip(rows, own, strict=True):
        for image in (row.title, row.twin_of or row.title):
            one, other = root(by_image.setdefault(image, name)), root(name)
            parent[max(one, other)] = min(one, other)  # the same root whatever the order
    return [root(name) for name in own]


def _own_group(row: CohortRow) -> str:
    if row.patient:
        return f"patient {row.patient}"
    return f"case {row.case}" if row.case else f"slide {row.uri}"


def _lot(seed: int) -> Callable[[str], tuple[int, str]]:
    """A sort key that puts patients in an order drawn from (seed, patient)."""

    def key(patient: str) -> tuple[int, str]:
        draw = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:7])
        return int(words(seed, np.array([draw]), 0, _SPLIT_STREAM, 1)[0, 0]), patient

    return key
