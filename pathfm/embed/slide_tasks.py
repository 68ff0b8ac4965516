"""Which slides of a corpus are embedded, which patches of each, and whose task it is."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching import Corpus, GridSampler, PatchRef
from online_patching.philox import words
from online_patching.sampling.draws import Draws
from pathfm.embed.computing import Plan
from pathfm.embed.settings import EmbedConfig
from pathfm.embeddings.bags import BagFacts, bag_path
from pathfm.embeddings.info import describe_transform
from pathfm.models import Embedder
from pathfm.runtime import INDEX_UNFINISHED, PathfmError

_STREAM_SAMPLE = 451
_FORMAT = "pathfm.bag.key.1"


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


def list_tasks(
    config: EmbedConfig, model: Embedder, grid: GridSampler, folder: Path, precision: Plan
) -> list[Task]:
    """A task for every slide with patches at the µm/px, bags below `folder`, keys of this precision.

    Raises PathfmError where two slides have one id.
    """
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
