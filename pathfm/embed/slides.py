"""The slides of a corpus -> a bag of features each, for CLAM, TRIDENT and whatever reads their files.

One task a slide, the same code for one process or many: a slide whose bag is there with the key of
what would be computed is done, so a killed run goes on and ranks need no queue.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from online_patching import GridSampler, PatchLoader
from online_patching.errors import PatchingError
from online_patching.stores.local import atomic_write_text
from pathfm.datasets.preparing import Pixels, fit
from pathfm.embed.computing import Plan, choose_precision
from pathfm.embed.settings import EmbedConfig, EmbedResult
from pathfm.embed.slide_tasks import OfOneSlide, Task, choose, list_tasks, open_grid, share
from pathfm.embeddings.bags import FOLDER, bag_key, write_bag
from pathfm.leakage import check_bags
from pathfm.models import Embedder
from pathfm.ranks import Ranks, gather_objects, together
from pathfm.runtime import (
    PathfmError,
    as_dict,
    counted,
    one_line,
    plan_precision,
    progress,
    provenance,
)
from pathfm.tracking import open_run

_LOOKED_AT = 4096


def is_corpus(path: Path) -> bool:
    """Whether a folder is a corpus that `pathfm foreground` packed."""
    return (path / "corpus.json").is_file()


def embed_slides(config: EmbedConfig, model: Embedder, ranks: Ranks) -> EmbedResult:
    """Writes `<out>/<name>/h5_files/<slide_id>.h5` for every slide that can serve the µm/px.

    Slides that cannot be read are listed in `<out>/<name>/failed.csv`; past `max_failed_fraction` of
    all, or where none could be, PathfmError.
    """
    folder = config.out / config.name
    with together():
        grid = open_grid(config)
        plan = plan_precision(config.precision, model.device)
        if ranks.first:
            plan = choose_precision(config, model, plan, partial(_first_batch, config, grid))
    precision: Plan = gather_objects(plan)[0]
    with together():
        tasks = list_tasks(config, model, grid, folder, precision)
        left = [t for t in tasks if bag_key(t.path) != t.facts.key] if ranks.first else []
    rows = gather_objects([task.row for task in left])[0]
    if not rows:
        if ranks.first:
            print(
                f"embed {config.name}: {folder / FOLDER} is up to date ({counted(len(tasks), 'slide')})"
            )
            _look_for_leaks(config)
        return EmbedResult(folder, True, 0.0, float("nan"))
    left = [task for task in tasks if task.row in set(rows)]
    began_s = time.monotonic()
    with together():
        own = share(left, ranks.rank, ranks.world)
        failed, made = _embed_all(config, model, grid, own, precision)
    rate = sum(gather_objects(made)) / (time.monotonic() - began_s)
    everybody = sorted(pair for part in gather_objects(failed) for pair in part)
    with together():
        if ranks.first:
            _finish(config, grid, tasks, everybody, rate)
    return EmbedResult(folder, False, rate, float("nan"))


def _first_batch(config: EmbedConfig, grid: GridSampler) -> Pixels:
    """The first patches of the first slide that can be read, as input."""
    rows = iter(np.unique(grid.draw_batch(np.arange(min(len(grid), _LOOKED_AT))).slide).tolist())
    for row in rows:
        chosen = choose(grid, row, config.slides.patches_per_slide, config.seed)
        for pixels, _ in _inputs(config, OfOneSlide(grid, chosen[: config.batch_size])):
            return pixels
    raise PathfmError(f"{config.data}: no patch of its slides can be read")


def _embed_all(
    config: EmbedConfig,
    model: Embedder,
    grid: GridSampler,
    tasks: Sequence[Task],
    precision: Plan,
) -> tuple[list[tuple[str, str]], int]:
    """(slides that could not be read, with reasons; patches made) of this rank's tasks."""
    failed: list[tuple[str, str]] = []
    made = 0
    total = sum(len(task.chosen) for task in tasks)
    with progress(total, "patches", f"embed {config.name}") as bar:
        for task in tasks:
            try:
                made += _embed_one(config, model, grid, task, precision)
            except (PatchingError, _DamagedError) as error:
                failed.append((task.facts.slide_id, one_line(error)))
            bar.advance(len(task.chosen))
    return failed, made


