"""The tables of a study's page: plain text, cell by cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pathfm.study.judging import Difference, Judged, Results
from pathfm.study.metrics import higher_is_better, scale_of, unit_of, words_of
from pathfm.study.offline import JPEG_QUALITY
from pathfm.study.plan import Study

_AT = "run/share_at_"
_MOST_MPPS = 8
Table = tuple[str, list[str], list[list[str]]]
"""Title, heads, rows."""


def arms_table(study: Study, judged: Judged) -> Table:
    """What each arm and each start reached."""
    metrics = list(judged.values)
    heads = ["arm", "what it is", *(f"{_with_unit(m)}{which(m)}" for m in metrics)]
    tells = {arm.name: arm.tells for arm in study.arms}
    names = dict.fromkeys(name for m in metrics for name in judged.values[m])
    rows = [
        [
            name,
            tells.get(name, "weights that arms begin with, nothing trained"),
            *(_told(judged.values[m].get(name, []), scale_of(m)) for m in metrics),
        ]
        for name in names
    ]
    return "Arms: mean ± sd over seeds", heads, rows


def _with_unit(metric: str) -> str:
    return f"{words_of(metric)}{', ' + unit_of(metric) if unit_of(metric) else ''}"


def differences_table(study: Study, judged: Judged) -> Table:
    """The differences in the metric that decides, those that decide and those that are only shown."""
    metric = study.criterion.metric
    said = [*judged.answers, *("" for _ in judged.also)]
    if judged.verdict == "not finished":
        said = [""] * len(said)
    rows = [
        [*_row(each), "yes" if of else "no", word]
        for of, each, word in zip(
            [*(True for _ in judged.differences), *(False for _ in judged.also)],
            [*judged.differences, *judged.also],
            said,
            strict=True,
        )
    ]
    heads = ["difference", "by seed", "mean", _level(study), "decides", "says"]
    return f"Differences in {_with_unit(metric)}{which(metric)}, paired by seed", heads, rows


def _row(each: Difference) -> list[str]:
    scale = scale_of(each.metric)
    values = ", ".join(signed(scale * value) for value in each.values)
    mean = signed(scale * each.mean) if each.values else ""
    return [f"{each.arm} − {each.against}", values, mean, interval(each)]


def _level(study: Study) -> str:
    return f"{100 * study.criterion.level:g} % interval"


def moved_table(study: Study, judged: Judged) -> list[Table]:
    """Each arm less its start: an arm that training did not move can hardly differ from another."""
    metric = study.criterion.metric
    rows = [[each.arm, *_row(each)[1:]] for each in judged.moved if each.values]
    heads = ["arm", "by seed", "mean", _level(study)]
    title = f"What training did to {_with_unit(metric)}{which(metric)}: each arm less the weights it began with"
    return [(title, heads, rows)] if rows else []


def beside_table(study: Study, judged: Judged) -> list[Table]:
    """The same pairs in what else was measured."""
    rows = [
        [f"{each.arm} − {each.against}", f"{_with_unit(metric)}{which(metric)}", *_row(each)[2:]]
        for metric, differences in judged.beside.items()
        for each in differences
        if each.values
    ]
    heads = ["difference", "in", "mean", _level(study)]
    return (
        [("The same pairs in what else was measured, which decides nothing", heads, rows)]
        if rows
        else []
    )


def interval(each: Difference) -> str:
    """From where to where; "" where there is none."""
    if not math.isfinite(each.low):
        return ""
    scale = scale_of(each.metric)
    return f"{signed(scale * each.low)} to {signed(scale * each.high)}"


def shares_table(study: Study, results: Results) -> list[Table]:
    """How much of what an arm saw was at which µm/px: what was asked for is not what slides can serve."""
    found: dict[str, list[dict[float, float]]] = {}  # arm -> of each seed that is done
    for arm in study.arms:
        for seed in range(study.seeds):
            metrics = results.get(f"{arm.name}-s{seed}", {}).get("metrics", {})
            shares = {
                float(k.removeprefix(_AT)): v for k, v in metrics.items() if k.startswith(_AT)
            }
            if shares:
                found.setdefault(arm.name, []).append(shares)
    mpps = sorted({mpp for seeds in found.values() for shares in seeds for mpp in shares} - {0.0})
    if not 1 < len(mpps) <= _MOST_MPPS:
        return []
    rows = [
        [name, *(f"{100 * sum(s.get(mpp, 0.0) for s in seeds) / len(seeds):.1f}" for mpp in mpps)]
        for name, seeds in found.items()
    ]
    return [("Patches seen by µm/px, %", ["arm", *(f"{mpp:g}" for mpp in mpps)], rows)]


def cost_table(results: Results) -> list[Table]:
    """What the offline grids cost, where the study has some."""
    rows = []
    for name, cost in sorted(_offline_costs(results).items()):
        rows.append([
            name, f"{cost['patches']:,.0f}", f"{cost['bytes'] / 1e6:,.0f}", f"{cost['jpeg_bytes'] / 1e6:,.0f}",
            f"{cost['seconds']:,.0f}", f"{cost['grid_patches']:,.0f}", f"{cost['grid_bytes'] / 1e9:,.2f}",
            f"{cost['read_offline_cpu_ms']:.2f}", f"{cost['read_online_cpu_ms']:.2f}",
        ])  # fmt: skip
    heads = [
        "offline grid", "patches cut", "MB as PNG, which was read", f"MB as JPEG of quality {JPEG_QUALITY}",
        "s to cut", "whole grid, patches", "GB as PNG", "CPU ms a patch from it", "CPU ms a patch online",
    ]  # fmt: skip
    title = "What cutting beforehand costs; online patching stores no patches. CPU times were taken once"
    return [(title, heads, rows)] if rows else []


def _offline_costs(results: Results) -> dict[str, dict[str, float]]:
    return {arm: cost for each in results.values() for arm, cost in each.get("offline", {}).items()}


def which(metric: str) -> str:
    """Said where lower is better."""
    return "" if higher_is_better(metric) else " (lower is better)"


def points(metric: str) -> str:
    """The unit of a difference."""
    return " points" if unit_of(metric) == "%" else ""


def _told(values: Sequence[float], scale: float) -> str:
    if not values:
        return ""
    mean = scale * sum(values) / len(values)
    if len(values) == 1:
        return _short(mean)
    sd = scale * math.sqrt(sum((v - mean / scale) ** 2 for v in values) / (len(values) - 1))
    return f"{_short(mean)} ± {_short(sd)}"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.1f}"


def signed(value: float) -> str:
    """Two digits, always with a sign."""
    return f"{value:+.2f}".replace("-", "−")
