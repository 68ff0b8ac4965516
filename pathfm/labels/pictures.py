"""A folder of patches, and which of them draw i is: every class equally often, or every picture."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.philox import fine_uniform, words
from online_patching.sampling.class_order import ClassOrder
from online_patching.sampling.permutation import permuted
from pathfm.datasets.folder import SUFFIXES
from pathfm.labels import LabelsConfig
from pathfm.labels.rows import chosen_classes, numbered, weights_of
from pathfm.runtime import PathfmError

Ints = NDArray[np.int64]

CUT_STREAM, REDRAW_STREAM = (1 << 18) + 8193, (1 << 18) + 8194
MAX_PICTURES = 10_000_000
MAX_ATTEMPTS = 16
ORDERS_KEPT_BELOW = 2**16
"""Of classes up to this large the order of an epoch is computed once and kept, 4 bytes a picture: a few
places at a time cost 30 ms a batch."""


@dataclass(frozen=True, eq=False)
class PatchFolder:
    """Pictures below `root`: paths relative to it, sorted, their sizes in bytes, and a class each or -1.

    `class_names` is empty where classes are not asked for.
    """

    root: Path
    paths: tuple[str, ...]
    sizes: Ints
    labels: Ints
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def digest(self) -> str:
        """SHA-256 of names, sizes in bytes and classes: what a copy elsewhere shares. Reads no picture."""
        total = hashlib.sha256(json.dumps(self.class_names).encode())
        for path, size, label in zip(
            self.paths, self.sizes.tolist(), self.labels.tolist(), strict=True
        ):
            total.update(f"{path}\0{size}\0{label}\n".encode(errors="surrogatepass"))
        return total.hexdigest()


def open_patches(config: LabelsConfig, *, with_classes: bool) -> PatchFolder:
    """Lists the folder `config.patches`; opens no picture. Hidden files and folders are left out.

    The class of a picture is the first folder on its way down from the root. Those of other classes
    than `config.classes` names are left out, where classes count; else all stay, without a class.
    PathfmError when the folder is missing or empty, has fewer than two classes, or a class has
    fewer than two pictures.
    """
    assert config.patches is not None
    root = config.patches
    if not root.is_dir():
        raise PathfmError(f"labels.patches {root}: no such folder; wanted {root}/<class>/*.png")
    found = sorted(_walk(root, ""))
    if not found:
        raise PathfmError(f"labels.patches {root}: no picture ({', '.join(SUFFIXES)}) below it")
    if not with_classes:
        paths, sizes = zip(*found, strict=True)
        none = np.full(len(paths), -1, np.int64)
        return PatchFolder(root, paths, np.asarray(sizes, np.int64), none, ())
    owners = [path.partition("/")[0] if "/" in path else "" for path, _ in found]
    classes = chosen_classes(config, owners, f"subfolders of {root}")
    labels = numbered(owners, classes)
    kept = np.flatnonzero(labels >= 0)
    counts = np.bincount(labels[kept], minlength=len(classes))
    if counts.min() < 2:
        poor = int(np.argmin(counts))
        raise PathfmError(
            f"labels.patches {root}: class {classes[poor]!r} has {counts[poor]} picture(s); a class needs at "
            "least two. Add some, or leave it out of labels.classes"
        )
    return PatchFolder(
        root,
        tuple(found[i][0] for i in kept.tolist()),
        np.asarray([found[i][1] for i in kept.tolist()], np.int64),
        labels[kept],
        classes,
    )


def _walk(root: Path, below: str) -> Iterator[tuple[str, int]]:
    """(path relative to the root, size in bytes) of pictures; links to folders are not followed."""
    waiting, n = [below], 0
    while waiting:
        here = waiting.pop()
        with os.scandir(root / here) as entries:
            for entry in entries:
                path = f"{here}/{entry.name}" if here else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                    n += 1
                    if n > MAX_PICTURES:
                        raise PathfmError(
                            f"labels.patches {root}: more than {MAX_PICTURES:,} pictures"
                        )
                    yield path, entry.stat().st_size


@dataclass(frozen=True)
class Pick:
    """Columns of n draws: which picture, of which class (-1: none), and u, v in [0, 1) for its cut."""

    draw: Ints
    attempt: Ints
    picture: Ints
    label: Ints
    u: NDArray[np.float64]
    v: NDArray[np.float64]


class PictureSampler:
    """Draw numbers -> pictures: pure functions of (seed, draw, attempt).

    Balanced: draws are of the classes that ClassOrder says; the k-th draw of a class of n pictures is
    the (k mod n)-th in an order of that class's own for its epoch k // n, so that every picture of a
    class comes once before any comes twice. Not balanced: the same over all pictures. Another attempt
    is any picture of the same class.
    """

    def __init__(
        self, folder: PatchFolder, config: LabelsConfig, seed: int, balanced: bool
    ) -> None:
        self.folder, self.seed, self.balanced = folder, seed, balanced
        self.class_names = folder.class_names
        classes = max(1, len(self.class_names)) if balanced else 1
        weights = weights_of(config.weights, self.class_names) if balanced else [1]
        self.order = ClassOrder(weights, seed)
        of = folder.labels if balanced else np.zeros(len(folder), np.int64)
        self._members = np.argsort(of, kind="stable")
        self._counts = np.bincount(of, minlength=classes)
        self._first = np.cumsum(self._counts) - self._counts
        self._order = lru_cache(maxsize=2 * classes)(self._whole_order)

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides the stream besides the folder, as JSON types."""
        weights = self.order.weights.tolist()
        return {
            "sampler": "pictures",
            "seed": self.seed,
            "balanced": self.balanced,
            "weights": weights,
        }

    def pick(self, draws: ArrayLike, attempt: ArrayLike = 0) -> Pick:
        """Columns for many draw numbers; `attempt` > 0 where an earlier one could not be read."""
        number = np.atleast_1d(np.asarray(draws, np.int64))
        tried = np.broadcast_to(np.asarray(attempt, np.int64), number.shape)
        of, ordinal = self.order.ordinals(number)
        n = self._counts[of]
        turn, place = np.divmod(ordinal, n)
        for c in np.unique(of).tolist():
            mine = of == c
            place[mine] = self._shuffled(c, turn[mine], place[mine])
        again = tried > 0
        w = words(self.seed, number[again], tried[again], REDRAW_STREAM, 2)
        place[again] = (fine_uniform(w[:, 0], w[:, 1]) * n[again]).astype(np.int64)
        picture = self._members[self._first[of] + place]
        w = words(self.seed, number, tried, CUT_STREAM, 4)
        u, v = fine_uniform(w[:, 0], w[:, 1]), fine_uniform(w[:, 2], w[:, 3])
        return Pick(number, tried, picture, self.folder.labels[picture], u, v)

    def _shuffled(self, c: int, turn: Ints, place: Ints) -> Ints:
        """Where places go in a class's orders of their epochs."""
        epochs = np.unique(turn).tolist()
        if self._counts[c] > ORDERS_KEPT_BELOW or len(epochs) > 2:  # the same, a few at a time
            return self._permuted(c, turn, place)
        out = place.copy()
        for epoch in epochs:
            out[turn == epoch] = self._order(c, epoch)[place[turn == epoch]]
        return out

    def _whole_order(self, c: int, epoch: int) -> NDArray[np.int32]:
        return self._permuted(c, epoch, np.arange(self._counts[c])).astype(np.int32)

    def _permuted(self, c: int, turn: Any, place: Ints) -> Ints:
        # Turns of different classes differ, so that classes of one size have orders of their own.
        turns = (turn * len(self._counts) + c) % 2**32
        return permuted(place, int(self._counts[c]), self.seed, turns)
