"""``pathfm pretrain --dry-run``: what a run would read and cost, from its first draws. Writes nothing."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from online_patching import Corpus, PatchLoader
from online_patching.errors import redact
from online_patching.loading.batch import DrawSource, LoaderOptions
from pathfm.pictures import told_mpps
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.forecast import Reads, corpus_bytes, forecast, store_of
from pathfm.pretrain.sampler import sampler_of
from pathfm.runtime import console, titled

COUNTS = ("patches", "tiles", "requests", "bytes_wanted", "bytes_read")
_MOST_SLIDES = 10
"""Slides that are printed from either end of the list."""
_MOST_MPPS = 6
_TIMED_BATCH = 32


@dataclass
class Tally:
    """Patches, tiles, requests and bytes of some reads."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(COUNTS), np.int64))

    def __getattr__(self, name: str) -> int:
        if name not in COUNTS:
            raise AttributeError(name)
        return int(self.counts[COUNTS.index(name)])


@dataclass
class DryRun:
    """What `draws` draws of a run of `total` read: together, by µm/px, by slide and by store."""

    total: int
    draws: int
    by_mpp: dict[float, Tally]
    by_slide: dict[int, Tally]
    by_store: dict[str, Tally]
    slides_of_store: Counter[str]
    mpps_of_slide: dict[int, set[float]]
    inexact: int
    """Patches whose bytes are an upper bound, or not known."""

    @property
    def whole(self) -> Tally:
        """All of it."""
        return Tally(np.sum([one.counts for one in self.by_mpp.values()], axis=0))

    def in_the_run(self, count: int) -> float:
        """A count of these draws, scaled to the whole run."""
        return count * self.total / self.draws


def dry_run(config: PretrainConfig, sampler: DrawSource) -> DryRun:
    """Counts what the first draws of a run ask for. No pixel is read."""
    corpus, total = sampler.corpus, config.steps * config.batch_size
    wanted = min(config.estimate.draws, total)
    by_mpp: dict[float, Tally] = {}
    slides = np.zeros((len(corpus), len(COUNTS)), np.int64)
    mpps: dict[int, set[float]] = {}
    inexact = 0
    for draws, reads in forecast(sampler, wanted, LoaderOptions().gap_bytes):
        slides[:, 0] += np.bincount(draws.slide, minlength=len(corpus))
        _add(slides, reads.slide, reads)
        values, at = np.unique(told_mpps(draws.mpp.tolist()), return_inverse=True)
        of_mpp = np.zeros((len(values), len(COUNTS)), np.int64)
        of_mpp[:, 0] = np.bincount(at, minlength=len(values))
        _add(of_mpp, at[reads.place], reads)
        for value, counts in zip(values.tolist(), of_mpp, strict=True):
            by_mpp.setdefault(value, Tally()).counts += counts
        for slide, number in np.unique(np.stack([draws.slide, at], 1), axis=0).tolist():
            mpps.setdefault(slide, set()).add(values[number].item())
        inexact += len(np.unique(reads.place[~reads.exact]))
    touched = np.flatnonzero(slides[:, 0]).tolist()
    by_slide = {row: Tally(slides[row]) for row in touched}
    by_store: dict[str, Tally] = {}
    slides_of_store: Counter[str] = Counter()
    for row, tally in by_slide.items():
        store = redact(store_of(corpus.uri(row)))
        by_store.setdefault(store, Tally()).counts += tally.counts
        slides_of_store[store] += 1
    return DryRun(total, wanted, by_mpp, by_slide, by_store, slides_of_store, mpps, inexact)


def _add(table: NDArray[np.int64], rows: NDArray[np.int64], reads: Reads) -> None:
    for column, name in enumerate(COUNTS[1:], 1):
        np.add.at(table[:, column], rows, getattr(reads, name))


