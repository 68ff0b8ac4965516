"""Augmentation: a table of numbers drawn from (seed, draw, view), then pixels, batched.

`params` holds what a view may do and draws its numbers (numpy only, cheap to import); `colour` and
`stain` turn them into matrices; `render` makes the pixels with torch, on whatever device they are:
`resampling` has the matrices of geometry, which `dense` multiplies on a GPU and `banded` on a CPU.
"""

from pathfm.views.params import HED_LIGHT, HED_STRONG, ViewSpec, ViewTable, draw_views

__all__ = ["HED_LIGHT", "HED_STRONG", "ViewSpec", "ViewTable", "draw_views"]
