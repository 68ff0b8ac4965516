"""Boxes and patches on a slide. Level-0 pixels carry the suffix `_px0`; order is x, y, w, h."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of whole pixels: left, top (inclusive) and right, bottom (exclusive)."""

    left: int
    top: int
    right: int
    bottom: int

    def __post_init__(self) -> None:
        if self.right < self.left or self.bottom < self.top:
            raise ValueError(f"a box may not end before it starts: {self}")

    @property
    def width(self) -> int:
        """Pixels across."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Pixels down."""
        return self.bottom - self.top

    @property
    def empty(self) -> bool:
        """Whether it holds no pixel."""
        return self.width == 0 or self.height == 0

    def intersect(self, other: Box) -> Box:
        """The common part; empty (zero-sized) where there is none."""
        left, top = max(self.left, other.left), max(self.top, other.top)
        return Box(
            left,
            top,
            max(left, min(self.right, other.right)),
            max(top, min(self.bottom, other.bottom)),
        )

    def shift(self, dx: int, dy: int) -> Box:
        """The same box, moved."""
        return Box(self.left + dx, self.top + dy, self.right + dx, self.bottom + dy)


@dataclass(frozen=True, slots=True)
class PatchRef:
    """One training patch before it is read: which slide, where, at what µm/px.

    `x_px0`, `y_px0` is its upper left corner in level-0 pixels; it covers `width_px0` x
    `height_px0` of them (fractional: size_px * mpp / slide mpp, by axis) and is read as
    `size_px` x `size_px`. `draw` is the sample number i, `attempt` how often i was redrawn.
    `slide` is the row in the corpus.
    """

    draw: int
    attempt: int
    slide: int
    slide_id: str
    x_px0: int
    y_px0: int
    width_px0: float
    height_px0: float
    mpp: float
    size_px: int
