"""Loader processes end, however they or their parent end, and leave nothing behind."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import active_children, current_process
from pathlib import Path

import numpy as np
import pytest

from online_patching import ForegroundMask, PatchLoader, PatchSampler, SlideIndex, errors
from online_patching.loading import ring as rings
from online_patching.loading.batch import batch_shape
from online_patching.loading.processes import START_METHODS
from online_patching.loading.ring import Ring, anonymous_memory, ring_bytes, slot_bytes
from tests.servers import Faults, FaultServer


@pytest.fixture(scope="module")
def sampler(small_indexes: list[SlideIndex]) -> PatchSampler:
    masks = [ForegroundMask.everything(index) for index in small_indexes]
    return PatchSampler(small_indexes, masks, size_px=80, mpp=[0.3, 0.5, 1.0], seed=3)


@pytest.fixture(scope="module")
def reference(sampler: PatchSampler) -> list[np.ndarray]:
    with PatchLoader(sampler, 6, threads=1, prefetch=1) as loader:
        return [loader.next_batch().pixels for _ in range(10)]


def descriptors() -> list[str]:
    """What is open in this process, sockets and pipes by kind."""
    out = []
    for name in os.listdir("/proc/self/fd"):
        try:
            out.append(os.readlink(f"/proc/self/fd/{name}").split(":")[0])
        except OSError:
            continue
    return sorted(out)


def memory_files() -> set[str]:
    """Named shared memory of the kinds that loaders in Python leave behind."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "patches"))}


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something holds within a minute: a bound on hanging, not a time that is measured."""
    deadline = time.monotonic() + 60
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize("copy", [True, False])
def test_every_start_method_delivers_the_same_and_leaves_nothing(
    sampler, reference, start_method, copy
):
    def once() -> None:
        with PatchLoader(
            sampler, 6, workers=2, threads=2, start_method=start_method, copy=copy
        ) as loader:
            for k in range(10):
                batch = loader.next_batch()
                np.testing.assert_array_equal(batch.pixels, reference[k])
                batch.release()
            del batch
        assert not active_children()

    once()  # starts what stays for the life of this process: the resource tracker, the fork server
    gc.collect()
    before, memory = descriptors(), memory_files()
    once()
    gc.collect()
    assert descriptors() == before
    assert memory_files() <= memory


def test_an_unknown_start_method_is_refused(sampler):
    with pytest.raises(errors.LoaderError, match="'thread' is none of spawn, fork, forkserver"):
        PatchLoader(sampler, 6, workers=1, start_method="thread")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_is_forgotten_ends_by_itself(sampler, reference, workers):
    threads = {t.name for t in threading.enumerate()}
    loader = PatchLoader(sampler, 6, workers=workers)
    np.testing.assert_array_equal(loader.next_batch().pixels, reference[0])
    assert len(active_children()) == workers
    del loader
    gc.collect()
    assert not active_children()
    assert {t.name for t in threading.enumerate()} <= threads | {"pymp"}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_in_the_consumer_ends_everything(sampler, workers):
    def train() -> None:
        for batch in PatchLoader(sampler, 6, workers=workers):
            raise ZeroDivisionError(str(batch.draws))

    with pytest.raises(ZeroDivisionError):
        train()
    gc.collect()
    assert not active_children()


@pytest.mark.slow
def test_a_worker_killed_while_it_is_waited_for_is_an_error(sampler):
    """Whichever worker dies, the error comes, and the stream can be gone on with."""
    with PatchLoader(sampler, 6, workers=3) as loader:
        first = loader.next_batch()
        victim = active_children()[-1]
        os.kill(victim.pid, signal.SIGKILL)
        taken = list(first.draws)

        def train() -> None:
            for batch in loader:
                taken.extend(batch.draws)

        with pytest.raises(errors.WorkerDiedError, match=r"exit code -9.*fewer workers"):
            train()
        assert not active_children()
        taken.extend(loader.next_batch().draws)
        assert taken == list(range(len(taken)))


@pytest.mark.slow
def test_an_error_of_a_worker_comes_with_its_traceback(sampler, small_indexes):
    masks = [ForegroundMask.everything(index) for index in small_indexes]
    broken = Breaking(small_indexes, masks, size_px=80, mpp=[0.5])
    with (
        PatchLoader(broken, 6, workers=1) as loader,
        pytest.raises(
            errors.LoaderError, match="UnsendableError in a loader process: cannot be pickled"
        ),
    ):
        loader.next_batch()


class UnsendableError(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__("cannot be pickled")
        self.lock = threading.Lock()


class Breaking(PatchSampler):
    def draw_batch(self, *_: object, **__: object):
        raise UnsendableError(1, 2)


@pytest.mark.slow
def test_a_consumer_that_stops_taking_stops_the_reading(
    fault_server: FaultServer, small_slides, tmp_path
):
    """Backpressure, counted at the server: what is asked for is bounded by prefetch, not by time."""
    from online_patching import read_slide_index

    (tmp_path / "a.svs").write_bytes(small_slides[0].read_bytes())
    index = read_slide_index(f"{fault_server.url}/a.svs")
    sampler = PatchSampler([index], [ForegroundMask.everything(index)], size_px=64, mpp=[0.2531])
    for options in ({"workers": 2, "prefetch": 2}, {"prefetch": 3}):
        batches = options["prefetch"] * options.get("workers", 1)
        with PatchLoader(sampler, 4, **options) as loader:
            loader.next_batch()
            taken = 1
            fault_server.ranges.clear()
            for _ in range(2):
                loader.next_batch()
                taken += 1
                seen = -1
                while seen != len(fault_server.ranges):  # until nothing more comes
                    seen = len(fault_server.ranges)
                    time.sleep(0.5)
                # A patch of 64 px touches at most 4 tiles of 240; merged, at most 2 ranges.
                assert 0 < seen <= 4 * 4 * (batches + taken)
            assert len(loader._engine._pending) <= batches


def test_memory_in_flight_is_the_ring_and_nothing_else(sampler):
    with PatchLoader(sampler, 6, workers=2, prefetch=3) as loader:
        loader.next_batch()
        ring = loader._engine._ring
        assert ring.n_slots == 2 * 3 + 1
        assert len(ring._memory) == 7 * slot_bytes((6, 80, 80, 3))
        assert sum(not slot.free for slot in loader._engine._slots) <= 6


SCRIPT = """
import json, os, sys, time
from multiprocessing import active_children
from online_patching import ForegroundMask, PatchLoader, PatchSampler, read_slide_index

