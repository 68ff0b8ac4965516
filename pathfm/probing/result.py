"""What a probing found, as `probe.json` holds it, and what must be said beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pathfm.embeddings import Embeddings
from pathfm.probing.measuring import BackboneResult
from pathfm.probing.scoring import MOST_MPPS, Paired

COLLAPSE_BELOW = 0.7
"""Share of the baseline's RankMe below which the features are said to collapse."""


@dataclass(frozen=True)
class ProbeResult:
    """What `probe.json` holds."""

    key: str  # digest of the features and the options: a rerun with the same key is skipped
    data: str
    data_digest: str
    input_px: int
    classes: list[str]
    n: int
    n_per_class: list[int]
    n_train: int  # with the rows that choose, where the split is ours
    n_test: int  # rows reported
    n_seeds: int
    seed: int
    test_share: float
    k: int
    backbones: list[BackboneResult]
    paired: list[Paired]
    caveats: list[str]
    own_splits: bool = False  # the data set's own, instead of drawn ones
    n_val: int = 0  # rows that choose: C, the learning rate, the best checkpoint
    selected_on: Literal["train", "val"] = "val"  # train: a part of it that is cut out to choose
    reported_on: Literal["val", "test"] = "test"
    also: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)  # files, one a backbone, as they were given
    shots: int = 0  # samples a class that each run is trained on, drawn anew; 0: all of train
    sizes: list[list[int]] = field(default_factory=list)  # fitted on, reported: of each repeat
    carved: bool = False  # val was cut out of the data's own train

    @property
    def verdict(self) -> str:
        """One line a backbone and probe: is it no worse than the baseline minus one sd?"""
        return "\n".join(map(self._told, self.paired))

    def _told(self, p: Paired) -> str:
        of = "runs" if p.probe == "eva" or self.own_splits else "seeds"
        several = len(p.differences) > 1
        spread = f" ± {100 * p.sd:.1f}" if several else ""
        margin = f" minus one sd ({100 * self._sd_of(p):.1f} points)" if several else ""
        line = (
            f"{p.other} no worse than {p.baseline}{margin} ({p.probe}): "
            f"{'yes' if p.no_worse else 'NO'} ({100 * p.mean:+.1f}{spread} points, "
            f"{f'paired over {len(p.differences)} {of}' if several else 'paired'}"
        )
        if p.interval and p.p is not None:
            low, high = (100 * x for x in p.interval)
            line += f"; 95 % interval {low:+.1f} to {high:+.1f}, p {p.p:.2g}"
        if p.mcnemar_p is not None:
            line += f", McNemar's exact p {p.mcnemar_p:.2g}"
        return line + ")"

    def _sd_of(self, p: Paired) -> float:
        """The baseline's sd over its repeats, which is the margin of `no_worse`."""
        return next(b for b in self.backbones if b.name == p.baseline).probes[p.probe].sd


@dataclass(frozen=True)
class Model:
    """One model and pooling, and its features at each µm/px of the input, finest first."""

    name: str
    at: list[BackboneResult]


def by_model(backbones: Sequence[BackboneResult]) -> list[Model]:
    """Backbones whose µm/px is known, those of one model (weights, pooling, precision) together.

    A model is called what its names begin with alike ("dino-0.5" and "dino-1" are dino). Of two of one µm/px
    the first counts.
    """
    found: dict[tuple[str, str, str, str], dict[float, BackboneResult]] = {}
    for b in backbones:
        if b.mpp > 0:
            kind = (b.backbone, b.backbone_digest, b.pooling, b.precision)
            found.setdefault(kind, {}).setdefault(b.mpp, b)
    models = []
    for at in found.values():
        rows = [at[mpp] for mpp in sorted(at)]
        models.append(Model(_common_name([b.name for b in rows]) or rows[0].backbone, rows))
    return models


def _common_name(names: Sequence[str]) -> str:
    """What all begin with, without a number that was cut in two."""
    if len(names) == 1:
        return names[0]
    letters = takewhile(lambda each: len(set(each)) == 1, zip(*names, strict=False))
    return re.sub(r"[-_ ][\d.]*$|\d*\.$", "", "".join(each[0] for each in letters))


def load_result(path: Path) -> ProbeResult | None:
    """The result in a `probe.json`, or None where there is none that can be read."""
    try:
        return TypeAdapter(ProbeResult).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def caveats_of(
    data: Embeddings, backbones: Sequence[BackboneResult], *, own: bool, reported_on: str
) -> list[str]:
    """A sentence for all that flatters a figure or limits what it says."""
    first, *others = backbones
    said = [
        f"RankMe of {other.name} is {other.rankme / first.rankme:.2f} of {first.name}'s: below "
        f"{COLLAPSE_BELOW} its features have begun to collapse, whatever the probe says."
        for other in others
        if other.rankme < COLLAPSE_BELOW * first.rankme
    ]
    if len({backbone.precision for backbone in backbones}) > 1:
        each = ", ".join(f"{backbone.name} in {backbone.precision}" for backbone in backbones)
        said.append(
            f"Features are of different precision ({each}): where bf16 turned none of a backbone's "
            "features (cosine to fp32 at least 0.999) it was used."
        )
    if own and reported_on == "val":
        said.append(
            "No test split: validation chose (C, learning rate, best checkpoint) and is what is "
            "reported, as eva does on such data. These scores are optimistic."
        )
    if not own and not data.groups:
        said.append(
            "No slide or patient ids (no groups.csv): neighbouring patches can fall on both sides "
            "of a split, so these scores are optimistic. Compare them with each other only."
        )
    if not own and any("eva" in b.probes or b.few_shot for b in backbones):
        said.append(
            "eva's heads and few-shot see the first split alone: their sd is over runs (first head, "
            "batches) and draws, that of the others over splits."
        )
    absent = {
        name
        for b in backbones
        for s in b.probes.values()
        for name, recall in zip(data.classes, s.recall, strict=True)
        if recall is None
    }
    if absent:
        said.append(
            f"No picture of {', '.join(sorted(absent))} is reported: balanced accuracy is over the other classes."
        )
    said += sorted({s.interval_note for b in backbones for s in b.probes.values()} - {""})
    if data.mpp is not None and not any(b.by_mpp for b in backbones):
        n_mpp = len(np.unique(data.mpp[np.isfinite(data.mpp)]))
        said.append(
            f"Pictures are of {n_mpp} different µm/px, and there is no table by µm/px: at most {MOST_MPPS}, each "
            "with reported pictures in every repeat."
        )
    said.append(
        "The sd is over runs on one split; it does not tell how another data set would differ."
        if own
        else "The sd is over splits of one data set; it does not tell how another data set would differ."
    )
    return said
