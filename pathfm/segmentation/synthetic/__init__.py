"""Synthetic thumbnails of known truth, for training the foreground model."""

from pathfm.segmentation.synthetic.canvas import TISSUE_KINDS, Kind
from pathfm.segmentation.synthetic.thumbnail import SyntheticThumbnail, draw_thumbnail

__all__ = ["TISSUE_KINDS", "Kind", "SyntheticThumbnail", "draw_thumbnail"]