class _DamagedError(Exception):
    """Too many of a slide's patches cannot be read."""


def _embed_one(
    config: EmbedConfig, model: Embedder, grid: GridSampler, task: Task, precision: Plan
) -> int:
    """Writes a slide's bag; returns its rows."""
    found = [
        (model.embed_pixels(pixels, config.pooling, precision), coords_px0)
        for pixels, coords_px0 in _inputs(config, OfOneSlide(grid, task.chosen))
    ]
    n, whole = len(task.chosen), sum(len(features) for features, _ in found)
    if not whole or n - whole > config.slides.max_failed_fraction * n:
        raise _DamagedError(f"{n - whole:,} of {n:,} patches cannot be read")
    features, coords_px0 = (np.concatenate(part) for part in zip(*found, strict=True))
    write_bag(task.path, replace(task.facts, dropped=n - whole), features, coords_px0)
    return whole


def _inputs(config: EmbedConfig, source: OfOneSlide) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
    """Batches of a slide's patches as input, and their corners (b, 2); those with damage left out.

    Raises PatchingError past the loader's budget of failures.
    """
    with PatchLoader(
        source,
        config.batch_size,
        threads=config.threads,
        max_failed_fraction=config.slides.max_failed_fraction,
    ) as loader:
        for batch in loader:
            whole = batch.columns.attempt == 0  # a replacement is another place, or another slide
            if whole.any():
                pixels = [fit(patch, config.input_px) for patch in batch.pixels[whole]]
                corners = batch.columns.x_px0[whole], batch.columns.y_px0[whole]
                yield np.stack(pixels), np.stack(corners, axis=1)


def _look_for_leaks(config: EmbedConfig) -> None:
    """Writes beside the bags which slides the backbone had seen, for `probe-slides` to refuse or mark."""
    leaks = check_bags(config.out / config.name, config.weights, config.data)
    if leaks.mask().any():
        print(f"embed {config.name}: WARNING {leaks.told()}")


def _finish(
    config: EmbedConfig,
    grid: GridSampler,
    tasks: Sequence[Task],
    failed: Sequence[tuple[str, str]],
    rate: float,
) -> None:
    """Says and records what was done; PathfmError past the budget of failures."""
    folder = config.out / config.name
    for slide_id, mpp, reason in grid.left_out:
        print(f"embed {config.name}: {slide_id} has no bag at {mpp:g} µm/px: {reason}")
    listed = folder / "failed.csv"
    listed.unlink(missing_ok=True)
    if failed:
        quoted = ('{},"{}"\n'.format(name, why.replace('"', '""')) for name, why in failed)
        atomic_write_text(listed, "slide_id,reason\n" + "".join(quoted))
        print(f"embed {config.name}: {len(failed):,} slides could not be read, see {listed}")
    _look_for_leaks(config)
    good, patches = len(tasks) - len(failed), sum(len(task.chosen) for task in tasks)
    record, tags = config.out / "tracking" / config.name, provenance() | {"stage": "embed"}
    with open_run(config.own_tracking, record, as_dict(config), tags) as tracked:
        tracked.summary(patches_per_s=rate, slides=good, failed_slides=len(failed))
    if not good or len(failed) > config.slides.max_failed_fraction * len(tasks):
        raise PathfmError(
            f"{len(failed):,} of {len(tasks):,} slides could not be read, first {failed[0][0]}: "
            f"{failed[0][1]}. See {listed}; what was read is kept"
        )
    print(
        f"embed {config.name}: {counted(good, 'slide')}, {patches:,} patches at {config.mpp:g} µm/px -> "
        f"{folder / FOLDER}, {rate:.1f} patches/s"
    )
