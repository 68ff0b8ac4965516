"""One global stream for any number of ranks, also when slides fail, are quarantined, and runs resume."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
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
    open_slide,
    read_slide_index,
)
from online_patching.testing import SyntheticSlide, write_tiff
from tests.ranks import World, stream

WINDOW = 48
RULE = {"window_draws": WINDOW, "quarantine_after": 4, "max_failed_fraction": 1.0}
DRAWS = 240


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[SlideIndex]:
    """Two good slides, one with every second tile damaged, one with every ninth.

    A slide of which nothing can be read would do less: its draws move on with and without quarantine.
    """
    folder = tmp_path_factory.mktemp("failing")
    indexes = []
    for k, (name, every) in enumerate({"good": 0, "torn": 2, "fine": 0, "worn": 9}.items()):
        path = write_tiff(folder / f"{name}.svs", SyntheticSlide(k, 1500, 900, mpp=0.25))
        index = read_slide_index(str(path))
        stat, data = path.stat(), bytearray(path.read_bytes())
        for tile in range(0, index.levels[0].n_tiles if every else 0, every or 1):
            start, stop = index.levels[0].byte_range(tile)
            data[start:stop] = bytes(stop - start)
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        indexes.append(index)
    return indexes


@pytest.fixture(scope="module")
def sampler(slides: list[SlideIndex]) -> PatchSampler:
    masks = [ForegroundMask.everything(index) for index in slides]
    return PatchSampler(slides, masks, size_px=48, mpp=[0.25], seed=5)


@pytest.fixture(scope="module")
def reference(sampler: PatchSampler) -> tuple[np.ndarray, list[PatchRef]]:
    with PatchLoader(sampler, 1, threads=1, prefetch=1, **RULE) as loader:
        batches = [loader.next_batch() for _ in range(DRAWS)]
        assert loader.quarantined == {"torn": 2 * WINDOW}
    return np.concatenate([b.pixels for b in batches]), [b.refs[0] for b in batches]


def same(pixels: np.ndarray, refs: list[PatchRef], reference, start: int, stop: int) -> None:
    assert refs == reference[1][start:stop]
    np.testing.assert_array_equal(pixels, reference[0][start:stop])


def test_the_stream_is_what_the_rule_says_draw_by_draw(slides, sampler, reference):
    """A loop that knows which tiles are bad, and nothing of loaders."""
    handles = [open_slide(index) for index in slides]
    failed: Counter[tuple[int, int]] = Counter()  # (window, slide)
    chosen: Counter[tuple[int, int]] = Counter()
    start = dict.fromkeys(range(len(slides)), 2**62)
    for draw in range(DRAWS):
        window = draw // WINDOW
        if draw % WINDOW == 0:  # every earlier window is over; the one before the last has its say
            for row in start:
                n = failed[window - 2, row]
                if n >= 4 and n >= chosen[window - 2, row] / 2:
                    start[row] = min(start[row], draw)
        attempt, first = 0, True
        while True:
            ref = sampler.refs(sampler.draw_batch([draw], attempt))[0]
            attempt = ref.attempt + 1
            if draw >= start[ref.slide]:
                continue
            chosen[window, ref.slide] += first
            first = False
            index = slides[ref.slide]
            try:
                pixels = handles[ref.slide].read_patch(
                    x_um=ref.x_px0 * index.mpp_x, y_um=ref.y_px0 * index.mpp_y, mpp=0.25, size_px=48
                )
            except errors.TileDecodeError:
                failed[window, ref.slide] += 1
                continue
            break
        assert ref == reference[1][draw]
        np.testing.assert_array_equal(pixels, reference[0][draw])
    for handle in handles:
        handle.close()
    assert start[1] == 2 * WINDOW
    assert failed[4, 3] > 0 and start[3] == 2**62  # worn, not torn
    assert any(ref.slide == 1 for ref in reference[1][WINDOW : 2 * WINDOW])
    assert all(ref.slide != 1 for ref in reference[1][2 * WINDOW :])


@pytest.mark.parametrize(
    ("world_size", "batch_size", "options"),
    [
        (1, 8, {"prefetch": 20, "threads": 3}),
        (1, 40, {}),
        (1, 6, {"workers": 2, "prefetch": 6}),
        (2, 6, {"prefetch": 9}),
        (4, 5, {}),
        (4, 12, {"prefetch": 4}),
    ],
)
def test_quarantine_is_the_same_for_any_ranks_workers_and_batches(
    sampler, reference, world_size, batch_size, options
):
    steps = DRAWS // (world_size * batch_size)
    pixels, refs, state = stream(sampler, world_size, batch_size, steps, **options, **RULE)
    same(pixels, refs, reference, 0, len(refs))
    assert [q[:3] for q in state["quarantined"]] == [["torn", 1, 2 * WINDOW]]


@pytest.mark.parametrize("world_sizes", [(4, 2, 8), (4, 8, 1), (1, 3, 2)])
def test_a_stream_continues_on_more_or_fewer_ranks(sampler, reference, world_sizes):
    """Resumed twice with other ranks, batch sizes and prefetch, within windows and with more in flight."""
    at, state = 0, None
    for part, world_size in enumerate(world_sizes):
        batch_size = (3, 5, 2)[part]
        steps = (DRAWS // 3) // (world_size * batch_size)
        pixels, refs, state = stream(
            sampler, world_size, batch_size, steps, state, prefetch=2 + part, **RULE
        )
        same(pixels, refs, reference, at, at + len(refs))
        at += len(refs)
        assert state["next_draw"] == at
        assert at % WINDOW
    assert at > 3 * WINDOW


@pytest.mark.parametrize("stopped_after", range(0, 96, 5))
def test_wherever_it_is_resumed_the_same_slides_are_quarantined(sampler, reference, stopped_after):
    with PatchLoader(sampler, 1, prefetch=4, **RULE) as first:
        for _ in range(stopped_after):
            first.next_batch()
        saved = json.dumps(first.state_dict())
    with PatchLoader(sampler, 8, **RULE) as resumed:
        resumed.load_state_dict(json.loads(saved))
        while len(resumed.quarantined) == 0 or resumed.next_draw < 2 * WINDOW + 16:
            batch = resumed.next_batch()
            start, stop = int(batch.draws[0]), int(batch.draws[-1]) + 1
            same(batch.pixels, batch.refs, reference, start, stop)
        assert resumed.quarantined == {"torn": 2 * WINDOW}


def test_ranks_that_cannot_agree_quarantine_nothing_and_their_states_merge(sampler):
    loaders = [
        PatchLoader(sampler, 6, rank=r, world_size=2, max_failed_fraction=1.0, window_draws=WINDOW)
        for r in range(2)
    ]
    failures: Counter[str] = Counter()
    for _ in range(6):
        for loader in loaders:
            failures.update(f"{f.slide_id}: {f.kind}" for f in loader.next_batch().failures)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    for loader in loaders:
        assert loader.quarantined == {}
        loader.close()
    assert states[0]["own"] != states[1]["own"]
    merged = PatchLoader.merge_states(states[::-1])
    assert Counter(merged["failed"]) == failures
    assert merged["own"] is None
    assert sum(sum(row[3].values()) for row in merged["watched"]) < failures.total()
    with PatchLoader(sampler, 12, max_failed_fraction=1.0, window_draws=WINDOW) as one:
        one.load_state_dict(merged)
        assert one.next_batch().draws[0] == 72
        one.load_state_dict(states[0])  # one rank's will do for the stream; its counts are its own
        assert one.next_batch().draws[0] == 72
    with pytest.raises(errors.StateMismatchError, match="one is there twice"):
        PatchLoader.merge_states([states[0], states[0]])
    with pytest.raises(errors.StateMismatchError, match="differ in next_draw"):
        PatchLoader.merge_states([states[0], {**states[1], "next_draw": 84}])


def test_past_the_budget_all_ranks_stop_at_the_same_step_with_the_whole_list(slides):
    """Ranks see different failures, and stop for all of them together."""
    masks = [ForegroundMask.everything(index) for index in slides]
    sampler = PatchSampler(
        slides, masks, size_px=48, mpp=[0.25], slide_weights=[2, 1, 0, 0], seed=1
    )
    delivered: list[list[int]] = [[], [], []]
    own: list[list[str]] = [[], [], []]
    afterwards: list[dict] = [{}, {}, {}]
    options = {"window_draws": 480, "quarantine_after": None, "max_failed_fraction": 0.15}

    def work(rank: int, gather) -> str:
        with PatchLoader(sampler, 4, rank=rank, world_size=3, gather=gather, **options) as loader:
            try:
                while True:
                    batch = loader.next_batch()
                    delivered[rank].append(int(batch.draws[0]))
                    own[rank] += [failure.slide_id for failure in batch.failures]
            except errors.FailureBudgetError as stopped:
                afterwards[rank] = loader.state_dict()
                return str(stopped)

    told = World(3).run(work)
    assert len(delivered[0]) == len(delivered[1]) == len(delivered[2]) > 2
    assert len({len(failed) for failed in own}) > 1
    assert told[0] == told[1] == told[2]
    listed = re.search(r"(\d+) failures in \d+ draws.*: (\d+) x torn: TileDecodeError", told[0])
    assert listed and int(listed[1]) == int(listed[2]) >= sum(map(len, own))
    assert afterwards[0] == afterwards[1] == afterwards[2]
    assert afterwards[0]["next_draw"] == 12 * len(delivered[0])
    assert afterwards[0]["failed"] == {"torn: TileDecodeError": sum(map(len, own))}


RANK = """
import hashlib, json, pickle, sys
import torch.distributed as dist
from online_patching import PatchLoader

