"""Segmentation losses on one soft-count core; docs/losses.md shows what each of them does.

counts.py       TP, FP, FN, TN from logits; ignore masks, averaging, absent classes
entropy.py      BCE / cross-entropy, SoftBCE, focal
overlap.py      Dice (smooth, F-beta, V-Net), Jaccard, Tversky, focal Tversky
correlation.py  MCC
weights.py      class weights from class frequencies
combined.py     the modules, and weighted sums from config (`build_loss`)

All take logits: binary (B, h, w), or (B, C, h, w) for C classes.
"""

from pathfm.segmentation.loss_terms import LossTerm
from pathfm.segmentation.losses.combined import (
    BCELoss,
    DiceLoss,
    FocalLoss,
    FocalTverskyLoss,
    JaccardLoss,
    MCCLoss,
    SegmentationLoss,
    SoftBCEWithLogitsLoss,
    TverskyLoss,
    WeightedLoss,
    build_loss,
)
from pathfm.segmentation.losses.correlation import mcc_loss
from pathfm.segmentation.losses.counts import Averaging, SoftCounts, soft_counts
from pathfm.segmentation.losses.entropy import bce_loss, focal_loss, soft_bce_loss
from pathfm.segmentation.losses.overlap import (
    dice_loss,
    focal_tversky_loss,
    jaccard_loss,
    tversky_loss,
)
from pathfm.segmentation.losses.weights import class_pixels, inverse_frequency_weights

__all__ = [
    "Averaging",
    "BCELoss",
    "DiceLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "JaccardLoss",
    "LossTerm",
    "MCCLoss",
    "SegmentationLoss",
    "SoftBCEWithLogitsLoss",
    "SoftCounts",
    "TverskyLoss",
    "WeightedLoss",
    "bce_loss",
    "build_loss",
    "class_pixels",
    "dice_loss",
    "focal_loss",
    "focal_tversky_loss",
    "inverse_frequency_weights",
    "jaccard_loss",
    "mcc_loss",
    "soft_bce_loss",
    "soft_counts",
    "tversky_loss",
]
