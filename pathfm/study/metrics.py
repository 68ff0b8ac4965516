"""The names of a study's figures: what people call them, their unit, which way is better, and who has them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pathfm.study.plan import Study

_RUN = (
    "patches_seen",
    "optimizer_steps",
    "views_seen",
    "distinct_patches",
    "slides_seen",
    "patches_per_s",
)
_ROBUST = ("clean_error", "mean_corrupted_error", "mce", "relative_mce")
_WATCHED = ("rankme_start", "rankme_end")
_FOREGROUND = ("drawn_dice", "drawn_iou", "synthetic_dice", "synthetic_iou")
_CALLED = {"logistic": "logistic regression", "knn": "kNN", "eva": "eva's head"}
_SHARES = ("probe/", "few-shot/", "foreground/", "watch/probe_", "robust/error", "robust/noise",
           "robust/clean", "robust/mean")  # fmt: skip


def higher_is_better(metric: str) -> bool:
    """Errors, mCE and seconds should be low; all else should be high."""
    return not metric.startswith(("robust/", "cost/"))


def scale_of(metric: str) -> float:
    """What a metric is multiplied by to be told: shares in per cent, CE is so already."""
    return 100.0 if metric.startswith(_SHARES) and not metric.endswith("/rankme") else 1.0


def unit_of(metric: str) -> str:
    """The unit that goes with `scale_of`."""
    in_per_cent = metric.startswith(("robust/mce", "robust/ce", "robust/relative"))
    return "%" if scale_of(metric) == 100.0 or in_per_cent else ""


def words_of(metric: str) -> str:
    """A metric as people say it; one that is not known as it is written."""
    match metric.split("/"):
        case ["probe", view, "rankme"]:
            return f"RankMe, view {view}"
        case ["probe", view, name]:
            return f"balanced accuracy, {_CALLED.get(name, name)}, view {view}"
        case ["few-shot", view, method, shots]:
            return f"balanced accuracy from {shots} a class, {_CALLED.get(method, method)}, view {view}"
        case ["watch", name] if name.endswith("_mean"):
            return f"mean over training of: {words_of_curve(name.removesuffix('_mean'))}"
        case ["robust", "noise", share]:
            return f"error after {100 * float(share):g} % wrong labels"
        case ["robust", "error", name]:
            return f"error under {name}"
        case ["robust", "ce", name]:
            return f"CE under {name} (100: the start's)"
        case ["robust", "mce"]:
            return "mCE (100: the start's)"
        case ["robust", "relative_mce"]:
            return "relative mCE (100: the start's)"
        case ["run", "patches_per_s"]:
            return "patches a second in training"
        case ["cost", name]:
            return name.removesuffix("_s").replace("_", " ") + ", seconds"
        case ["foreground", name]:
            return name.replace("_", " ").replace("dice", "Dice").replace("iou", "IoU")
        case ["run" | "robust", name]:
            return name.replace("_", " ")
        case _:
            return metric


def words_of_curve(name: str) -> str:
    """A number of a run's metrics.jsonl as people say it."""
    return {
        "probe_logistic": "balanced accuracy of the probe in training, logistic regression",
        "probe_knn": "balanced accuracy of the probe in training, kNN",
        "rankme": "RankMe of the monitor patches",
    }.get(name, name)


def check_metric(study: Study, metric: str) -> str:
    """Why no cell of the study will have the metric, with what there is; "" where cells will."""
    there = _there(study)
    if metric in there:
        return ""
    near = metric.split("/")[0]
    some = sorted(name for name in there if name.startswith(f"{near}/")) or sorted(there)
    return f"{metric} is no figure of this study; there: {', '.join(some[:12])}"


def _there(study: Study) -> Collection[str]:
    """All figures that a study's cells may have."""
    if study.kind == "foreground":
        held = {f"run/{name}" for name in _RUN[:3]}
        return held | {f"foreground/{name}" for name in _FOREGROUND} | {"cost/train_s"}
    found = {f"run/{name}" for name in _RUN} | {f"watch/{name}" for name in _WATCHED}
    found |= {"cost/train_s", "cost/probe_s"}
    if study.curves:
        found.add(f"watch/{study.curves}_mean")
    for view in study.views:
        found |= _probed(view.name, study.probe)
    if study.robustness is not None:
        found |= _damaged(study.robustness)
    return found


def _probed(view: str, given: dict[str, Any]) -> set[str]:
    from pathfm.probing.few_shot import METHODS, SHOTS
    from pathfm.probing.measuring import PROBES

    also = given.get("also") or ()
    names = {*PROBES, "rankme"} | ({"eva"} & set(also))
    found = {f"probe/{view}/{name}" for name in names}
    if "few-shot" in also:
        shots = given.get("shots") or SHOTS
        found |= {f"few-shot/{view}/{method}/{k}" for method in METHODS for k in shots}
    return found


def _damaged(given: dict[str, Any]) -> set[str]:
    from pathfm.corruptions import CORRUPTIONS
    from pathfm.robustness import RobustnessConfig

    shares = given.get("noise_shares", RobustnessConfig.model_fields["noise_shares"].default)
    kinds = given.get("corruptions") or tuple(CORRUPTIONS)
    found = {f"{what}/{kind}" for what in ("error", "ce") for kind in kinds}
    found |= {f"noise/{share:g}" for share in shares} | set(_ROBUST)
    return {f"robust/{name}" for name in found} | {"cost/robustness_s"}
