"""The slides of a corpus -> a bag of features each, for CLAM, TRIDENT and whatever reads their files.

One task a slide, the same code for one process or many: a slide whose bag is there with the key of
what would be computed is done, so a killed run goes on and ranks need no queue.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching import Corpus, GridSampler, PatchLoader, PatchRef
from online_patching.errors import PatchingError
from online_patching.philox import words
from online_patching.sampling.draws import Draws
from online_patching.stores.local import atomic_write_text
from pathfm.datasets.preparing import fit
from pathfm.embed.computing import Plan, choose_precision
from pathfm.embed.samples import Pixels
from pathfm.embed.settings import EmbedConfig, EmbedResult
from pathfm.embeddings.bags import FOLDER, BagFacts, bag_key, bag_path, write_bag
from pathfm.embeddings.info import describe_transform
from pathfm.models import Embedder
from pathfm.ranks import Ranks, gather_objects, together
from pathfm.runtime import (
    INDEX_UNFINISHED,
    PathfmError,
    as_dict,
    one_line,
    plan_precision,
    progress,
    provenance,
)
from pathfm.tracking import open_run

_STREAM_SAMPLE = 451
_LOOKED_AT = 4096
_FORMAT = "pathfm.bag.key.1"


def is_corpus(path: Path) -> bool:
    """Whether a folder is a corpus that `pathfm foreground` packed."""
    return (path / "corpus.json").is_file()


class OfOneSlide:
    """Chosen draws of a grid as a source of their own: draw i is the grid's `chosen[i]`."""

    patches_per_read = 1

    def __init__(self, grid: GridSampler, chosen: NDArray[np.int64]) -> None:
        self.grid, self.chosen = grid, chosen
        self.corpus, self.size_px = grid.corpus, grid.size_px
        self.context, self.filters = grid.context, grid.filters

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def config(self) -> dict[str, Any]:
        """The grid's, and which draws of it."""
        of_draws = hashlib.sha256(self.chosen.tobytes()).hexdigest()
        return self.grid.config | {"sampler": type(self).__name__, "draws": of_draws}

    @property
    def digest(self) -> str:
        """SHA-256 of `config`."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    def draw_batch(
        self, draws: ArrayLike, attempt: ArrayLike = 0, barred: Mapping[int, int] | None = None
    ) -> Draws:
        """Columns of the chosen draws, numbered from 0."""
        numbers = np.atleast_1d(np.asarray(draws, np.int64))
        found = self.grid.draw_batch(self.chosen[numbers], attempt, barred)
        return replace(found, draw=numbers)

    def expand(self, draws: Draws) -> Draws:
        """As the grid does."""
        return self.grid.expand(draws)

    def refs(self, draws: Draws) -> list[PatchRef]:
        """As the grid does."""
        return self.grid.refs(draws)


@dataclass(frozen=True)
class Task:
    """One slide: its row in the corpus, its patches as draws of the grid, its bag."""

    row: int
    chosen: NDArray[np.int64]
    facts: BagFacts
    path: Path


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
        tasks = _tasks(config, model, grid, folder, precision)
        left = [t for t in tasks if bag_key(t.path) != t.facts.key] if ranks.first else []
    rows = gather_objects([task.row for task in left])[0]
    if not rows:
        if ranks.first:
            print(f"embed {config.name}: {folder / FOLDER} is up to date ({len(tasks):,} slides)")
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


def open_grid(config: EmbedConfig) -> GridSampler:
    """The grid over all slides of a corpus; PathfmError where it is unfinished or mpp is missing."""
    if config.mpp is None:
        raise PathfmError(f"{config.data} is a corpus: set mpp, the µm/px its slides are read at")
    if (config.data / INDEX_UNFINISHED).exists():
        raise PathfmError(f"{config.data}: indexing was not finished. Run `pathfm index` again")
    return GridSampler(
        Corpus.open(config.data),
        size_px=config.slides.size_px or config.input_px,
        mpp=config.mpp,
        overlap_px=config.slides.overlap_px,
        min_foreground=config.slides.min_foreground,
    )


def choose(grid: GridSampler, row: int, most: int | None, seed: int) -> NDArray[np.int64]:
    """The draws of a slide that are embedded, ascending: all, or `most` of them by Philox.

    A function of the seed, the slide's id and its own patches, whatever else is in the corpus.
    """
    draws = np.arange(*_ends(grid.draws_of(row)), dtype=np.int64)
    if most is None or len(draws) <= most:
        return draws
    of_slide = zlib.crc32(grid.corpus.slide_id(row).encode())
    keys = words(seed, np.arange(len(draws)), of_slide, _STREAM_SAMPLE, 1)[:, 0]
    return np.sort(draws[np.argsort(keys, kind="stable")[:most]])


def _ends(draws: range) -> tuple[int, int]:
    return draws.start, draws.stop


def share(tasks: Sequence[Task], rank: int, world: int) -> list[Task]:
    """The tasks of one rank: the largest first, each to whoever has the fewest patches so far."""
    loads, own = [0] * world, []
    for task in sorted(tasks, key=lambda t: (-len(t.chosen), t.row)):
        least = loads.index(min(loads))
        loads[least] += len(task.chosen)
        if least == rank:
            own.append(task)
    return own


def _first_batch(config: EmbedConfig, grid: GridSampler) -> Pixels:
    """The first patches of the first slide that can be read, as input."""
    rows = iter(np.unique(grid.draw_batch(np.arange(min(len(grid), _LOOKED_AT))).slide).tolist())
    for row in rows:
        chosen = choose(grid, row, config.slides.patches_per_slide, config.seed)
        for pixels, _ in _inputs(config, OfOneSlide(grid, chosen[: config.batch_size])):
            return pixels
    raise PathfmError(f"{config.data}: no patch of its slides can be read")


def _tasks(
    config: EmbedConfig, model: Embedder, grid: GridSampler, folder: Path, precision: Plan
) -> list[Task]:
    geometry = f"slide at {config.mpp:g} um/px, {grid.size_px} px, resized, bilinear, antialiased"
    made_of = [
        _FORMAT,
        model.digest,
        model.name,
        config.pooling,
        precision,
        describe_transform(geometry, config.input_px, model.mean, model.std),
    ]
    rows = [row for row in range(len(grid.corpus)) if len(grid.draws_of(row))]
    tasks = [_task(config, model, grid, folder, row, made_of) for row in rows]
    names = [task.path.name for task in tasks]
    if len(set(names)) < len(names):
        raise PathfmError(f"{config.data}: two slides of one id would share a bag; rename one")
    return tasks


def _task(
    config: EmbedConfig,
    model: Embedder,
    grid: GridSampler,
    folder: Path,
    row: int,
    made_of: Sequence[str],
) -> Task:
    """A slide's task; its key covers the slide's version and every place, so the mask as well."""
    corpus = grid.corpus
    chosen = choose(grid, row, config.slides.patches_per_slide, config.seed)
    places = grid.draw_batch(chosen)
    slide_id, record = corpus.slide_id(row), corpus.records[row]
    parts = [*made_of, slide_id, corpus.token(row)]
    key = hashlib.sha256("\0".join(parts).encode())
    key.update(np.stack([places.x_px0, places.y_px0], axis=1).tobytes())
    facts = BagFacts(
        slide_id=slide_id,
        key=key.hexdigest(),
        encoder=model.name,
        encoder_digest=model.digest,
        mpp=float(config.mpp or 0),
        level0_mpp=float(record["mpp_x"] + record["mpp_y"]) / 2,
        patch_px=grid.size_px,
        overlap_px=grid.overlap_px,
        level0_width_px0=int(record["width_px0"]),
        level0_height_px0=int(record["height_px0"]),
    )
    return Task(row, chosen, facts, bag_path(folder, slide_id))


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
        f"embed {config.name}: {good:,} slides, {patches:,} patches at {config.mpp:g} µm/px -> "
        f"{folder / FOLDER}, {rate:.1f} patches/s"
    )
