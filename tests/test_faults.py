"""The whole loader against a server that misbehaves in mid-run: the same pixels, and counts on both
sides that say what happened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchRef,
    PatchSampler,
    SlideIndex,
    errors,
    read_slide_index,
)
from online_patching.fetch import fetch_local, pieces_of
from online_patching.plan import plan_patch
from online_patching.slide import finish
from online_patching.stats import Stats
from online_patching.stores import RetryPolicy, Stores
from tests.servers import FLOOD_BYTES, Faults, FaultServer

PATIENT = RetryPolicy(attempts=4, first_delay_s=0.01, timeout_s=2.5, first_byte_timeout_s=2.0)
BATCH, BATCHES = 12, 6
SIZE_PX = 200


def sampler(indexes: list[SlideIndex]) -> PatchSampler:
    masks = [ForegroundMask.everything(index) for index in indexes]
    return PatchSampler(indexes, masks, size_px=SIZE_PX, mpp=[0.5, 1.1], seed=3)


def loader(indexes: list[SlideIndex], workers: int, **more: object) -> PatchLoader:
    # prefetch 1: when a batch is taken, nothing else is under way, so that counts can be compared
    options = {"workers": workers, "prefetch": 1, "retry": PATIENT, **more}
    return PatchLoader(sampler(indexes), BATCH, **options)


def stale(made: PatchLoader) -> int | None:
    """Requests that were sent again without being retries; a worker process keeps that to itself."""
    stores = getattr(made._engine, "stores", None)
    return None if stores is None else stores.remote("http://").stale


@pytest.fixture(scope="module")
def undisturbed(small_slides: list[Path]) -> list[np.ndarray]:
    with loader([read_slide_index(str(small_slides[0]))], 0) as made:
        return [made.next_batch().pixels for _ in range(BATCHES)]


@pytest.fixture
def served(fault_server: FaultServer, small_slides: list[Path]) -> SlideIndex:
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    index = read_slide_index(f"{fault_server.url}/a.svs")
    fault_server.seen.clear()
    return index


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "every"),
    [
        *[(kind, 20) for kind in ("500", "503", "truncate", "reset", "reset-mid")],
        *[(kind, 45) for kind in ("drip", "hang")],  # each costs a time-out
    ],
)
def test_what_passes_changes_no_pixel_and_is_counted(
    fault_server: FaultServer,
    served: SlideIndex,
    undisturbed: list[np.ndarray],
    workers: int,
    kind: str,
    every: int,
) -> None:
    fault_server.faults = Faults(kind, every=every)
    with loader([served], workers) as made:
        for want in undisturbed:
            assert (made.next_batch().pixels == want).all()
        stats, again = made.stats, stale(made)
    seen = fault_server.seen
    assert seen[kind] >= 2
    assert stats.requests == seen["requests"] - seen[kind]  # each range was delivered once
    assert not stats.failures
    if kind != "reset":
        assert stats.retries == seen[kind]
    elif again is not None:  # a connection that is reset before it answers may just have been stale
        assert stats.retries + again == seen[kind]
    assert stats.retries <= seen[kind]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("ignore-range", "ignores byte ranges"),
        ("wrong-range", "asked for bytes"),
        ("flood", "sent more than"),
        ("403", "access refused"),
    ],
)
def test_what_cannot_pass_stops_the_stream_at_a_place_to_resume(
    fault_server: FaultServer,
    served: SlideIndex,
    undisturbed: list[np.ndarray],
    workers: int,
    kind: str,
    words: str,
) -> None:
    fault_server.faults = Faults(kind, every=70)
    done = 0
    with loader([served], workers) as made:
        with pytest.raises(errors.StoreError, match=words):  # noqa: PT012 - some batches may pass
            while True:
                assert (made.next_batch().pixels == undisturbed[done]).all()
                done += 1
        assert made.stats.retries == 0
        state = made.state_dict()
    assert state["next_draw"] == done * BATCH
    assert fault_server.seen[kind] >= 1
    if kind == "ignore-range":  # it was cut off: what was sent lay in buffers
        assert fault_server.sent_bytes < FLOOD_BYTES / 2
    fault_server.faults = Faults()
    with loader([served], workers) as made:
        made.load_state_dict(state)
        for want in undisturbed[done:]:
            assert (made.next_batch().pixels == want).all()


def deleted(server: FaultServer, other: Path) -> str:
    (server.root / "a.svs").unlink()
    return "HTTP 404"


def replaced(server: FaultServer, other: Path) -> str:
    with server.lock:
        server.etag = '"two"'
        shutil.copy(other, server.root / "a.svs")
    return "HTTP 412"


def replaced_where_if_match_is_not_heeded(server: FaultServer, other: Path) -> str:
    server.heeds_if_match = False
    replaced(server, other)
    return "HTTP 206"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("happens", "error"),
    [
        (deleted, "ObjectNotFoundError"),
        (replaced, "ObjectChangedError"),
        (replaced_where_if_match_is_not_heeded, "ObjectChangedError"),
    ],
)
def test_a_slide_that_goes_or_changes_is_replaced_and_never_mixed(
    fault_server: FaultServer,
    served: SlideIndex,
    small_slides: list[Path],
    small_indexes: list[SlideIndex],
    workers: int,
    happens: Callable[[FaultServer, Path], str],
    error: str,
) -> None:
    stays = small_indexes[1]
    with loader([served, stays], workers, max_failed_fraction=1.0, quarantine_after=None) as made:
        first = made.next_batch()
        assert {ref.slide for ref in first.refs} == {0, 1}
        fault_server.seen.clear()
        status = happens(fault_server, small_slides[1])
        later = [made.next_batch() for _ in range(4)]
        stats = made.stats
    failures = [failure for batch in later for failure in batch.failures]
    assert failures
    assert all(error in failure.reason for failure in failures)
    assert {ref.slide for batch in later for ref in batch.refs} == {1}
    assert fault_server.seen[status] >= len(failures)  # the server's own count
    assert stats.retries == 0
    assert sum(stats.failures.values()) == len(failures)
    for batch in [first, *later]:
        for ref, pixels in zip(batch.refs, batch.pixels, strict=True):
            assert (pixels == read(small_indexes[ref.slide], ref)).all()


def read(index: SlideIndex, ref: PatchRef) -> np.ndarray:
    """The patch as the local file has it, read by itself."""
    plan = plan_patch(index, ref)
    pieces = pieces_of(index, plan)
    return finish(index, plan, pieces, fetch_local(index, pieces, Stores(), Stats()))
