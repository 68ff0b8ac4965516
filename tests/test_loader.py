"""The stream is the same however it is made, resumed or split; damage is replaced and counted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    SlideIndex,
    errors,
    open_slide,
    read_slide_index,
)
from online_patching.plan import plan_patch
from online_patching.sampling.grid import GridSampler
from online_patching.testing import SyntheticSlide, write_ome_zarr, write_tiff


@pytest.fixture(scope="module")
def sampler(small_indexes: list[SlideIndex]) -> PatchSampler:
    masks = [ForegroundMask.everything(index) for index in small_indexes]
    return PatchSampler(small_indexes, masks, size_px=80, mpp=[0.3, 0.5, 1.0], seed=3)


def take(loader: PatchLoader, n: int) -> list[np.ndarray]:
    return [loader.next_batch().pixels for _ in range(n)]


def assert_same_pixels(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def reference(sampler: PatchSampler) -> list[np.ndarray]:
    with PatchLoader(sampler, 6, threads=1, prefetch=1) as loader:
        return take(loader, 10)


@pytest.mark.parametrize(
    "options", [{"threads": 4, "prefetch": 4}, {"workers": 1}, {"workers": 3, "prefetch": 1}]
)
def test_threads_and_processes_deliver_the_same_stream(sampler, reference, options):
    with PatchLoader(sampler, 6, **options) as loader:
        assert_same_pixels(take(loader, 10), reference)
        assert loader.stats.patches == 60
        assert loader.stats.tiles > 60
    assert not active_children()


def test_refs_say_what_the_pixels_are(sampler, small_indexes):
    with PatchLoader(sampler, 5) as loader:
        batch = loader.next_batch()
    assert batch.draws.tolist() == [0, 1, 2, 3, 4]
    for pixels, ref in zip(batch.pixels, batch.refs, strict=True):
        assert ref == sampler[ref.draw]
        with open_slide(small_indexes[ref.slide]) as slide:
            index = slide.index
            x_um, y_um = ref.x_px0 * index.mpp_x, ref.y_px0 * index.mpp_y
            again = slide.read_patch(x_um=x_um, y_um=y_um, mpp=ref.mpp, size_px=80)
        np.testing.assert_array_equal(again, pixels)


@pytest.mark.parametrize("stopped_after", [0, 1, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_continues_the_very_same_batches(
    sampler, reference, stopped_after, workers
):
    with PatchLoader(sampler, 6, prefetch=3, workers=workers) as first:
        take(first, stopped_after)  # more are in flight: that is where loaders break
        saved = json.dumps(first.state_dict())
    assert len(saved) < 1500
    with PatchLoader(sampler, 6) as resumed:
        resumed.load_state_dict(json.loads(saved))
        assert_same_pixels(take(resumed, 10 - stopped_after), reference[stopped_after:])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_one_stream_and_their_number_may_change(sampler, reference, world_size):
    size = 6 // world_size
    ranks = [PatchLoader(sampler, size, rank=r, world_size=world_size) for r in range(world_size)]
    for k in range(4):
        np.testing.assert_array_equal(
            np.concatenate([take(rank, 1)[0] for rank in ranks]), reference[k]
        )
    states = [rank.state_dict() for rank in ranks]
    assert all(state == states[0] for state in states)
    for rank in ranks:
        rank.close()
    with PatchLoader(sampler, 6) as one:
        one.load_state_dict(states[0])
        assert_same_pixels(take(one, 3), reference[4:7])


def test_closing_and_going_on_loses_nothing(sampler, reference):
    loader = PatchLoader(sampler, 6)
    got = take(loader, 3)
    loader.close()
    got += take(loader, 2)
    loader.close()
    assert_same_pixels(got, reference[:5])


def test_another_stream_is_refused_with_both_values(sampler, small_indexes):
    other = PatchSampler(
        small_indexes,
        [ForegroundMask.everything(i) for i in small_indexes],
        size_px=80,
        mpp=[0.3, 0.5, 1.0],
        seed=4,
    )
    state = PatchLoader(sampler, 6).state_dict()
    with pytest.raises(errors.StateMismatchError, match=r"'seed': 3.*'seed': 4"):
        PatchLoader(other, 6).load_state_dict(state)


@pytest.fixture
def damaged(tmp_path: Path, small_indexes: list[SlideIndex]) -> list[SlideIndex]:
    """A good slide and one with every second tile overwritten, same size and same mtime."""
    path = write_tiff(tmp_path / "bad.svs", SyntheticSlide(8, 2000, 1200, mpp=0.25))
    stat = path.stat()
    index = read_slide_index(str(path))
    data = bytearray(path.read_bytes())
    for tile in range(0, index.levels[0].n_tiles, 2):
        start, stop = index.levels[0].byte_range(tile)
        data[start:stop] = bytes(stop - start)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return [small_indexes[0], index]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_tile_is_replaced_by_the_next_attempt_and_counted(damaged, workers):
    sampler = PatchSampler(
        damaged, [ForegroundMask.everything(i) for i in damaged], size_px=64, mpp=[0.25]
    )
    with PatchLoader(sampler, 16, max_failed_fraction=1.0, workers=workers) as loader:
        batches = [loader.next_batch() for _ in range(4)]
        failures = [f for b in batches for f in b.failures]
        assert sum(loader.stats.failures.values()) == len(failures)
    assert len(failures) > 5
    assert {(f.slide_id, f.kind) for f in failures} == {("bad", "TileDecodeError")}
    refs = {ref.draw: ref for b in batches for ref in b.refs}
    for draw, attempt, _, _ in failures:
        last = refs[draw]
        assert last.attempt > attempt
        assert last == sampler.refs(sampler.draw_batch([draw], attempt=last.attempt))[0]
    assert not any(
        (b.pixels == 0).all(axis=(1, 2, 3)).any() for b in batches
    )  # never a black patch


def test_past_the_failure_budget_the_run_stops_with_the_list(damaged):
    sampler = PatchSampler(
        damaged, [ForegroundMask.everything(i) for i in damaged], size_px=64, mpp=[0.25]
    )
    with (
        PatchLoader(sampler, 16, max_failed_fraction=0.02) as loader,
        pytest.raises(
            errors.FailureBudgetError, match=r"failures in \d+ draws.*bad: TileDecodeError"
        ),
    ):
        take(loader, 20)


def sampled_failures(sampler: PatchSampler, loader: PatchLoader) -> list[str]:
    """What fails in the next batch of a loader, found out by another one."""
    with PatchLoader(sampler, loader.batch_size, max_failed_fraction=1.0) as scout:
        scout.load_state_dict(loader.state_dict())
        return [failure.slide_id for failure in scout.next_batch().failures]


def test_a_batch_is_not_lost_when_the_budget_stops_it(damaged):
    sampler = PatchSampler(
        damaged, [ForegroundMask.everything(i) for i in damaged], size_px=64, mpp=[0.25]
    )
    with PatchLoader(sampler, 16, max_failed_fraction=0.0) as loader:
        while "bad" not in sampled_failures(sampler, loader):
            loader.next_batch()
        before = loader.state_dict()
        with pytest.raises(errors.FailureBudgetError):
            loader.next_batch()
        state = loader.state_dict()
        assert state == before
        loader.max_failed_fraction = 1.0
        assert loader.next_batch().draws[0] == state["next_draw"]
        assert set(loader.state_dict()["failed"]) == {"bad: TileDecodeError"}


def test_a_zarr_slide_that_is_gone_or_another_is_never_black(tmp_path):
    made = [
        write_ome_zarr(
            tmp_path / f"{k}.ome.zarr", SyntheticSlide(k, 500, 400, mpp=0.5), chunk_px=128
        )
        for k in (1, 2)
    ]
    indexes = [read_slide_index(str(path)) for path in made]
    assert indexes[0].digest != indexes[1].digest
    shutil.rmtree(made[0])
    sampler = PatchSampler(
        indexes, [ForegroundMask.everything(i) for i in indexes], size_px=64, mpp=[0.5]
    )
    with PatchLoader(sampler, 16, max_failed_fraction=1.0) as loader:
        batch = loader.next_batch()
    assert {ref.slide for ref in batch.refs} == {1}
    assert any("metadata is gone" in failure.reason for failure in batch.failures)


def test_rgba_is_read_as_rgb(tmp_path):
    import zarr

    path = write_ome_zarr(
        tmp_path / "a.ome.zarr", SyntheticSlide(1, 300, 200, mpp=0.5), chunk_px=128
    )
    rgb = zarr.open_group(str(path), mode="r")["0"][:]
    group = zarr.open_group(str(path), mode="r+")
    del group["0"]
    rgba = np.concatenate([rgb, np.full_like(rgb[:1], 255)])
    group.create_array(
        "0", data=rgba, chunks=(4, 128, 128), chunk_key_encoding={"name": "v2", "separator": "/"}
    )
    with open_slide(str(path)) as slide:
        assert (slide.read_region((0, 0), 0, (300, 200)) == np.moveaxis(rgb, 0, 2)).all()


def test_a_killed_worker_is_an_error_not_a_hang(sampler):
    with PatchLoader(sampler, 6, workers=2) as loader:
        take(loader, 1)
        for child in active_children():
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(errors.WorkerDiedError, match="exit code -9"):
            take(loader, 20)
    assert not active_children()


def test_views_of_shared_memory_must_be_released(sampler, reference):
    with PatchLoader(sampler, 6, workers=1, prefetch=2, copy=False) as loader:
        for k in range(5):
            batch = loader.next_batch()
            np.testing.assert_array_equal(batch.pixels, reference[k])
            batch.release()
        held = [loader.next_batch() for _ in range(3)]
        with pytest.raises(errors.LoaderError, match=r"all 3 buffers are held.*release"):
            loader.next_batch()
        # Views outlive the loader, and what was not delivered comes again.
        assert_same_pixels([b.pixels for b in held], reference[5:8])
        np.testing.assert_array_equal(loader.next_batch().pixels, reference[8])


def test_nothing_is_left_behind(sampler):
    before = {t.name for t in threading.enumerate()}
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with PatchLoader(sampler, 6) as loader:
            take(loader, 2)
    loader = PatchLoader(sampler, 6)
    take(loader, 1)
    del loader
    assert {t.name for t in threading.enumerate()} <= before | {"pymp"}
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1


def test_the_package_needs_neither_torch_nor_mlflow():
    code = (
        "import sys, online_patching; "
        "bad = {'torch', 'mlflow', 'timm', 'zarr', 'matplotlib'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"threads": 0}, {"workers": -1}, {"rank": 2, "world_size": 2}]
)
def test_senseless_options_are_refused(sampler, bad):
    with pytest.raises(errors.LoaderError):
        PatchLoader(sampler, **{"batch_size": 4, **bad})


class Finite(PatchSampler):
    """The first draws of an endless stream."""

    def __len__(self) -> int:
        return 44


@pytest.fixture(scope="module")
def finite(small_indexes: list[SlideIndex]) -> Finite:
    masks = [ForegroundMask.everything(index) for index in small_indexes]
    return Finite(small_indexes, masks, size_px=80, mpp=[0.3, 0.5, 1.0], seed=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_that_ends_ends_the_stream(finite, workers):
    with PatchLoader(finite, 6, workers=workers, prefetch=3) as loader:
        assert len(loader) == 8
        batches = list(loader)
        assert [len(b.draws) for b in batches] == [6] * 7 + [2]
        assert batches[-1].pixels.shape == (2, 80, 80, 3)
        assert loader.finished and list(loader) == []
        with pytest.raises(StopIteration):
            next(loader)
        with pytest.raises(errors.LoaderError, match="all 44 draws were delivered"):
            loader.next_batch()
        assert loader.state_dict()["next_draw"] == 44
    with PatchLoader(finite, 7) as other:
        assert_same_pixels(
            [np.concatenate([b.pixels for b in batches])],
            [np.concatenate([b.pixels for b in other])],
        )


def test_ranks_of_a_stream_that_ends_take_as_many_batches_and_no_patch_twice(finite):
    ranks = [PatchLoader(finite, 4, rank=r, world_size=4) for r in range(4)]
    batches = [list(rank) for rank in ranks]
    assert [len(some) for some in batches] == [len(rank) for rank in ranks] == [3] * 4
    assert [len(some[-1].draws) for some in batches] == [4, 4, 4, 0]
    assert batches[3][-1].pixels.shape == (0, 80, 80, 3) and batches[3][-1].refs == []
    draws = np.concatenate([batches[r][s].draws for s in range(3) for r in range(4)])
    assert draws.tolist() == list(range(44))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_grid_is_read_to_its_end_also_where_slides_are_damaged(damaged, workers):
    """Each place once; where nothing can be read, another place with attempt > 0, listed."""
    masks = [ForegroundMask.everything(index) for index in damaged]
    grid = GridSampler(damaged, masks, size_px=200, mpp=0.5, min_foreground=0)
    options = {"max_failed_fraction": 1.0, "quarantine_after": 1, "window_draws": 8}
    with PatchLoader(grid, 24, workers=workers, **options) as loader:
        assert len(loader) == -(-len(grid) // 24)
        batches = list(loader)
        assert not loader.quarantined
    drawn = {ref.draw: (ref, px) for b in batches for ref, px in zip(b.refs, b.pixels, strict=True)}
    failed = {failure.draw for b in batches for failure in b.failures}
    assert list(drawn) == list(range(len(grid)))
    assert 2 < len(failed) < len(grid)
    handles = [open_slide(index) for index in damaged]
    for draw, (ref, pixels) in drawn.items():
        assert (ref.attempt > 0) == (draw in failed)
        again = handles[ref.slide].read_plan(plan_patch(damaged[ref.slide], ref))
        np.testing.assert_array_equal(pixels, again)
    for handle in handles:
        handle.close()


def test_a_stream_that_ends_can_be_resumed_with_another_batch_size(finite):
    with PatchLoader(finite, 6) as whole:
        everything = np.concatenate([b.pixels for b in whole])
    with PatchLoader(finite, 5, prefetch=4) as first:
        some = take(first, 6)
        state = json.loads(json.dumps(first.state_dict()))
    with PatchLoader(finite, 9) as rest:
        rest.load_state_dict(state)
        np.testing.assert_array_equal(
            np.concatenate([*some, *(b.pixels for b in rest)]), everything
        )


def test_an_endless_loader_has_no_length(sampler):
    with pytest.raises(TypeError, match="never ends"):
        len(PatchLoader(sampler, 4))


def test_a_stream_may_begin_anywhere(sampler, reference):
    with PatchLoader(sampler, 6, first_draw=18) as loader:
        assert_same_pixels(take(loader, 2), reference[3:5])


@pytest.mark.parametrize("workers", [0, 2])
def test_patches_of_one_read_stay_in_one_batch(small_indexes, workers):
    masks = [ForegroundMask.everything(index) for index in small_indexes]
    sampler = PatchSampler(small_indexes, masks, size_px=64, mpp=[0.5], patches_per_read=4)
    with pytest.raises(errors.LoaderError, match=r"batch_size 6 .*patches_per_read 4.*Use 4 or 8"):
        PatchLoader(sampler, 6)
    with pytest.raises(errors.LoaderError, match="Use 4 or 8"):
        PatchLoader(sampler, 2)
    with PatchLoader(sampler, 16, workers=workers) as whole, PatchLoader(sampler, 4) as parts:
        for _ in range(2):
            batch = whole.next_batch()
            for slide in batch.columns.slide.reshape(4, 4):
                assert len(set(slide)) == 1
            np.testing.assert_array_equal(batch.pixels, np.concatenate(take(parts, 4)))


@pytest.mark.parametrize("workers", [0, 2])
def test_context_views_come_with_each_patch(small_indexes, workers):
    masks = [ForegroundMask.everything(index) for index in small_indexes]
    sampler = PatchSampler(small_indexes, masks, size_px=64, mpp=[0.5], context=(2.0, 4.0))
    with PatchLoader(sampler, 5, workers=workers) as loader:
        batch = loader.next_batch()
    assert batch.pixels.shape == (5, 3, 64, 64, 3)
    assert len(batch.refs) == len(batch.draws) == 5
    views = sampler.refs(sampler.expand(batch.columns))
    for pixels, ref in zip(batch.pixels.reshape(15, 64, 64, 3), views, strict=True):
        with open_slide(small_indexes[ref.slide]) as slide:
            again = slide.read_plan(plan_patch(slide.index, ref))
        np.testing.assert_array_equal(pixels, again)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_filter_refuses_is_replaced_and_counted_apart(small_indexes, workers):
    masks = [ForegroundMask.everything(index) for index in small_indexes]
    options = {"size_px": 64, "mpp": [0.5], "seed": 2}
    plain = PatchSampler(small_indexes, masks, **options)
    picky = PatchSampler(small_indexes, masks, filters=[Odd()], **options)
    with PatchLoader(picky, 16, workers=workers, max_failed_fraction=0.0) as loader:
        batch = loader.next_batch()
        refused = [failure for failure in batch.failures if failure.filtered]
        assert refused == batch.failures and len(refused) > 3
        assert loader.stats.filtered == {"filter: odd": len(refused)}
        assert not loader.stats.failures
        assert loader.state_dict()["filtered"] == {"filter: odd": len(refused)}
    assert (batch.pixels[:, 0, 0, 0] % 2 == 0).all()
    with PatchLoader(plain, 16) as other:
        kept = other.next_batch()
    same = (kept.pixels[:, 0, 0, 0] % 2) == 0
    np.testing.assert_array_equal(batch.pixels[same], kept.pixels[same])
    assert {failure.draw for failure in refused} == set(np.flatnonzero(~same).tolist())


class Odd:
    """Refuses a patch whose first sample is odd."""

    name = "odd"

    @property
    def config(self) -> dict[str, str]:
        return {"of": "sample 0"}

    def keep(self, pixels: np.ndarray) -> np.ndarray:
        return pixels[:, 0, 0, 0] % 2 == 0
