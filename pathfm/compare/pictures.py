"""Which pictures are made of what was found, and what is said below each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pathfm.compare.ablation import ablations
from pathfm.compare.curves import Curve, over_mpp, scaling
from pathfm.compare.drawing import (
    draw_ablation,
    draw_corruptions,
    draw_curves,
    draw_leaderboard,
    draw_shots,
)
from pathfm.compare.gathering import Gathered
from pathfm.compare.maps import draw_map, embedding_files, embedding_maps, still_there
from pathfm.compare.matrices import draw_confusions
from pathfm.compare.published import published_scores
from pathfm.compare.records import Confusion, Found, Picture, Shots, Task
from pathfm.compare.settings import CompareConfig
from pathfm.compare.tables import entity, labels, latest, protocols


def draw_all(gathered: Gathered, config: CompareConfig) -> list[Picture]:
    """Every picture that there are results for, in the order of the page; nothing is written."""
    found = gathered.found
    return [
        *_leaderboards(found, config.published),
        *_ablations(gathered, config),
        *_scaling(gathered, config),
        *_shots(found),
        *_over_mpp(found),
        *_corruptions(found),
        *_confusions(found),
        *_maps(found, config),
    ]


def _leaderboards(found: Found, published: bool) -> Iterator[Picture]:
    for n, (protocol, tasks) in enumerate(protocols(found.scores).items(), 1):
        kept = latest(found.scores, tasks)
        names = labels(kept)
        ours = [(names[entity(s)], s) for s in kept]
        theirs = list(published_scores(tasks)) if published else []
        png = draw_leaderboard(ours, theirs, tasks)
        told = (
            "Dots: mean over repeats. Thick lines: 95 % interval of the mean, over the reported "
            "samples; thin ones, where there is none: one sd over repeats."
        )
        if theirs:
            told += " Hollow diamonds: published, eva leaderboard."
        yield Picture(f"leaderboard_{n}.png", png, f"Leaderboard: {protocol}", told)


def _ablations(gathered: Gathered, config: CompareConfig) -> Iterator[Picture]:
    made = ablations(gathered.found, gathered.params, config.baseline)
    for n, one in enumerate(made, 1):
        told = (
            f"Difference from {one.baseline} in points of balanced accuracy on the same samples, with its paired 95 % "
            f"interval; grey where that holds 0 or p is 0.05 or more. {one.told}. From {one.source}."
        )
        png = draw_ablation(one)
        yield Picture(f"ablation_{n}.png", png, f"{one.data}: against {one.baseline}", told)


def _scaling(gathered: Gathered, config: CompareConfig) -> Iterator[Picture]:
    by_axis: dict[str, list[Curve]] = {}
    for curve in scaling(gathered.found.scores, gathered.params, config.axes):
        by_axis.setdefault(curve.axis, []).append(curve)
    for n, (axis, curves) in enumerate(by_axis.items(), 1):
        notes = " ".join(dict.fromkeys(curve.note for curve in curves if curve.note))
        told = f"A point a model, its line the 95 % interval of the score. {notes}".strip()
        png = draw_curves(curves)
        yield Picture(f"scaling_{n}.png", png, f"Score over {axis}", told)


def _shots(found: Found) -> Iterator[Picture]:
    by_task: dict[Task, list[Shots]] = {}
    for curve in found.shots:
        by_task.setdefault(curve.task, []).append(curve)
    for n, (task, curves) in enumerate(by_task.items(), 1):
        told = f"Mean and band of one sd over draws of the training samples. {task.told}."
        names = labels(curves)
        png = draw_shots(task, [replace(curve, model=names[entity(curve)]) for curve in curves])
        yield Picture(f"few_shot_{n}.png", png, f"{task.data}: {task.protocol}", told)


def _over_mpp(found: Found) -> Iterator[Picture]:
    curves = over_mpp(found.over_mpp)
    if curves:
        notes = " ".join(dict.fromkeys(curve.note for curve in curves if curve.note))
        told = (
            "One probe a model, fitted on pictures of every µm/px together and judged at each apart, "
            f"with 95 % intervals. {notes}"
        )
        yield Picture("mpp_1.png", draw_curves(curves), "Score over µm/px", told.strip())


def _corruptions(found: Found) -> Iterator[Picture]:
    for n, one in enumerate(found.robustness, 1):
        told = f"Left: CE of every corruption, {one.reference} = 100. Right: the plain error. {one.told}."
        png = draw_corruptions(one)
        yield Picture(f"corruptions_{n}.png", png, f"{one.data}: corrupted test pictures", told)


def _confusions(found: Found) -> Iterator[Picture]:
    by_task: dict[Task, list[Confusion]] = {}
    for one in found.confusions:
        by_task.setdefault(one.task, []).append(one)
    for n, (task, every) in enumerate(by_task.items(), 1):
        told = f"Per cent of the samples of each true class, summed over repeats. {task.told}."
        names = labels(every)
        png = draw_confusions([replace(one, model=names[entity(one)]) for one in every])
        yield Picture(
            f"confusion_{n}.png", png, f"{task.data}: what is taken for what, {task.protocol}", told
        )


def _maps(found: Found, config: CompareConfig) -> Iterator[Picture]:
    files = embedding_files(config.maps) or still_there(found.embeddings)
    made = embedding_maps(files, config.map_method, config.map_points, config.seed)
    for n, one in enumerate(made, 1):
        shown = (
            f"{len(one.points):,} of {one.n:,} rows"
            if len(one.points) < one.n
            else f"{one.n:,} rows"
        )
        told = f"{shown} of {one.data}. "
        if config.map_method == "umap":
            told += "UMAP, 15 neighbours, cosine: distances between groups mean nothing."
        else:
            told += "Principal components, with their shares of the variance."
        png = draw_map(one)
        yield Picture(f"map_{n}.png", png, f"Embeddings of {one.model}", told)
