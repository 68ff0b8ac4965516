"""What a run leaves behind besides weights: sampled patches, pictures, a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from online_patching import PatchBatch, PatchRef
from online_patching.loading.ledger import LOST
from pathfm.checkpoint import Checkpoint
from pathfm.pictures import mosaic, told_apart, told_mpps
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.rows_log import Rows, RowsLog
from pathfm.pretrain.seen import SEEN, Seen
from pathfm.ranks import Ranks, gather_objects, together
from pathfm.runtime import Progress, console, make_folder, titled
from pathfm.tracking import Run
from pathfm.views import ViewSpec
from pathfm.views.render import make_views

if TYPE_CHECKING:
    from pathfm.pretrain.feed import FeedBatch

SAMPLED, FAILURES = "sampled.jsonl", "failures.jsonl"
_FLUSH_STEPS = 50
_MAX_TOLD = 100
_FIELDS = ("draw", "slide_id", "x_px0", "y_px0", "width_px0", "height_px0", "mpp")


class Records:
    """What a run tells while it trains: every rank hands in, rank 0 writes, prints and tracks.

    Metrics go out at every step; sampled patches and failures are gathered from the ranks every
    `_FLUSH_STEPS` steps and before a checkpoint.
    """

    def __init__(
        self,
        config: PretrainConfig,
        ranks: Ranks,
        checkpoint: Checkpoint | None,
        run: Run | None,
        bar: Progress | None,
        seen: Seen,
    ) -> None:
        state = checkpoint.state if checkpoint else {}
        draws_done = checkpoint.step * config.batch_size if checkpoint else 0
        rows_done, failed = state.get("sampled_rows", 0), state.get("failure_rows", 0)
        digested = state.get("seen_rows", 0)
        # one that had reached its maximum stays as it is, also under a higher one: no gaps
        self._max_draw = rows_done if rows_done < draws_done else config.max_sampled_rows
        self._ranks, self.run, self._bar, self.seen = ranks, run, bar, seen
        self._logs: tuple[RowsLog, RowsLog, RowsLog] | None = None
        self._waiting: tuple[Rows, Rows, Rows] = ([], [], [])
        self._steps = 0
        self._told: set[str] = set()  # slides
        with together():
            if ranks.first:
                out = config.out
                self._logs = (
                    RowsLog(out / SAMPLED, rows_done),
                    RowsLog(out / FAILURES, failed),
                    RowsLog(out / SEEN, digested),
                )

    @property
    def run_id(self) -> str | None:
        """The tracked run's id; None on other ranks."""
        return self.run.run_id if self.run else None

    @property
    def state(self) -> dict[str, int]:
        """How much of each file belongs to this moment, for the checkpoint; after `flush`."""
        if self._logs is None:
            return {}
        names = ("sampled_rows", "failure_rows", "seen_rows")
        return {name: log.rows for name, log in zip(names, self._logs, strict=True)}

    def step(
        self, step: int, batch: FeedBatch, metrics: Mapping[str, float], facts: Mapping[str, str]
    ) -> None:
        """One optimizer step, `step` from 0."""
        sampled, failed, seen = self._waiting
        refs = (ref for ref in batch.refs if ref.draw < self._max_draw)
        sampled += [{name: getattr(ref, name) for name in _FIELDS} for ref in refs]
        failed += [f._asdict() for f in batch.failures if not f.filtered]
        seen += self.seen.rows(batch)
        if self.run is not None:
            self.run.log(step, **metrics)
        if self._bar is not None:
            patches = len(batch.draws) * self._ranks.world
            self._bar.advance(patches, step=str(step + 1), loss=metrics["loss"], **facts)
        self._steps += 1
        if self._steps % _FLUSH_STEPS == 0:
            self.flush()

    def flush(self) -> None:
        """Everything handed in by all ranks is on disk when this returns; every rank must call it."""
        parts = gather_objects(self._waiting)
        self._waiting = ([], [], [])
        with together():
            if self._logs is not None:
                for number, log in enumerate(self._logs):
                    rows = [row for part in parts for row in part[number]]
                    rows.sort(key=lambda row: (row["draw"], row.get("attempt", 0)))
                    log.append(rows)
            if self.run is not None:
                self.run.sync()
        self._tell_lost(row for part in parts for row in part[1])

    def _tell_lost(self, failed: Iterable[Mapping[str, Any]]) -> None:
        """Say of each slide, once in a life, that it is gone or another: it stops no run."""
        for row in sorted(failed, key=lambda row: int(row["draw"])):
            slide_id, lost = row["slide_id"], row["reason"].partition(": ")[0] in LOST
            if lost and slide_id not in self._told and len(self._told) < _MAX_TOLD:
                self._told.add(slide_id)
                self.say(
                    f"WARNING slide {slide_id} is lost, its draws are replaced, first {row['draw']:,}: "
                    f"{row['reason']}"
                )

    def checkpoint(self, path: Path, digest: str) -> None:
        """Refer to a checkpoint."""
        if self.run is not None:
            self.run.checkpoint(path, digest)

    def save_seen(self, folder: Path, draws: int) -> None:
        """Write what a backbone in this folder has seen; on rank 0, after `flush`."""
        assert self._logs is not None
        self.seen.save(folder, self._logs[2], draws)

    def say(self, *lines: str) -> None:
        """Print, once for all ranks."""
        if self._ranks.first:
            for line in lines:
                print(f"pretrain: {line}", flush=True)

    def close(self) -> None:
        """Close the files."""
        for log in self._logs or ():
            log.close()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sampling_facts(
    rows: Iterable[dict[str, Any]], group_of: Callable[[str], str] = str
) -> dict[str, Any]:
    """Distinct patches and the realised share of each slide and magnification, largest first.

    `group_of` names what a slide id counts for (the class folder of a labelled picture).
    """
    rows = list(rows)
    places = {(row["slide_id"], row["x_px0"], row["y_px0"], row["mpp"]) for row in rows}
    facts: dict[str, Any] = {"distinct_patches": len(places)}
    slides = Counter(group_of(row["slide_id"]) for row in rows)
    mpps = Counter(told_mpps([row["mpp"] for row in rows]))
    for name, counts in (("slide_share", slides), ("mpp_share", mpps)):
        facts[name] = {str(key): n / len(rows) for key, n in counts.most_common()}
    return facts


