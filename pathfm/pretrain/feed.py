"""What a run is fed: batches of patches, with labels where there are any, from slides or from a folder.

One face for all: patches of a corpus as they come, balanced by a class a slide or a region has, or
pictures of a folder. Draw i is the same for any number of ranks, workers and threads; rank r of a
step gets the r-th part of its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from online_patching import BalancedSampler, Corpus, PatchLoader, PatchRef
from online_patching.errors import FailureBudgetError, StateMismatchError
from online_patching.loading import PatchBatch
from online_patching.loading.batch import Failure
from online_patching.stats import Stats
from pathfm.labels import LEARNS_FROM_LABELS
from pathfm.labels.picture_feed import PictureBatch, PictureFeed
from pathfm.labels.pictures import PictureSampler, open_patches
from pathfm.pretrain.sampler import sampler_of, told_supply
from pathfm.runtime import PathfmError

if TYPE_CHECKING:
    from pathfm.pretrain import PretrainConfig
    from pathfm.ranks import Ranks


@dataclass(frozen=True, eq=False)
class FeedBatch:
    """A rank's part of a step: `pixels` uint8 RGB (b, S, S, 3), `draws` int64 (b,) its sample numbers,
    `labels` int64 (b,) class numbers (-1: none) or None without labels, `refs` what each patch is, and
    `failures` what was replaced on the way.

    Of a folder's pictures a ref's `slide_id` is the path in the folder, its mpp 0.0 where not known.
    """

    pixels: NDArray[np.uint8]
    draws: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    refs: list[PatchRef]
    failures: list[Failure]


class Feed(Protocol):
    """A stream of batches that goes on where a state says."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class number; empty where patches have no labels."""

    @property
    def name(self) -> str:
        """What the corpus or folder is called."""

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the patches: slides and masks, or names and sizes of pictures."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should be told of the labels, a line each."""

    def next_batch(self) -> FeedBatch:
        """This rank's part of the next step, waiting for it if need be."""

    def first(self, n: int) -> FeedBatch:
        """The first n draws, read apart from the stream, alike on every rank; what fails is replaced
        and counts nowhere."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as small JSON; every rank must call it at the same step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there. StateMismatchError for another corpus, folder, sampler or other classes."""

    def close(self) -> None:
        """Stop reading ahead; the stream can be continued."""

    def group_of(self, slide_id: str) -> str:
        """What shares are told by: a ref's slide, or a picture's first folder."""

    @property
    def groups(self) -> list[str]:
        """All of these."""

    @property
    def next_draw(self) -> int:
        """The global draw at which the next step begins."""

    @property
    def stats(self) -> Stats:
        """What was read, waited for and replaced."""

    @property
    def quarantined(self) -> dict[str, int]:
        """Slide id -> first draw that does not use it."""


def check_labels(config: PretrainConfig) -> None:
    """PathfmError when the method learns from labels and none are given. Opens nothing."""
    if config.method in LEARNS_FROM_LABELS and config.labels.source is None:
        raise PathfmError(
            f"method {config.method} learns from labels and none are given: --labels.column NAME, --labels.table "
            "FILE, --labels.regions FOLDER or --labels.patches FOLDER"
        )


def open_feed(config: PretrainConfig, ranks: Ranks, state: dict[str, Any] | None = None) -> Feed:
    """The stream that a config describes, for this rank; where `state` says, or from its beginning.

    PathfmError or a PatchingError for labels that are missing, of one class only, or of classes that
    can serve no patch, for a batch that the ranks cannot share, and for a state of another stream.
    """
    check_labels(config)
    if config.batch_size % ranks.world:
        raise PathfmError(
            f"batch_size {config.batch_size} cannot be divided among {ranks.world} ranks; use a multiple of it"
        )
    feed: Feed = (
        _FolderFeed(config, ranks)
        if config.labels.source == "patches"
        else _SlideFeed(config, ranks)
    )
    if state is not None:
        feed.load_state_dict(state)
    return feed


