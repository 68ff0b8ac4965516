"""Pictures of a study that a reader grasps at a look: every seed, the differences, the curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from online_patching.stores.local import atomic_write_bytes
from pathfm.compare.drawing import plain_words, save, sheet
from pathfm.pictures import COLOURS
from pathfm.study.judging import Judged, Results
from pathfm.study.plan import Study

_SOFT = "#8a8a8a"
_SAYS = {"yes": "#009e73", "no": "#d55e00", "cannot tell": "#8a8a8a", "not finished": "#8a8a8a"}


def scale_of(metric: str) -> float:
    """What a metric is multiplied by to be told: shares in per cent, CE is so already."""
    shares = ("probe/", "few-shot/", "foreground/", "watch/probe_", "robust/error", "robust/noise",
              "robust/clean", "robust/mean")  # fmt: skip
    return 100.0 if metric.startswith(shares) and not metric.endswith("/rankme") else 1.0


def unit_of(metric: str) -> str:
    """The unit that goes with `scale_of`."""
    if scale_of(metric) == 100.0 or metric.startswith(
        ("robust/mce", "robust/ce", "robust/relative")
    ):
        return "%"
    return ""


def draw_verdict(study: Study, judged: Judged, path: Path) -> Path:
    """Left every seed of every arm, right the differences that are judged, with intervals and margin."""
    rows = max(len(study.arms), len(judged.differences))
    figure, panels = sheet(2, 1, 11.5, 1.6 + 0.5 * rows)
    _values(study, judged, study.criterion.metric, panels[0][0])
    _differences(study, judged, panels[0][1])
    return atomic(path, save(figure))


def draw_others(study: Study, judged: Judged, path: Path) -> Path | None:
    """A panel for each further metric; None where there is none."""
    names = [m for m in study.also_shown if any(judged.values[m].values())]
    if not names:
        return None
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, panels = sheet(columns, lines, 4.6 * columns, lines * (1.3 + 0.36 * len(study.arms)))
    for number, panel in enumerate(panels.reshape(-1)):
        if number < len(names):
            _values(study, judged, names[number], panel)
        else:
            panel.set_axis_off()
    return atomic(path, save(figure))


def draw_curves(study: Study, results: Results, path: Path) -> Path | None:
    """The number watched in training against optimizer steps: a line an arm, faint ones for its seeds."""
    name = study.curves
    found = {arm.name: _curves(study, results, arm.name) for arm in study.arms} if name else {}
    if not any(found.values()) or name is None:
        return None
    scale = 100.0 if name.startswith("probe_") else 1.0
    figure, panels = sheet(1, 1, 8.0, 4.2)
    panel = panels[0][0]
    for number, (arm, curves) in enumerate(found.items()):
        colour = COLOURS[number % len(COLOURS)]
        for points in curves:
            panel.plot(points[:, 0], scale * points[:, 1], color=colour, alpha=0.3, linewidth=1)
        if curves and len({len(points) for points in curves}) == 1:
            mean = np.mean(curves, axis=0)
            panel.plot(
                mean[:, 0],
                scale * mean[:, 1],
                color=colour,
                linewidth=2.4,
                marker="o",
                markersize=4,
            )
            panel.annotate(
                plain_words(arm), (mean[-1, 0], scale * mean[-1, 1]), (6, 0), color=colour,
                textcoords="offset points", va="center", fontsize=10,
            )  # fmt: skip
    panel.margins(x=0.16)
    panel.set_xlim(left=0)
    panel.set_xlabel("optimizer steps")
    panel.set_title(_words_of(name) + (", %" if scale == 100 else ""), fontsize=10, loc="left")
    _plain(panel)
    return atomic(path, save(figure))


def _curves(study: Study, results: Results, arm: str) -> list[Any]:
    cells = [results.get(f"{arm}-s{seed}") for seed in range(study.seeds)]
    found = [np.asarray(c["curves"].get(study.curves, []), float) for c in cells if c is not None]
    return [points for points in found if len(points)]


def words_of(metric: str) -> str:
    """A metric as people say it; one that is not known as it is written."""
    probes = {"logistic": "logistic regression", "knn": "kNN", "rankme": "RankMe"}
    match metric.split("/"):
        case ["probe", view, name]:
            return f"{probes.get(name, name)}, view {view}"
        case ["few-shot", view, method, shots]:
            return f"{shots} samples a class, {method}, view {view}"
        case ["watch", name] if name.endswith("_mean"):
            return f"mean over training of: {_words_of(name.removesuffix('_mean'))}"
        case ["robust", "noise", share]:
            return f"error after {100 * float(share):g} % wrong labels"
        case ["robust", "error", name]:
            return f"error under {name}"
        case ["robust", name] if name.endswith("_error"):
            return name.replace("_", " ")
        case ["robust", "ce", name]:
            return f"CE under {name}, of the start's"
        case ["run", "patches_per_s"]:
            return "patches a second in training"
        case ["run", name]:
            return name.replace("_", " ")
        case ["cost", name]:
            return name.removesuffix("_s").replace("_", " ") + ", seconds"
        case ["foreground", name]:
            return name.replace("_", " ").replace("dice", "Dice").replace("iou", "IoU")
        case ["robust", "mce"]:
            return "mCE (100: the start's; lower is better)"
        case _:
            return metric


def _words_of(name: str) -> str:
    known: Mapping[str, str] = {
        "probe_logistic": "probe in training, logistic regression",
        "probe_knn": "probe in training, kNN",
        "rankme": "RankMe of the monitor patches",
    }
    return known.get(name, name)


def _values(study: Study, judged: Judged, metric: str, panel: Any) -> None:
    """A row an arm: a dot a seed, a bar for the mean; a dashed line where everything began."""
    scale, unit = scale_of(metric), unit_of(metric)
    names = [arm.name for arm in study.arms][::-1]
    for row, name in enumerate(names):
        values = [scale * value for value in judged.values[metric][name]]
        if values:
            panel.plot(
                [np.mean(values)] * 2, [row - 0.28, row + 0.28], color=COLOURS[0], linewidth=3
            )
        panel.plot(values, [row] * len(values), "o", color=COLOURS[0], alpha=0.55, markersize=7)
    start = judged.start.get(metric)
    if start is not None:
        panel.axvline(scale * start, color=_SOFT, linestyle="--", linewidth=1.2)
        panel.annotate(
            "start", (scale * start, 1.0), (3, -3), color=_SOFT, fontsize=8, va="top",
            xycoords=("data", "axes fraction"), textcoords="offset points",
        )  # fmt: skip
    panel.set_yticks(range(len(names)), [plain_words(name) for name in names])
    panel.set_ylim(-0.7, len(names) - 0.3)
    panel.set_title(words_of(metric) + (f", {unit}" if unit else ""), fontsize=10, loc="left")
    _plain(panel)


def _differences(study: Study, judged: Judged, panel: Any) -> None:
    metric, margin = study.criterion.metric, study.criterion.margin
    scale = scale_of(metric)
    rows = judged.differences[::-1]
    for row, each in enumerate(rows):
        colour = _SAYS[each.answers(margin)]
        if math.isfinite(each.low):
            panel.plot([scale * each.low, scale * each.high], [row, row], color=colour, linewidth=3)
        panel.plot(
            [scale * v for v in each.values],
            [row] * len(each.values),
            "o",
            color=colour,
            alpha=0.55,
        )
        if each.values:
            panel.plot([scale * each.mean] * 2, [row - 0.2, row + 0.2], color=colour, linewidth=3)
    panel.axvline(scale * margin, color="#1d1b20", linewidth=1.2)
    labels = [plain_words(f"{each.arm}\n− {each.against}") for each in rows]
    panel.set_yticks(range(len(rows)), labels)
    panel.set_ylim(-0.7, len(rows) - 0.3)
    side = "better →" if study.criterion.higher_is_better else "better (lower) →"
    of = "points" if unit_of(metric) == "%" else ""
    panel.set_title(f"difference by seed{', ' + of if of else ''}; {side}", fontsize=10, loc="left")
    _plain(panel)


def atomic(path: Path, content: bytes) -> Path:
    """Writes a picture whole or not at all."""
    atomic_write_bytes(path, content)
    return path


def _plain(panel: Any) -> None:
    panel.tick_params(labelsize=9)
    panel.grid(axis="x", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
