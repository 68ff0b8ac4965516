"""Items of encapsulated pixel data, found without a table: each says only where the next begins.

One after another that is a request a frame, each waiting for the last: minutes for a remote slide. So the pixels
are walked from many places at once. Where an item begins is guessed there (its tag, and another where it says
the next is), but a guess counts only once the walk from before arrives at exactly that place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from online_patching.formats.dicom_attributes import (
    BadDicomError,
    PastEndError,
    StoredOtherwiseError,
)
from online_patching.formats.dicom_tags import Source

_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_PROBE_BYTES = 256 * 2**10
_ONE_REQUEST_BYTES = 2**20
_FRAMES_A_LANE, _MOST_LANES = 16, 256
_MOST_ASKED = 2**18  # a request a frame: a slide has about 150,000


@dataclass
class _Lane:
    """One walk: where it began, where it is and what it found."""

    start: int
    stop: int
    at: int = 0
    ended: bool = False
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.at = self.start

    def step(self, head: bytes, size: int) -> None:
        """Take the header of the item it is at."""
        length = int.from_bytes(head[4:], "little")
        if head[:4] != _ITEM or self.at + 8 + length > size:
            self.ended = True
            return
        self.starts.append(self.at + 8)
        self.lengths.append(length)
        self.at += 8 + length

    def join(self, other: _Lane) -> None:
        """Go on with what another found from here on."""
        self.starts += other.starts
        self.lengths += other.lengths
        self.at, self.ended = other.at, other.ended


def walk_items(source: Source, first: int, frames: int) -> tuple[list[int], list[int]]:
    """Start and bytes of each fragment from the item at `first` on: as many as there are frames.

    StoredOtherwiseError when there are more, PastEndError or BadDicomError when there are fewer.
    """
    size = source.size_bytes
    if source.remote and frames > _MOST_ASKED and size > first + _ONE_REQUEST_BYTES:
        raise StoredOtherwiseError(
            f"no table says where its {frames:,} frames lie, and to ask for each takes too long. Copy it to disk"
        )
    lanes = _lanes(source, first, frames)
    _advance(source, lanes, frames)
    whole = lanes[0]
    for lane in lanes[1:]:
        whole.stop = lane.start
        _advance(source, [whole], frames)  # through what a wrong guess stood for
        if whole.at == lane.start and not whole.ended:
            whole.join(lane)
    whole.stop = size
    _advance(source, [whole], frames)
    if len(whole.starts) > frames:
        raise StoredOtherwiseError(
            f"more than {frames:,} fragments for {frames:,} frames, and no table of which are whose"
        )
    if len(whole.starts) < frames:
        if whole.at + 8 > size:
            raise PastEndError(whole.at, whole.at + 8)
        (head,) = source.peek([whole.at])
        if head[:4] == _ITEM:
            length = int.from_bytes(head[4:], "little")
            raise PastEndError(whole.at + 8, whole.at + 8 + length)
        raise BadDicomError(f"it holds {len(whole.starts):,} fragments for {frames:,} frames")
    return whole.starts, whole.lengths


def _advance(source: Source, lanes: list[_Lane], frames: int) -> None:
    """Walk every lane to its stop or its end, all at the same time."""
    size = source.size_bytes
    while True:
        active = [
            lane
            for lane in lanes
            if not lane.ended
            and lane.at < lane.stop
            and lane.at + 8 <= size
            and len(lane.starts) <= frames
        ]
        if not active:
            return
        for lane, head in zip(active, source.peek([lane.at for lane in active]), strict=True):
            lane.step(head, size)


def _lanes(source: Source, first: int, frames: int) -> list[_Lane]:
    """The walk from the first item, and those from guessed ones."""
    size = source.size_bytes
    if source.remote and first < size <= first + _ONE_REQUEST_BYTES:
        source.read(first, size - first)  # the walk then needs no other
        return [_Lane(first, size)]
    count = min(_MOST_LANES, frames // _FRAMES_A_LANE) if source.remote else 1
    places = [first + (size - first) * number // count for number in range(1, count)]
    guesses = [
        guess
        for place, probe in zip(
            places, source.peek(places, _PROBE_BYTES // max(1, count // 16)), strict=True
        )
        if (guess := _guess(place, probe, size)) is not None
    ]
    begins = sorted({first, *guesses})
    return [_Lane(begin, stop) for begin, stop in zip(begins, [*begins[1:], size], strict=True)]


def _guess(place: int, probe: bytes, size: int) -> int | None:
    """Where an item seems to begin: one that is followed by another, or else the first of all."""
    found, lone = probe.find(_ITEM), None
    while found >= 0:
        length = int.from_bytes(probe[found + 4 : found + 8], "little")
        after = found + 8 + length
        if probe[after : after + 4] in (_ITEM, _END):
            return place + found
        if after + 4 > len(probe) and place + after <= size and lone is None:
            lone = place + found
        found = probe.find(_ITEM, found + 1)
    return lone