def print_shares(facts: dict[str, Any], slides: Sequence[str], mpps: Sequence[float]) -> None:
    """The realised mix as two tables; a slide or µm/px asked for that never came shows its 0 %."""
    for title, column, shares, wanted in (
        ("share of the sampled patches", "slide", facts["slide_share"], list(slides)),
        ("realised magnifications", "µm/px", facts["mpp_share"], [str(mpp) for mpp in mpps]),
    ):
        table = titled(title)
        table.add_column(column)
        table.add_column("%", justify="right")
        every = sorted(dict.fromkeys([*wanted, *shares]), key=lambda key: -shares.get(key, 0.0))
        for key in every[:100]:
            name = "not known" if (column, key) == ("µm/px", "0.0") else key  # a folder's pictures
            table.add_row(name, f"{100 * shares.get(key, 0.0):.2f}")
        if len(every) > 100:
            table.add_row(f"... and {len(every) - 100:,} more, in summary.json", "")
        console().print(table)


def save_mosaic(path: Path, batch: PatchBatch) -> None:
    """Sampled patches: a column a slide, two rows a magnification, finest first; white: none."""
    chosen, columns = choose_for_mosaic(batch.refs)
    blank = np.full_like(batch.pixels[0], 255)
    names = told_apart(sorted({ref.slide_id for ref in batch.refs}))
    captions = [
        "" if i is None else f"{batch.refs[i].mpp:g} µm/px\n{names[batch.refs[i].slide_id]}"
        for i in chosen
    ]
    pictures = [blank if i is None else batch.pixels[i] for i in chosen]
    make_folder(path.parent)
    title = f"of the first {len(batch.refs):,} draws of the stream"
    mosaic(pictures, captions, columns, title=title).save(path, quality=88)


def choose_for_mosaic(
    refs: Sequence[PatchRef], rows_a_mpp: int = 2, max_slides: int = 12
) -> tuple[list[int | None], int]:
    """Positions in `refs` row by row, None where a slide has no such patch; and the columns."""
    slides = sorted({ref.slide_id for ref in refs})[:max_slides]
    rows: list[list[int | None]] = []
    mpps = told_mpps([ref.mpp for ref in refs])
    of = [(ref.slide_id, mpp) for ref, mpp in zip(refs, mpps, strict=True)]
    for mpp in sorted(set(mpps)):
        cells = [[i for i, each in enumerate(of) if each == (slide, mpp)] for slide in slides]
        deep = min(rows_a_mpp, max(map(len, cells)))
        rows += [[cell[row] if row < len(cell) else None for cell in cells] for row in range(deep)]
    return [i for row in rows for i in row], len(slides)


def save_views(path: Path, batch: PatchBatch, specs: Sequence[ViewSpec], seed: int) -> None:
    """The batch's first patch and each of its views, as the network gets them at its draw."""
    pixels = torch.from_numpy(batch.pixels[:1])
    views = make_views(pixels, batch.draws[:1], specs, seed=seed, mean=(0.0,) * 3, std=(1.0,) * 3)
    pictures: list[NDArray[np.uint8]] = [batch.pixels[0]]
    captions = [f"patch, {batch.refs[0].mpp:g} µm/px"]
    for number, view in enumerate(views):
        pictures.append((view[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
        captions.append(f"view {number}, {view.shape[-1]} px")
    make_folder(path.parent)
    mosaic(pictures, captions, columns=min(8, len(pictures)), tile_px=160).save(path, quality=92)
