"""pretrained_on.json: what a run's backbone has seen, written beside every backbone it saves.

All slides of the cohort and their patients, of this run and of what it started from, and digests of
patches at every so-manieth draw. Which draws follows from the config alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pathfm.checkpoint import Checkpoint
from pathfm.leakage import DIGEST_BYTES, PretrainedOn, Stage, digest_batch, seen_by, slide_keys
from pathfm.leakage.corpora import json_lines, slides_of
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.feed import Feed, FeedBatch
from pathfm.pretrain.rows_log import RowsLog

SEEN = "seen.jsonl"
MOST_OF_SLIDES, MOST_OF_FOLDER = 4_096, 100_000
"""Digests a run keeps. Patches of slides are cut anywhere and hardly ever meet a data set's own; pictures
of a folder are met again as they are, so of those it keeps as many as there are."""


class Seen:
    """What a run has seen. `rows` on every rank; `save` on rank 0, where `cohort` is not None."""

    def __init__(self, config: PretrainConfig, cohort: PretrainedOn | None) -> None:
        most = MOST_OF_FOLDER if config.labels.source == "patches" else MOST_OF_SLIDES
        self.every = max(1, -(-config.steps * config.batch_size // most))
        self._cohort = cohort

    def rows(self, batch: FeedBatch) -> list[dict[str, Any]]:
        """Digests of a batch's patches, each with its draw: of those draws that are kept, where a patch
        shows enough to be recognised."""
        kept = np.flatnonzero(batch.draws % self.every == 0)
        if not len(kept):
            return []
        pairs = zip(batch.draws[kept].tolist(), digest_batch(batch.pixels[kept]), strict=True)
        return [{"draw": d, "digest": one.tobytes().hex()} for d, one in pairs if one.any()]

    def save(self, folder: Path, log: RowsLog, draws: int) -> None:
        """Writes the file beside a backbone that has seen so many draws."""
        assert self._cohort is not None
        found = [bytes.fromhex(row["digest"]) for row in json_lines(log.path)]
        patches = np.frombuffer(b"".join(found), np.uint8).reshape(-1, DIGEST_BYTES)
        *earlier, stage = self._cohort.stages
        stage = replace(stage, draws=draws, every=self.every, patches=len(patches))
        replace(
            self._cohort,
            stages=(*earlier, stage),
            patches=np.concatenate([self._cohort.patches, patches]),
        ).save(folder)


def open_seen(
    config: PretrainConfig, feed: Feed, checkpoint: Checkpoint | None, first: bool
) -> Seen:
    """What a run is about to see, after what its initial weights had; the first rank looks."""
    if not first:
        return Seen(config, None)
    slides, patients = np.zeros((0, 16), np.uint8), tuple[str, ...]()
    if config.labels.source != "patches":
        listed = list(slides_of(config.corpus))
        slides = slide_keys([slide.digest for slide in listed])
        patients = tuple({patient for slide in listed for patient in slide.patients})
    stage = Stage(feed.name, feed.digest, 0, len(slides), len(patients))
    patches = np.zeros((0, DIGEST_BYTES), np.uint8)
    own = PretrainedOn((stage,), slides, patients, patches)
    return Seen(config, own.after(_earlier(config, checkpoint)))


def _earlier(config: PretrainConfig, checkpoint: Checkpoint | None) -> PretrainedOn:
    """What the initial weights had seen; of a run that goes on, as its checkpoint remembers it."""
    if checkpoint is not None:
        before = PretrainedOn.load(checkpoint.path / "backbone")
        if before is None:
            return PretrainedOn.nothing("The run began before this was recorded.")
        return replace(before, stages=before.stages[:-1])  # what is of this stage is there again
    found = seen_by(config.weights)
    if found is None:
        name = config.weights.rstrip("/").rpartition("/")[2]
        return PretrainedOn.nothing(
            f"It started from {name}, of which it is not known what that had seen."
        )
    return found
