"""Slides that are damaged, deleted, cut or replaced while a loader reads them from disk; stores that hang."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from online_patching import (
    ForegroundMask,
    PatchBatch,
    PatchLoader,
    PatchSampler,
    SlideIndex,
    errors,
    open_slide,
    read_slide_index,
)
from online_patching.plan import plan_patch
from online_patching.stores import RetryPolicy
from online_patching.testing import SyntheticSlide, write_tiff
from tests.servers import Faults, FaultServer

BATCH = 12


def take(loader: PatchLoader, n: int, into: list[np.ndarray] | None = None) -> None:
    """The pixels of the next `n` batches, kept in `into` as they come."""
    for _ in range(n):
        batch = loader.next_batch()
        if into is not None:
            into.append(batch.pixels)


@pytest.fixture
def slides(tmp_path: Path) -> list[Path]:
    """Two of four slides will have their fate; `keep/` holds what they were."""
    (tmp_path / "keep").mkdir()
    paths = [
        write_tiff(tmp_path / f"{k}.svs", SyntheticSlide(k, 1100, 700 + 90 * k, mpp=0.25))
        for k in range(4)
    ]
    for path in paths:
        shutil.copy2(path, tmp_path / "keep" / path.name)
    return paths


def sampler_of(paths: list[Path]) -> PatchSampler:
    indexes = [read_slide_index(str(path)) for path in paths]
    masks = [ForegroundMask.everything(index) for index in indexes]
    return PatchSampler(indexes, masks, size_px=64, mpp=[0.25, 0.4], seed=11)


def kept(slides: list[Path]) -> list[SlideIndex]:
    return [read_slide_index(str(path.parent / "keep" / path.name)) for path in slides]


def check_pixels(batches: list[PatchBatch], slides: list[Path]) -> None:
    """Every patch is the pixels of the slide as it was indexed, whatever became of it."""
    handles = [open_slide(index) for index in kept(slides)]
    for batch in batches:
        for pixels, ref in zip(batch.pixels, batch.refs, strict=True):
            handle = handles[ref.slide]
            np.testing.assert_array_equal(pixels, handle.read_plan(plan_patch(handle.index, ref)))
    for handle in handles:
        handle.close()


def delete(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    """By another slide of the same name, as a new file."""
    other = write_tiff(path.with_suffix(".new.svs"), SyntheticSlide(9, 1100, 800, mpp=0.25))
    os.replace(other, path)


def overwrite(path: Path) -> None:
    """In place: the same inode, the same size, other bytes in the middle."""
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.seek(size // 4)
        file.write(bytes(size // 2))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fate", "kinds"),
    [
        (delete, {"ObjectNotFoundError"}),
        (cut, {"ObjectChangedError", "ShortReadError"}),
        (replace, {"ObjectChangedError"}),
        (overwrite, {"ObjectChangedError"}),
    ],
)
def test_what_happens_to_a_slide_in_mid_run_never_shows_in_pixels(slides, workers, fate, kinds):
    with PatchLoader(
        sampler_of(slides), BATCH, workers=workers, prefetch=1, max_failed_fraction=1.0,
    ) as loader:  # fmt: skip
        batches = [loader.next_batch() for _ in range(3)]
        assert not loader.stats.failures
        fate(slides[1])
        fate(slides[2])
        batches += [loader.next_batch() for _ in range(8)]
        failures = [failure for batch in batches for failure in batch.failures]
        assert loader.stats.failures == Counter(failure.kind for failure in failures)
    # A reader that has a deleted or replaced file open still has its bytes: that is no failure.
    assert {failure.kind for failure in failures} <= kinds
    assert {failure.slide_id for failure in failures} <= {"1", "2"}
    if fate in (cut, overwrite):
        assert len(failures) > 10
        late = [ref.slide for batch in batches[3 + 2 :] for ref in batch.refs]
        assert set(late) == {0, 3}
    check_pixels(batches, slides)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fate", [delete, cut, replace, overwrite])
def test_what_happened_before_the_first_touch_is_always_seen(slides, workers, fate):
    """And the stream is the same for any number of workers: the same bytes are not there for all."""
    sampler = sampler_of(slides)
    fate(slides[1])
    options = {"max_failed_fraction": 1.0, "quarantine_after": 4, "window_draws": 24}
    with PatchLoader(sampler, BATCH, workers=workers, **options) as loader:
        batches = [loader.next_batch() for _ in range(8)]
        assert loader.quarantined == {"1": 48}
        assert set(loader.stats.failures) <= {
            "ObjectNotFoundError", "ObjectChangedError", "ShortReadError",
        }  # fmt: skip
    failures = [failure for batch in batches for failure in batch.failures]
    assert {failure.slide_id for failure in failures} == {"1"}
    assert 4 <= len(failures) == sum(loader.stats.failures.values())
    assert max(failure.draw for failure in failures) < 48
    assert {ref.slide for batch in batches for ref in batch.refs} == {0, 2, 3}
    check_pixels(batches, slides)
    with PatchLoader(sampler, BATCH, threads=1, prefetch=1, **options) as again:
        for batch in batches:
            np.testing.assert_array_equal(again.next_batch().pixels, batch.pixels)


@pytest.mark.slow
def test_when_every_slide_is_gone_the_loader_says_so(slides):
    sampler = sampler_of(slides)
    for path in slides:
        path.unlink()
    with (
        PatchLoader(sampler, BATCH, max_failed_fraction=1.0) as loader,
        pytest.raises(errors.LoaderError, match=r"failed \d+ times, last .*ObjectNotFoundError"),
    ):
        loader.next_batch()


def test_the_budget_stops_a_run_whose_slides_vanish(slides):
    with PatchLoader(sampler_of(slides), BATCH, prefetch=1) as loader:
        loader.next_batch()
        for path in slides[1:]:
            overwrite(path)
        with pytest.raises(
            errors.FailureBudgetError, match=r"[123]: ObjectChangedError.*Leave these"
        ):
            take(loader, 20)
        state = loader.state_dict()
        loader.max_failed_fraction = 1.0
        assert loader.next_batch().draws[0] == state["next_draw"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_hangs_stops_the_stream_where_it_can_be_taken_up(
    fault_server: FaultServer, slides, workers
):
    shutil.copy(slides[0], fault_server.root / "a.svs")
    index = read_slide_index(f"{fault_server.url}/a.svs")
    sampler = PatchSampler([index], [ForegroundMask.everything(index)], size_px=64, mpp=[0.25])
    with PatchLoader(sampler, 4) as undisturbed:
        wanted = [undisturbed.next_batch().pixels for _ in range(6)]
    retry = RetryPolicy(attempts=2, first_delay_s=0.01, timeout_s=1.0, first_byte_timeout_s=0.5)
    with PatchLoader(sampler, 4, workers=workers, prefetch=1, retry=retry) as loader:
        got = [loader.next_batch().pixels for _ in range(3)]
        fault_server.faults = Faults("hang", only_data=True)
        with pytest.raises(errors.StoreUnavailableError):
            take(loader, 3, got)
        assert not active_children()
        hung = fault_server.seen["hang"]
        assert hung >= 2
        fault_server.faults = Faults()
        take(loader, 6 - len(got), got)
        assert fault_server.seen["hang"] == hung
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_closing_while_a_store_hangs_leaves_nothing(fault_server: FaultServer, slides, workers):
    shutil.copy(slides[0], fault_server.root / "a.svs")
    index = read_slide_index(f"{fault_server.url}/a.svs")
    sampler = PatchSampler([index], [ForegroundMask.everything(index)], size_px=64, mpp=[0.25])
    descriptors = len(os.listdir("/proc/self/fd"))
    with PatchLoader(sampler, 4, workers=workers, prefetch=3) as loader:
        loader.next_batch()
        seen = -1
        while seen != len(fault_server.ranges):  # until all that was asked for has come
            seen = len(fault_server.ranges)
            time.sleep(0.3)
        fault_server.faults = Faults("hang", only_data=True)
        loader.next_batch()  # it is there already, and makes room for one that hangs
        while not fault_server.seen["hang"]:
            time.sleep(0.01)
    assert not active_children()
    fault_server.closing.set()
    left = len(os.listdir("/proc/self/fd"))
    # The server's own ends of the connections are in this process too.
    assert left <= descriptors + fault_server.most_concurrent + 2
