"""What a study holds equal, reckoned from its settings before and read from its results after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pathfm.embed import EmbedConfig
from pathfm.foreground_train import ForegroundTrainConfig
from pathfm.pretrain import PretrainConfig
from pathfm.probe import ProbeConfig
from pathfm.robustness import RobustnessConfig
from pathfm.runtime import PathfmError
from pathfm.study.metrics import check_metric
from pathfm.study.plan import Arm, Study, settings_of, validated

HELD = ("patches_seen", "optimizer_steps", "views_seen")


def config_of(
    study: Study, arm: Arm, seed: int = 0, over: Mapping[str, Any] | None = None
) -> PretrainConfig | ForegroundTrainConfig:
    """The verb's own config of an arm at a seed; `PathfmError` that names the arm."""
    model = PretrainConfig if study.kind == "pretrain" else ForegroundTrainConfig
    values = settings_of(study, arm) | {"seed": seed} | dict(over or {})
    found: PretrainConfig | ForegroundTrainConfig = validated(
        model, values, f"study {study.name}, arm {arm.name}"
    )
    return found


def planned(config: PretrainConfig | ForegroundTrainConfig) -> dict[str, int]:
    """Patches seen (crops, of thumbnails), optimizer steps and views seen of a whole run.

    A patch is seen each time it is drawn, and gives every view that the method takes of it.
    """
    seen = config.steps * config.batch_size
    views = len(config.views.specs) if isinstance(config, PretrainConfig) else 1
    return {"patches_seen": seen, "optimizer_steps": config.steps, "views_seen": seen * views}


def check_equal(study: Study, by_arm: Mapping[str, Mapping[str, float]], when: str) -> None:
    """Raises PathfmError, with the numbers, where arms differ in what the study holds equal."""
    for what in study.equal:
        values = {name: facts[what] for name, facts in by_arm.items()}
        if len(set(values.values())) > 1:
            (low, few), (high, many) = (
                pick(values.items(), key=lambda pair: pair[1]) for pick in (min, max)
            )
            raise PathfmError(
                f"study {study.name} holds {what} equal, and {when} {low} has {few:,.0f}, {high} "
                f"{many:,.0f}: mend the arms' steps, batch_size or views"
            )


def check_plan(study: Study) -> dict[str, dict[str, int]]:
    """What each arm will see, known to be equal where it must be; `PathfmError` for a wrong arm."""
    found = {arm.name: planned(config_of(study, arm)) for arm in study.arms}
    check_equal(study, found, "as planned")
    _check_measures(study)
    for metric in (study.criterion.metric, *study.also_shown):
        if why := check_metric(study, metric):
            raise PathfmError(f"study {study.name}: {why}")
    return found


def _check_measures(study: Study) -> None:
    """PathfmError for settings that a cell's measuring would refuse hours from now."""
    where, weights = f"study {study.name}", study.data.weights
    for view in study.views:
        own = {"data": "patches", "weights": weights}
        validated(EmbedConfig, {**view.embed, **own}, f"{where}, view {view.name}")
    validated(ProbeConfig, {**study.probe, "embeddings": ["cell"]}, f"{where}, probe")
    if study.robustness is not None:
        models = {"data": "patches", "models": [f"start={weights}"]}
        validated(RobustnessConfig, {**study.robustness, **models}, f"{where}, robustness")
