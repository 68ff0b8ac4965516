"""What a loader costs beside reading: processes, the copy out of the ring, states, windows of quarantine.

    python benchmarks/loader_costs.py

Made slides in a temporary folder, one decode thread. Times are medians of repeated calls in one run;
the machine's other load is not ours to choose, so compare them with each other.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from common import about_this_run

from online_patching import ForegroundMask, PatchLoader, PatchSampler, read_slide_index
from online_patching.loading.batch import Failure, batch_shape
from online_patching.loading.ledger import MAX_QUARANTINED, Ledger, Quarantine, Rule
from online_patching.loading.processes import START_METHODS
from online_patching.loading.ring import Ring
from online_patching.testing import SyntheticSlide, write_tiff

BATCH, SIZE_PX, SLIDES = 64, 224, 20


def main() -> None:
    print(about_this_run("numpy"))
    print(f"{SLIDES} slides; batches of {BATCH} patches of {SIZE_PX} px")
    with tempfile.TemporaryDirectory() as folder:
        sampler = make_sampler(Path(folder))
        ways: list[tuple[str, dict[str, object]]] = [
            ("threads", {"workers": 0}),
            *((f"1 process, {m}", {"workers": 1, "start_method": m}) for m in START_METHODS),
            ("1 process, spawn, no copy", {"workers": 1, "copy": False}),
        ]
        for name, options in ways:
            report_stream(name, sampler, options)
        copy_ms = 1e3 * median_s(copier(sampler), 50)
        print(f"copy of a batch out of the ring      {copy_ms:8.2f} ms")
        report_window(sampler)
        report_states(sampler)


def make_sampler(folder: Path) -> PatchSampler:
    paths = [
        write_tiff(folder / f"{k}.svs", SyntheticSlide(k, 2048, 2048, mpp=0.25))
        for k in range(SLIDES)
    ]
    indexes = [read_slide_index(str(path)) for path in paths]
    masks = [ForegroundMask.everything(index) for index in indexes]
    return PatchSampler(indexes, masks, size_px=SIZE_PX, mpp=0.25)


def report_stream(name: str, sampler: PatchSampler, options: dict[str, object]) -> None:
    began = time.perf_counter()
    with PatchLoader(sampler, BATCH, threads=1, **options) as loader:  # type: ignore[arg-type]
        loader.next_batch().release()
        first_s = time.perf_counter() - began

        def step() -> None:
            loader.next_batch().release()

        batch_ms = 1e3 * median_s(step, 30)
    print(f"{name:<30} first {first_s:6.2f} s, then {batch_ms:8.2f} ms a batch")


def copier(sampler: PatchSampler) -> Callable[[], object]:
    ring = Ring.create(2, batch_shape(sampler, BATCH))
    ring.close_descriptor()
    pixels = ring.pixels(1, BATCH)
    pixels[:] = 200
    return pixels.copy


def report_window(sampler: PatchSampler) -> None:
    """Deciding on a suspect slide draws a window again."""
    rule = Rule()
    failures = [Failure(draw, 0, "0", "TileDecodeError: x") for draw in range(0, 4000, 40)]
    ledger = Ledger(rule).after(failures)
    clean = Ledger(rule)
    suspect_ms = 1e3 * median_s(lambda: ledger.decided(rule.window_draws, sampler), 5)
    clean_ms = 1e3 * median_s(lambda: clean.decided(rule.window_draws, sampler), 5)
    print(f"a window of {rule.window_draws:,} draws, decided    {suspect_ms:8.2f} ms with a suspect, "
          f"{clean_ms:.3f} ms without")  # fmt: skip


def report_states(sampler: PatchSampler) -> None:
    healthy = len(json.dumps(PatchLoader(sampler, BATCH).state_dict()))
    name = "a-slide-with-a-long-name-of-60-characters-as-archives-do-{:03}"
    failures = [Failure(d, 0, name.format(d), "TileDecodeError: x") for d in range(1000)]
    quarantined = tuple(
        Quarantine(name.format(row), row, 10**9, {"TileDecodeError": 99})
        for row in range(MAX_QUARANTINED)
    )
    full = replace(Ledger(Rule()).after(failures), quarantined=quarantined)
    worst = healthy + len(json.dumps(full.as_json(1001)))
    print(
        f"state                                {healthy:8,} bytes, {worst:,} when everything fails"
    )


def median_s(work: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
