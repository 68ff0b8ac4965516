"""How sure a score is: bootstrap intervals over patients or slides, runs apart, and pairs of models.

    predictions.py   what several runs predicted of the same pictures, and the groups these come from
    metrics.py       metrics of a confusion table, for thousands of tables at once
    resampling.py    groups drawn again with replacement, keyed by (seed, resample)
    intervals.py     percentile and BCa intervals of replicates
    sums.py          sums over groups, of which every resample is a weighted one
    scores.py        score(), compare(): a model, and two on the same pictures
    pairs.py         McNemar's test, exact and mid-p

Two sources of doubt are kept apart. *Which pictures were tested*: an interval over groups, because
patches of one slide err together. *How training went* (initial head, batch order, split): the standard
deviation over runs. Neither tells how another data set would differ.
"""

from pathfm.uncertainty.intervals import Interval
from pathfm.uncertainty.metrics import METRICS, Metric
from pathfm.uncertainty.options import Options
from pathfm.uncertainty.pairs import McNemar, mcnemar
from pathfm.uncertainty.predictions import Predictions
from pathfm.uncertainty.scores import (
    Comparison,
    Score,
    compare,
    interval_of,
    interval_of_mean,
    score,
)

__all__ = [
    "METRICS",
    "Comparison",
    "Interval",
    "McNemar",
    "Metric",
    "Options",
    "Predictions",
    "Score",
    "compare",
    "interval_of",
    "interval_of_mean",
    "mcnemar",
    "score",
]