def time_reading(config: PretrainConfig, sampler: DrawSource) -> tuple[int, float]:
    """(patches, patches a second) of a loader that really reads some, after its first batch."""
    batch = min(_TIMED_BATCH, config.batch_size)
    batches = max(2, config.estimate.time_patches // batch + 1)
    reading = config.loader.model_dump() | {"forgive_lost": True}
    with PatchLoader(sampler, batch, **reading) as loader:
        next(loader)
        began_s = time.perf_counter()
        for _ in range(batches - 1):
            next(loader)
        return batch * (batches - 1), batch * (batches - 1) / (time.perf_counter() - began_s)


def show(config: PretrainConfig) -> None:
    """Prints what a run would read, from which slides, and what that takes and costs."""
    corpus = Corpus.open(config.corpus)
    sampler = sampler_of(config, corpus)
    found = dry_run(config, sampler)
    out = console()
    print(
        f"dry run: {config.steps:,} steps of {config.batch_size:,} = {found.total:,} patches of "
        f"{config.patch_px} px; what follows is planned from the first {found.draws:,} draws, and "
        "scaled. Nothing is trained or written"
    )
    out.print(_mpp_table(found))
    out.print(_store_table(found))
    out.print(_slide_table(found, corpus))
    for line in _told(config, found, corpus, sampler):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _mpp_table(found: DryRun) -> Table:
    table = _table("the whole run, by µm/px", ("µm/px", "slides touched"))
    for mpp, tally in sorted(found.by_mpp.items()):
        slides = sum(mpp in mpps for mpps in found.mpps_of_slide.values())
        table.add_row(f"{mpp:g}", f"{slides:,}", *_cells(found, tally))
    table.add_row("all", f"{len(found.by_slide):,}", *_cells(found, found.whole), style="bold")
    return table


def _store_table(found: DryRun) -> Table:
    table = _table("by store", ("store", "slides touched"))
    for store, tally in sorted(found.by_store.items()):
        touched = f"{found.slides_of_store[store]:,}"
        table.add_row(escape(store), touched, *_cells(found, tally))
    return table


def _slide_table(found: DryRun, corpus: Corpus) -> Table:
    order = sorted(found.by_slide, key=lambda row: (-found.by_slide[row].patches, row))
    table = _table("by slide: those most and least drawn", ("slide", "µm/px"))
    whole = len(order) <= 2 * _MOST_SLIDES
    for number, row in enumerate(order):
        if whole or not _MOST_SLIDES <= number < len(order) - _MOST_SLIDES:
            cells = _cells(found, found.by_slide[row])
            table.add_row(escape(corpus.slide_id(row)), _told_set(found.mpps_of_slide[row]), *cells)
        elif number == _MOST_SLIDES:
            table.add_row(f"... {len(order) - 2 * _MOST_SLIDES:,} between")
    return table


def _told_set(mpps: set[float]) -> str:
    """A few µm/px by name, more as a range."""
    if len(mpps) > _MOST_MPPS:
        return f"{min(mpps):g} to {max(mpps):g}"
    return ", ".join(f"{mpp:g}" for mpp in sorted(mpps))


def _table(title: str, names: tuple[str, ...]) -> Table:
    table = titled(title)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in ("patches", "share", "tiles", "requests", "GB wanted", "GB read", "KB a patch"):
        table.add_column(name, justify="right")
    return table


def _cells(found: DryRun, tally: Tally) -> list[str]:
    scaled = {name: found.in_the_run(getattr(tally, name)) for name in COUNTS}
    share, each = tally.patches / found.draws, tally.bytes_read / max(1, tally.patches)
    return [
        *(f"{scaled['patches']:,.0f}", f"{share:.1%}", f"{scaled['tiles']:,.0f}"),
        *(f"{scaled['requests']:,.0f}", f"{scaled['bytes_wanted'] / 1e9:,.3f}"),
        *(f"{scaled['bytes_read'] / 1e9:,.3f}", f"{each / 1e3:,.1f}"),
    ]


def _told(config: PretrainConfig, found: DryRun, corpus: Corpus, sampler: DrawSource) -> list[str]:
    """What no table says: slides touched, bytes beyond, time and money."""
    whole = found.whole
    size, read = corpus_bytes(corpus), found.in_the_run(whole.bytes_read)
    touched, slides = len(found.by_slide), len(corpus)
    lines = [f"slides: these draws touch {touched:,} of {slides:,} ({touched / slides:.1%})"]
    if size:
        lines.append(
            f"bytes: {read / 1e9:,.3f} GB, {read / size:.3g} x the slides' own {size / 1e9:,.3f} GB; "
            f"{whole.bytes_read / max(1, whole.bytes_wanted) - 1:+.1%} beyond the tiles touched"
        )
    if found.inexact:
        lines.append(
            f"bytes: of {found.inexact / found.draws:.1%} of the patches not known before reading: "
            "Zarr chunks count as what they decode to, what another library reads as nothing"
        )
    return lines + _hours(config, found, sampler) + _money(config, found)


def _hours(config: PretrainConfig, found: DryRun, sampler: DrawSource) -> list[str]:
    lines, rates = [], {}
    if config.estimate.time_patches:
        patches, rate = time_reading(config, sampler)
        rates["reading"] = rate
        lines.append(
            f"reading: {patches:,} patches were really read to time it: {rate:,.1f} patches/s with "
            f"{config.loader.workers} workers, {config.loader.threads} threads"
        )
    if config.estimate.patches_per_s:
        rates["training"] = config.estimate.patches_per_s
    if not rates:
        return ["hours: not estimated (--estimate.time_patches 0 and no --estimate.patches_per_s)"]
    slowest = min(rates, key=lambda name: rates[name])
    hours = found.total / rates[slowest] / 3600
    told = f"hours: {hours:,.2f} at {rates[slowest]:,.1f} patches/s, {slowest} being the slower"
    if len(rates) == 1:
        told = f"hours: {hours:,.2f} at {rates[slowest]:,.1f} patches/s, of {slowest} alone"
    return [*lines, told]


def _money(config: PretrainConfig, found: DryRun) -> list[str]:
    remote = [tally for store, tally in found.by_store.items() if store != "local files"]
    gets = found.in_the_run(sum(tally.requests for tally in remote))
    gb = found.in_the_run(sum(tally.bytes_read for tally in remote)) / 1e9
    line = f"egress: {gb:,.3f} GB in {gets:,.0f} GETs"
    prices = config.estimate
    if prices.price_per_gb or prices.price_per_1000_gets:
        money = gb * prices.price_per_gb + gets / 1000 * prices.price_per_1000_gets
        line += (
            f": {money:,.2f} at {prices.price_per_gb:g} a GB and {prices.price_per_1000_gets:g} "
            "a thousand GETs"
        )
    return [line]