def gather(mine):
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, mine)
    return out

if __name__ == "__main__":
    folder, rank, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world_size)
    sampler, rule = pickle.load(open(f"{folder}/sampler", "rb"))
    with PatchLoader(sampler, 8, rank=rank, world_size=world_size, gather=gather, workers=1, **rule) as loader:
        told = [hashlib.sha256(loader.next_batch().pixels.tobytes()).hexdigest() for _ in range(15)]
        print(json.dumps([told, loader.state_dict()]))
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_that_are_processes_agree_through_torch(tmp_path, sampler, reference):
    """Two processes, gloo between them, a loader process each: the stream of one."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "sampler").write_bytes(pickle.dumps((sampler, RULE)))
    root = str(Path(__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "rank.py"), str(tmp_path), str(rank), "2"],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root},
        )
        for rank in range(2)
    ]  # fmt: skip
    (one, state), (other, same_state) = [json.loads(rank.communicate()[0]) for rank in ranks]
    assert state == same_state
    assert [q[:3] for q in state["quarantined"]] == [["torn", 1, 2 * WINDOW]]
    batches = reference[0].reshape(30, 8, 48, 48, 3)
    wanted = [hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in batches]
    assert [one, other] == [wanted[0::2], wanted[1::2]]


def test_ranks_meet_rarely(sampler):
    calls = []

    def gather(mine):
        calls.append(1)
        return [mine]

    with PatchLoader(
        sampler, 4, world_size=2, rank=0, gather=gather, **{**RULE, "window_draws": 400}
    ) as loader:
        for _ in range(20):
            loader.next_batch()
    assert len(calls) == 160 // 50


def test_a_step_longer_than_a_window_is_refused_before_it_starts(sampler):
    with pytest.raises(
        errors.LoaderError, match=r"step of 64 draws .* window of 48.*quarantine_after=None"
    ):
        PatchLoader(sampler, 64, **RULE)
    with PatchLoader(sampler, 64, **{**RULE, "quarantine_after": None}) as loader:
        assert len(loader.next_batch().draws) == 64


def test_another_rule_of_quarantine_is_refused_and_none_goes_on(sampler):
    with PatchLoader(sampler, 24, **RULE) as loader:
        while loader.next_draw < 2 * WINDOW:
            loader.next_batch()
        state = loader.state_dict()
    with pytest.raises(errors.StateMismatchError, match=r"quarantine_after=4.*quarantine_after=7"):
        PatchLoader(sampler, 24, **{**RULE, "quarantine_after": 7}).load_state_dict(state)
    with PatchLoader(sampler, 24, **{**RULE, "quarantine_after": None}) as off:
        off.load_state_dict(state)
        assert off.quarantined == {"torn": 2 * WINDOW}
        assert all(ref.slide_id != "torn" for ref in off.next_batch().refs)


def test_a_state_of_another_version_is_refused(sampler):
    with pytest.raises(errors.StateMismatchError, match="saved in version 1, this is version 2"):
        PatchLoader(sampler, 4).load_state_dict({"version": 1, "next_draw": 0})