class _SlideFeed:
    """Patches of a corpus."""

    def __init__(self, config: PretrainConfig, ranks: Ranks) -> None:
        from pathfm.ranks import gather_objects

        self.corpus = Corpus.open(config.corpus)
        self.sampler = sampler_of(config, self.corpus)
        self.name, self.digest = config.corpus.name, self.corpus.digest
        self.class_names = getattr(self.sampler, "class_names", ())
        self.notes = told_supply(self.sampler)
        # A lost slide must not end a run: its draws are replaced, listed and told.
        self._reading = config.loader.model_dump() | {"forgive_lost": True}
        self._loader = PatchLoader(
            self.sampler,
            config.batch_size // ranks.world,
            rank=ranks.rank,
            world_size=ranks.world,
            gather=gather_objects if ranks.world > 1 else None,
            **self._reading,
        )
        self.close = self._loader.close

    def next_batch(self) -> FeedBatch:
        try:
            return self._labelled(self._loader.next_batch())
        except FailureBudgetError as error:
            raise _with_remedy(error) from None

    def first(self, n: int) -> FeedBatch:
        reading = self._reading | {"workers": 0, "prefetch": 1}
        # Read anew in every life, before the ledger is there: a budget of its own would end each.
        reading |= {"max_failed_fraction": math.inf, "quarantine_after": None}
        with PatchLoader(self.sampler, n, **reading) as loader:
            return self._labelled(loader.next_batch())

    def _labelled(self, batch: PatchBatch) -> FeedBatch:
        draws, sampler = batch.draws, self.sampler
        labels = sampler.labels(draws) if isinstance(sampler, BalancedSampler) else None
        return FeedBatch(batch.pixels, draws, labels, batch.refs, batch.failures)

    def state_dict(self) -> dict[str, Any]:
        return {**self._loader.state_dict(), "class_names": list(self.class_names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        refuse_other_classes(state, self.class_names)
        if "quarantined" not in state:
            raise StateMismatchError(
                "the saved stream is of a folder of patches, this one is of slides. Resume with what it was "
                "begun with, or start a new run."
            )
        self._loader.load_state_dict(state)

    def group_of(self, slide_id: str) -> str:
        return slide_id

    @property
    def groups(self) -> list[str]:
        return self.corpus.slide_ids

    @property
    def next_draw(self) -> int:
        return self._loader.next_draw

    @property
    def stats(self) -> Stats:
        return self._loader.stats

    @property
    def quarantined(self) -> dict[str, int]:
        return self._loader.quarantined


class _FolderFeed:
    """Pictures of a folder."""

    quarantined: dict[str, int] = {}  # noqa: RUF012 - always empty: a picture that fails is replaced each time

    def __init__(self, config: PretrainConfig, ranks: Ranks) -> None:
        from pathfm.ranks import gather_objects

        labels, learns = config.labels, config.method in LEARNS_FROM_LABELS
        balanced = learns if labels.balanced is None else labels.balanced
        folder = open_patches(labels, with_classes=balanced or learns)
        self.name, self.digest = folder.root.name, folder.digest
        self.class_names = folder.class_names
        counts = np.bincount(folder.labels[folder.labels >= 0], minlength=len(self.class_names))
        each = ", ".join(f"{k} {n:,}" for k, n in zip(self.class_names, counts, strict=True))
        order = "every class equally often" if balanced else "every picture equally often"
        self.notes = (f"{len(folder):,} pictures of {folder.root}, {order}: {each or 'no labels'}",)
        self._folder = folder
        reading = config.loader
        self._pictures = PictureFeed(
            PictureSampler(folder, labels, config.seed, balanced),
            config.batch_size // ranks.world,
            size_px=config.patch_px,
            fit=labels.fit,
            mpp=labels.patches_mpp,
            threads=reading.threads * max(1, reading.workers),
            prefetch=reading.prefetch or 2,
            max_failed_fraction=reading.max_failed_fraction,
            rank=ranks.rank,
            world_size=ranks.world,
            gather=gather_objects if ranks.world > 1 else None,
        )
        self.close = self._pictures.close
        self.stats = self._pictures.stats

    def next_batch(self) -> FeedBatch:
        try:
            return self._labelled(self._pictures.next_batch())
        except FailureBudgetError as error:
            raise _with_remedy(error) from None

    def first(self, n: int) -> FeedBatch:
        return self._labelled(self._pictures.first(n))

    def _labelled(self, batch: PictureBatch) -> FeedBatch:
        labels = batch.labels if self.class_names else None
        return FeedBatch(batch.pixels, batch.draws, labels, batch.refs, batch.failures)

    def state_dict(self) -> dict[str, Any]:
        return {**self._pictures.state_dict(), "class_names": list(self.class_names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        refuse_other_classes(state, self.class_names)
        self._pictures.load_state_dict(state)

    def group_of(self, slide_id: str) -> str:
        return slide_id.partition("/")[0] if "/" in slide_id else "."

    @property
    def groups(self) -> list[str]:
        return sorted({self.group_of(path) for path in self._folder.paths})

    @property
    def next_draw(self) -> int:
        return self._pictures.next_draw


def _with_remedy(error: FailureBudgetError) -> FailureBudgetError:
    """The error with the names that the remedies have here."""
    return FailureBudgetError(
        f"{error} (The run goes on with a higher --loader.max_failed_fraction; without what fails it is "
        "another run: another --out.)"
    )


def refuse_other_classes(state: dict[str, Any], class_names: tuple[str, ...]) -> None:
    """StateMismatchError when a stream was begun with other classes, or the same in another order."""
    saved = tuple(state.get("class_names", ()))
    if saved != class_names:
        raise StateMismatchError(
            f"the run was begun with the classes {', '.join(saved) or '(none)'}; now there are "
            f"{', '.join(class_names) or '(none)'}. Give the labels it was begun with, or another --out for a new run."
        )
