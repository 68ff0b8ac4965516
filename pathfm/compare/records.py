"""What is compared, in one form whatever stage it came from. Scores are 0..1, as the stages write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

EVA = "eva linear heads"
"""The protocol of published rows: heads trained as kaiko-eva 0.4.5 trains them."""


@dataclass(frozen=True)
class Task:
    """One column of a leaderboard: figures in it, and only those, stand beside each other.

    n: samples in all; told: how they were parted, what selected and what reports, in words;
    reported: "val" or "test" of the data set's own splits, "" where the splits are ours.
    """

    protocol: str
    metric: str
    data: str
    data_digest: str
    n: int
    told: str
    reported: str = ""


@dataclass(frozen=True)
class Score:
    """A model on a task: the mean of its repeats, their sd (n - 1; None for one), and the interval.

    interval: of the mean, over `interval_of` ("groups" or "pictures"), None where there is none.
    facts: what may be an axis or an ablation: params of pretraining, and of the features.
    """

    model: str
    task: Task
    mean: float
    sd: float | None
    n_repeats: int
    interval: tuple[float, float] | None
    interval_of: str
    backbone_digest: str
    source: str  # the run, or the file
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """Another model minus a baseline on the same samples; the interval is a paired one, or None."""

    task: Task
    baseline: str
    other: str
    mean: float
    interval: tuple[float, float] | None
    p: float | None
    source: str


@dataclass(frozen=True)
class Shots:
    """Few-shot: mean and sd over resamples for each number of training samples a class."""

    task: Task
    model: str
    shots: tuple[int, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    backbone_digest: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OverMpp:
    """A model's scores of one task where samples differ in µm/px, on those of each alone.

    mpp: µm/px of the input, ascending; n: reported samples; scores: mean, and its interval or None.
    """

    task: Task
    model: str
    mpp: tuple[float, ...]
    n: tuple[int, ...]
    scores: tuple[tuple[float, tuple[float, float] | None], ...]
    backbone_digest: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Confusion:
    """Counts of one model on one task, row = true class, summed over repeats."""

    task: Task
    model: str
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    backbone_digest: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CorruptedModel:
    """One model of a robustness table. Errors 0..1; CE in per cent of the reference's, None: left out."""

    name: str
    clean_error: float
    mean_corrupted_error: float
    mce: tuple[float, float, float] | None  # value, low, high
    relative_mce: tuple[float, float, float] | None
    ce: tuple[float | None, ...]
    errors: tuple[float, ...]  # mean over severities, one a corruption


@dataclass(frozen=True)
class Robustness:
    """Models under corruptions beside one reference, all of one result file."""

    data: str
    data_digest: str
    told: str
    reference: str
    corruptions: tuple[str, ...]
    models: tuple[CorruptedModel, ...]
    source: str


@dataclass(frozen=True)
class Found:
    """Everything that was found in runs and files, ready for tables and pictures."""

    scores: tuple[Score, ...] = ()
    differences: tuple[Difference, ...] = ()
    shots: tuple[Shots, ...] = ()
    over_mpp: tuple[OverMpp, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    robustness: tuple[Robustness, ...] = ()
    notes: tuple[str, ...] = ()
    embeddings: tuple[
        tuple[str, str], ...
    ] = ()  # files that were probed, digests of their backbones

    def __bool__(self) -> bool:
        return bool(self.scores or self.robustness or self.shots)


@dataclass(frozen=True)
class Source:
    """A result file: its name (which says what it holds), its bytes, and where it is from."""

    kind: str
    content: bytes
    told: str  # the run's name, or the file's path
    params: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A picture of the page: its file's name and bytes, what it shows, and the sentence below it."""

    name: str
    png: bytes
    title: str
    caption: str
