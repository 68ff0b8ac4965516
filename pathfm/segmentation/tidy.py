"""What is done to a raw mask: specks removed, pinholes filled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def tidy(mask: Mask, smallest_px: float, smallest_share: float = 0.0) -> Mask:
    """The mask without pieces below `smallest_px` pixels and with holes below that filled.

    Pieces below `smallest_share` of all tissue go as well: on a slide full of tissue, specks that
    size are dirt more often than not, and hardly a patch would come from them.

    Pieces hang together along edges and corners, holes along edges only, so that neither leaks
    through the other's diagonal. A gap that reaches the picture's edge is no hole.
    """
    from scipy import ndimage

    kept = _without_small(mask, max(smallest_px, smallest_share * int(mask.sum())))
    labels, count = ndimage.label(~kept)
    if count == 0:
        return kept
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    fill = sizes < smallest_px
    fill[0] = False
    fill[np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))] = False
    return np.asarray(kept | fill[labels])


def _without_small(mask: Mask, smallest_px: float) -> Mask:
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3), int))
    keep = np.bincount(labels.ravel(), minlength=count + 1) >= smallest_px
    keep[0] = False
    return np.asarray(keep[labels])


def mask_iou(a: Mask, b: Mask) -> float:
    """Intersection over union of two masks of one shape; 1 when both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0
