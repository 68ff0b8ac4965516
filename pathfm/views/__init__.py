"""Augmentation: a table of numbers drawn from (seed, draw, view), then pixels, batched.

`params` holds what a view may do and draws its numbers (numpy only, cheap to import); `render`
makes the pixels with torch, on whatever device they are.
"""

from pathfm.views.params import ViewSpec, ViewTable, draw_views

__all__ = ["ViewSpec", "ViewTable", "draw_views"]
