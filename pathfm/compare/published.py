"""Figures of the public eva leaderboard, for tables of heads trained by the same protocol.

Mean over 5 runs (slides: 20) of macro accuracy (two classes: balanced accuracy), as published under eva's current
protocol (AdamW; https://kaiko-ai.github.io/eva/main/leaderboards/), three decimals. The older table of
kaiko's paper (SGD, cosine schedule) is another protocol and is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pathfm.compare.records import EVA, EVA_SLIDE, Score, Task
from pathfm.datasets import DATASETS
from pathfm.datasets.benchmark import SplitName

LABEL = "published, eva leaderboard"

_DATA: tuple[tuple[str, SplitName], ...] = (
    ("bach", "val"),
    ("breakhis", "val"),
    ("crc", "val"),
    ("gleason", "val"),
    ("mhist", "val"),
    ("patch_camelyon", "test"),
    ("camelyon16_small", "test"),
)
_ROWS = {
    "lunit S/16": (0.783, 0.742, 0.940, 0.750, 0.781, 0.897, 0.771),
    "kaiko S/16": (0.812, 0.734, 0.940, 0.698, 0.831, 0.902, 0.788),
    "kaiko B/8": (0.866, 0.832, 0.959, 0.744, 0.829, 0.915, 0.814),
    "UNI": (0.785, 0.785, 0.944, 0.750, 0.843, 0.937, 0.833),
    "Midnight-12k": (0.904, 0.819, 0.966, 0.800, 0.804, 0.929, 0.849),
    "Virchow2": (0.883, 0.821, 0.967, 0.783, 0.861, 0.938, 0.861),
    "UNI2-h": (0.915, 0.859, 0.965, 0.775, 0.824, 0.950, 0.849),
}


def published_scores(tasks: Sequence[Task]) -> Iterator[Score]:
    """Published rows for those tasks that are what was published, and for no other.

    That is: heads trained exactly as eva's, on the data set's own splits, all of its samples, the same
    part reported. Raises nothing: a task that differs in anything simply gets no published rows.
    """
    columns = {data: (at, reported) for at, (data, reported) in enumerate(_DATA)}
    for task in tasks:
        if task.data not in columns:
            continue
        if task.protocol != (EVA_SLIDE if task.data == "camelyon16_small" else EVA):
            continue
        at, reported = columns[task.data]
        counts = DATASETS[task.data].facts.counts
        n = counts[reported] if task.protocol == EVA_SLIDE else sum(counts.values())
        if task.reported == reported and task.n == n:
            for model, values in _ROWS.items():
                yield Score(
                    model=f"{model} ({LABEL})",
                    task=task,
                    mean=values[at],
                    sd=None,
                    n_repeats=20 if task.protocol == EVA_SLIDE else 5,
                    interval=None,
                    interval_of="",
                    backbone_digest="",
                    source=LABEL,
                )
