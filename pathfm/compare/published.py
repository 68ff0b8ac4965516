"""Figures of the public eva leaderboard, for tables of heads trained by the same protocol.

Mean over 5 runs of macro accuracy (two classes: balanced accuracy), as published under eva's current
protocol (AdamW), three decimals. The older table of kaiko's paper (SGD, cosine schedule) is another
protocol and is not here; neither is the leaderboard's Camelyon16, since which patches of a slide were
in a bag is not told by a result file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pathfm.compare.records import EVA, Score, Task
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
)
_ROWS = {
    "lunit S/16": (0.783, 0.742, 0.940, 0.750, 0.781, 0.897),
    "kaiko S/16": (0.812, 0.734, 0.940, 0.698, 0.831, 0.902),
    "kaiko B/8": (0.866, 0.832, 0.959, 0.744, 0.829, 0.915),
    "UNI": (0.785, 0.785, 0.944, 0.750, 0.843, 0.937),
    "Midnight-12k": (0.904, 0.819, 0.966, 0.800, 0.804, 0.929),
    "Virchow2": (0.883, 0.821, 0.967, 0.783, 0.861, 0.938),
    "UNI2-h": (0.915, 0.859, 0.965, 0.775, 0.824, 0.950),
}


def published_scores(tasks: Sequence[Task]) -> Iterator[Score]:
    """Published rows for those tasks that are what was published, and for no other.

    That is: heads trained exactly as eva's, on the data set's own splits, all of its samples, the same
    part reported. Raises nothing: a task that differs in anything simply gets no published rows.
    """
    columns = {data: (at, reported) for at, (data, reported) in enumerate(_DATA)}
    for task in tasks:
        if task.data not in columns or task.protocol != EVA:
            continue
        at, reported = columns[task.data]
        n = sum(DATASETS[task.data].facts.counts.values())
        if task.reported == reported and task.n == n:
            for model, values in _ROWS.items():
                yield Score(
                    model=f"{model} ({LABEL})",
                    task=task,
                    mean=values[at],
                    sd=None,
                    n_repeats=5,
                    interval=None,
                    interval_of="",
                    backbone_digest="",
                    source=LABEL,
                )
