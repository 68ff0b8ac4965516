"""What to ask of stores for a canvas: its pieces' ranges, merged within each object."""

from __future__ import annotations

from collections.abc import Sequence

from online_patching.batch_plan import BatchPlan
from online_patching.batch_plan.tables import WHOLE
from online_patching.plan import merge_ranges

Piece = tuple[int, int, int | None]
"""File of a plan, first byte, and the one past the last; None: all of the file."""


def pieces_of(plan: BatchPlan) -> list[Piece]:
    """Every piece of a plan, in its order; empty where nothing is stored."""
    columns = (plan.tiles[name].tolist() for name in ("file", "start", "length"))
    return [
        (file, start, None if length == WHOLE else start + length)
        for file, start, length in zip(*columns, strict=True)
    ]


def merge(pieces: Sequence[Piece], gap_bytes: int) -> list[Piece]:
    """What to read so that every piece lies in one: of each file its ranges merged, or all of it."""
    of: dict[int, list[tuple[int, int]]] = {}
    runs: list[Piece] = []
    for file, start, stop in pieces:
        if stop is None:
            runs.append((file, start, None))
        elif stop > start:
            of.setdefault(file, []).append((start, stop))
    for file, ranges in of.items():
        runs += [(file, *one) for one in merge_ranges(ranges, gap_bytes)]
    return runs


def size_of(plan: BatchPlan, canvas: int, runs: Sequence[Piece]) -> int:
    """Bytes that reading a canvas may hold: of whole objects, whose sizes are not known, what they decode to."""
    c = plan.canvases[canvas]
    decoded = int(c["tile_width"]) * int(c["tile_height"]) * plan.codecs[c["codec"]].samples
    return sum(decoded if stop is None else stop - start for _, start, stop in runs)
