"""What a score alone does not tell: pure functions on arrays.

corruption_error.py  mCE and relative mCE of a table of errors, with guards
sites.py             do neighbours in feature space share the class or the hospital? (PathoROB)
reliability.py       are predicted probabilities the shares of right answers? (ECE)
label_noise.py       labels of which a share is wrong
"""

from pathfm.measures.corruption_error import CorruptionErrors, corruption_errors
from pathfm.measures.label_noise import flip_labels
from pathfm.measures.reliability import Calibration, calibration
from pathfm.measures.sites import SiteIndex, balanced_rows, best_k, neighbours, site_index

__all__ = [
    "Calibration",
    "CorruptionErrors",
    "SiteIndex",
    "balanced_rows",
    "best_k",
    "calibration",
    "corruption_errors",
    "flip_labels",
    "neighbours",
    "site_index",
]
