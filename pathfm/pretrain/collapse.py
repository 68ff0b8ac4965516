"""Collapse, detected and said: features that shrink to few directions, targets that stop to tell.

Pure rules over numbers of a run. Each names number, threshold and remedy; none stops the run.

    rankme            RankMe of the monitor patches against its start (Garrido et al. 2023)
    feature_std       spread of their directions against its start (Chen & He 2021, section 4.1)
    one_target        all samples of a batch get the same few targets: entropy of the mean target
    sharp_target      a target's own entropy is 0, where the method tells no entropy of the mean
    no_information    targets differ no more between samples than within one, flat or sharp
    flat_target       every target is uniform: it says nothing (entropy log K)
    chance            the loss stays at chance after the warm-up
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathfm.pretrain.watch_settings import CollapseConfig

_SEVERAL = ("one_target", "sharp_target", "no_information", "flat_target", "chance")
_REMEDY = {
    "rankme": "lower optim.lr or lengthen optim.warmup_steps, and look at pictures/curves.png",
    "feature_std": "lower optim.lr or lengthen optim.warmup_steps, and look at pictures/curves.png",
    "one_target": "lower the method's centre momentum, raise its teacher_temp or lower optim.lr",
    "sharp_target": "raise the method's teacher_temp or lower its centre momentum",
    "no_information": "lower optim.lr, and see teacher_entropy: near 0 raise teacher_temp, near log K "
    "lower it",
    "flat_target": "lower the method's teacher_temp (0.04 is usual) or lower optim.lr",
    "chance": "raise optim.lr, lower teacher_temp, or check that the views still show tissue",
}


@dataclass(frozen=True)
class Finding:
    """A rule that holds: its name, the number, the bound it passed, in words."""

    rule: str
    step: int
    words: str

    @property
    def line(self) -> str:
        """What a person reads."""
        remedy = _REMEDY[self.rule]
        return f"collapse after {self.step:,} steps ({self.rule}): {self.words}. To mend: {remedy}"


@dataclass(frozen=True)
class Expected:
    """What numbers of this run are compared with.

    log_k: entropy of a uniform target, nats, None where the method has no prototypes. chance: loss
    of a model that knows nothing. n_targets: teacher outputs in a batch. warmup_steps: before them
    a loss at chance is no news.
    """

    log_k: float | None = None
    chance: float | None = None
    n_targets: int = 1
    warmup_steps: int = 0

    @staticmethod
    def of(config: Any) -> Expected:
        """From a PretrainConfig: prototypes and batch of DINO; 2N - 1 candidates of a contrast."""
        out_dim = getattr(getattr(config, config.method, None), "out_dim", None)
        log_k = math.log(out_dim) if out_dim else None
        chance = log_k
        if config.method in ("simclr", "supcon"):
            n_views = len(config.views.specs)
            chance = math.log(max(2, n_views * config.batch_size - 1))
        n_targets = 2 * config.batch_size
        return Expected(log_k, chance, n_targets, config.optim.warmup_steps)


def feature_std(features: NDArray[np.floating]) -> float:
    """Spread of directions: sqrt(d) times the mean over dimensions of the sd of f / |f|.

    1 for directions spread evenly over the sphere, 0 when all are one (SimSiam, section 4.1, where
    it is 1 / sqrt(d)). features: (n, d).
    """
    f = np.asarray(features, np.float64)
    norms = np.linalg.norm(f, axis=1, keepdims=True)
    unit = f / np.where(norms == 0, 1.0, norms)
    return float(unit.std(axis=0).mean() * math.sqrt(f.shape[1]))


class CollapseWatch:
    """Sees a run's numbers step by step and says once a rule that holds has held long enough."""

    def __init__(self, config: CollapseConfig, state: Mapping[str, Any] | None = None) -> None:
        self._config = config
        given = state or {}
        self._held: dict[str, int] = dict(given.get("held", {}))
        self.found: dict[str, int] = dict(given.get("found", {}))

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from; JSON."""
        return {"held": dict(self._held), "found": dict(self.found)}

    @property
    def first_step(self) -> int | None:
        """Steps done when the first rule was found to hold; None: never."""
        return min(self.found.values(), default=None)

    def see(
        self,
        done: int,
        numbers: Mapping[str, float],
        start: Mapping[str, float],
        expected: Expected,
    ) -> list[Finding]:
        """Rules newly found after `done` optimizer steps.

        numbers: of this step; those not measured are absent. start: `rankme` and `feature_std` at
        step 0.
        """
        holding = _against_start(self._config, numbers, start)
        several = _of_targets(self._config, numbers, expected, done)
        for rule in _SEVERAL:
            self._held[rule] = self._held.get(rule, 0) + 1 if rule in several else 0
            if self._held[rule] >= self._config.patience_steps:
                holding[rule] = several[rule]
        new = [rule for rule in holding if rule not in self.found]
        self.found |= dict.fromkeys(new, done)
        return [Finding(rule, done, holding[rule]) for rule in new]


def _against_start(
    config: CollapseConfig, numbers: Mapping[str, float], start: Mapping[str, float]
) -> dict[str, str]:
    holding = {}
    for rule, share, what in (
        ("rankme", config.rankme_share, "RankMe"),
        ("feature_std", config.feature_std_share, "feature std"),
    ):
        now, then = numbers.get(rule), start.get(rule)
        if now is not None and then is not None and not now >= share * then:
            holding[rule] = f"{what} is {now:.4g}, below {share * then:.4g} = {share:g} x its start"
    return holding


def _of_targets(
    config: CollapseConfig, numbers: Mapping[str, float], expected: Expected, done: int
) -> dict[str, str]:
    """Rules about one step's loss and teacher, which must hold `patience_steps` in a row."""
    holding = {}
    log_k, chance = expected.log_k, expected.chance
    own, mean = numbers.get("teacher_entropy"), numbers.get("teacher_marginal_entropy")
    if log_k is not None and mean is not None:
        # n sharp targets have a mean of entropy log n at most, however many prototypes there are
        reach = min(log_k, math.log(max(2, expected.n_targets)))
        bound = config.marginal_entropy_share * reach
        if mean < bound:
            holding["one_target"] = (
                f"entropy of the mean target is {mean:.4g} nats, below {bound:.4g} = "
                f"{config.marginal_entropy_share:g} x {reach:.4g}, what the batch can reach"
            )
    information = numbers.get("teacher_information")
    if log_k is not None and information is not None and done > expected.warmup_steps:
        bound = config.information_share * min(log_k, math.log(max(2, expected.n_targets)))
        if information < bound:
            holding["no_information"] = (
                f"targets tell {information:.4g} nats about their sample, less than {bound:.4g}"
            )
    if log_k is not None and own is not None:
        bound = config.teacher_entropy_share * log_k
        if mean is None and own < bound:
            holding["sharp_target"] = (
                f"teacher entropy is {own:.4g} nats, below {bound:.4g} (log K = {log_k:.4g})"
            )
        if done > expected.warmup_steps and own > log_k - bound:
            holding["flat_target"] = (
                f"teacher entropy is {own:.6g} nats, above {log_k - bound:.6g} (log K = {log_k:.6g})"
            )
    loss = numbers.get("dino_loss", numbers.get("loss"))
    if chance is not None and loss is not None and done > expected.warmup_steps:
        bound = config.chance_share * chance
        if abs(loss - chance) < bound:
            holding["chance"] = (
                f"loss is {loss:.5g}, within {bound:.3g} of chance ({chance:.5g}) after the warm-up"
            )
    return holding