def main():
    indexes = [read_slide_index(path) for path in {paths!r}]
    sampler = PatchSampler(indexes, [ForegroundMask.everything(i) for i in indexes], size_px=64, mpp=[0.5])
    global loader
    loader = PatchLoader(sampler, 4, workers={workers}, start_method={method!r})
    loader.next_batch()
    print(json.dumps([child.pid for child in active_children()]), flush=True)
    {then}

if __name__ == "__main__":
    main()
"""


def script(
    tmp_path: Path, slides: Sequence[object], then: str, method: str = "spawn", workers: int = 2
):
    """A process of its own that runs a loader and then does something; it has printed its workers."""
    path = tmp_path / "script.py"
    path.write_text(
        SCRIPT.format(paths=[str(s) for s in slides], workers=workers, method=method, then=then)
    )
    process = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1], start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return process, json.loads(line)


@pytest.mark.slow
@pytest.mark.parametrize("method", START_METHODS)
def test_a_killed_parent_leaves_no_process_and_no_memory(tmp_path, small_slides, method):
    memory = memory_files()
    process, workers = script(tmp_path, small_slides[:2], "time.sleep(600)", method)
    assert len(workers) == 2 and all(alive(pid) for pid in workers)
    process.kill()
    process.communicate()
    assert eventually(lambda: not any(alive(pid) for pid in workers))
    assert memory_files() <= memory


@pytest.mark.slow
def test_a_killed_parent_ends_workers_that_wait_for_a_hanging_store(
    tmp_path, small_slides, fault_server
):
    (tmp_path / "a.svs").write_bytes(small_slides[0].read_bytes())
    then = "[loader.next_batch() for _ in range(10**6)]"
    process, workers = script(tmp_path, [f"{fault_server.url}/a.svs"], then)
    fault_server.faults = Faults("hang", only_data=True)
    assert eventually(lambda: fault_server.seen["hang"] > 0)
    process.kill()
    process.communicate()
    assert eventually(lambda: not any(alive(pid) for pid in workers))
    assert fault_server.concurrent > 0  # they did not wait for it


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "method"), [(0, "spawn"), *((2, m) for m in START_METHODS)])
def test_ctrl_c_ends_the_process_and_its_workers_with_one_traceback(
    tmp_path, small_slides, method, workers
):
    then = "[loader.next_batch() for _ in range(10**6)]"
    process, pids = script(tmp_path, small_slides[:2], then, method, workers)
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells the whole group
    _, told = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT or process.returncode == 1
    assert told.count("Traceback") == 1 and told.rstrip().endswith("KeyboardInterrupt"), told
    assert eventually(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "method"), [(0, "spawn"), *((2, m) for m in START_METHODS)])
def test_a_process_that_never_closes_its_loader_ends_silently(
    tmp_path, small_slides, method, workers
):
    process, pids = script(tmp_path, small_slides, "loader.next_batch()", method, workers)
    _, told = process.communicate(timeout=120)
    assert (process.returncode, told) == (0, "")
    assert eventually(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_signals_that_a_scheduler_sends_to_a_whole_job_leave_workers_to_their_parent(
    sampler, reference, method
):
    with PatchLoader(sampler, 6, workers=1, start_method=method) as loader:
        loader.next_batch()
        (worker,) = active_children()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
        worker.join(0.3)
        assert worker.exitcode is None
        np.testing.assert_array_equal(loader.next_batch().pixels, reference[1])


def test_a_forked_copy_of_a_loader_does_not_touch_the_workers(sampler, reference):
    with PatchLoader(sampler, 6, workers=2) as loader:
        loader.next_batch()
        child = os.fork()
        if child == 0:
            loader.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        for k in range(1, 10):
            np.testing.assert_array_equal(loader.next_batch().pixels, reference[k])


def test_workers_inside_a_process_that_may_not_have_any_are_refused(sampler, monkeypatch):
    monkeypatch.setattr(current_process(), "_config", {"daemon": True})
    with (
        PatchLoader(sampler, 6, workers=2) as loader,
        pytest.raises(
            errors.LoaderError, match=r"workers=2 inside another loader's process.*num_workers=N"
        ),
    ):
        loader.next_batch()


def test_a_ring_that_cannot_fit_is_refused_with_the_numbers(sampler):
    with (
        PatchLoader(sampler, 6, workers=2, prefetch=10**6) as loader,
        pytest.raises(
            errors.LoaderError, match=r"no room for [\d,]+ MB .*the machine has.*fewer workers"
        ),
    ):
        loader.next_batch()
    assert not active_children()


def test_too_small_a_shm_is_refused_where_there_is_no_nameless_memory(monkeypatch):
    """Where the kernel has no memfd_create; the same sizes then count against /dev/shm."""

    def none(*_: object) -> int:
        raise OSError("no such call")

    monkeypatch.setattr(os, "memfd_create", none)
    monkeypatch.setattr(rings, "memory_bytes", lambda: 2**60)
    before, files = descriptors(), memory_files()
    with pytest.raises(errors.LoaderError, match=r"no room for .*shm: (ENOSPC|EFBIG).*--shm-size"):
        anonymous_memory(2**45)
    ring = Ring.create(3, (2, 8, 8, 3))
    ring.pixels(2, 2)[:] = 7
    assert (ring.pixels(2, 1) == 7).all() and not ring.pixels(1, 2).any()
    ring.close_descriptor()
    del ring
    assert descriptors() == before
    assert memory_files() <= files


def test_memory_is_what_the_container_may_have(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(rings, "_CGROUP_LIMIT", limit)
    everything = rings.memory_bytes()
    limit.write_text("max\n")
    assert rings.memory_bytes() == everything > 2**28
    limit.write_text("1048576\n")
    assert rings.memory_bytes() == 2**20


def test_slots_are_whole_pages_and_do_not_overlap():
    shape = (3, 5, 7, 3)
    ring = Ring.create(4, shape)
    for k in range(4):
        ring.pixels(k, 3)[:] = k
    for k in range(4):
        assert (ring.pixels(k, 3) == k).all()
    assert slot_bytes(shape) % 4096 == 0 and ring_bytes(4, shape) == 4 * slot_bytes(shape)
    ring.close_descriptor()


def test_context_views_have_an_axis_of_their_own(sampler):
    class Views:
        size_px, context = 32, (2.0, 4.0)

    assert batch_shape(Views(), 5) == (5, 3, 32, 32, 3)
    assert batch_shape(sampler, 5) == (5, 80, 80, 3)


def test_a_batch_released_twice_gives_nobody_else_s_place_away(sampler):
    with PatchLoader(sampler, 8, workers=1, prefetch=1, copy=False) as loader:
        first = next(loader)
        first.release()
        second = next(loader)
        kept = second.pixels.copy()
        first.release()
        third = next(loader)
        assert (second.pixels == kept).all()
        second.release()
        third.release()
