"""The stream under torch's DataLoader and torchdata's StatefulDataLoader, whatever the context."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from online_patching import ForegroundMask, PatchLoader, PatchSampler, SlideIndex, errors
from online_patching.torch_dataset import PatchDataset

pytestmark = [
    # torchdata's own call, which torch 2.14 deprecates
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    # torch's, about test machines with two cores
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning"),
]

CONTEXTS = ["fork", "spawn", "forkserver"]


class Finite(PatchSampler):
    """The first draws of an endless stream."""

    def __len__(self) -> int:
        return 34


@pytest.fixture(scope="module")
def sampler(small_indexes: list[SlideIndex]) -> PatchSampler:
    masks = [ForegroundMask.everything(index) for index in small_indexes]
    return PatchSampler(small_indexes, masks, size_px=80, mpp=[0.3, 0.5, 1.0], seed=3)


@pytest.fixture(scope="module")
def finite(small_indexes: list[SlideIndex]) -> Finite:
    masks = [ForegroundMask.everything(index) for index in small_indexes]
    return Finite(small_indexes, masks, size_px=80, mpp=[0.3, 0.5, 1.0], seed=3)


@pytest.fixture(scope="module")
def reference(sampler: PatchSampler) -> list[np.ndarray]:
    with PatchLoader(sampler, 4, threads=1, prefetch=1) as loader:
        return [loader.next_batch().pixels for _ in range(16)]


def check(batch, reference: list[np.ndarray], k: int) -> None:
    pixels, draws = batch
    assert draws.tolist() == list(range(4 * k, 4 * k + 4))
    assert torch.equal(pixels, torch.from_numpy(reference[k]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "context"), [(0, None), (1, "fork"), (3, "fork"), *((2, c) for c in CONTEXTS)]
)
def test_the_stream_is_the_same_for_any_torch_workers(sampler, reference, num_workers, context):
    data = DataLoader(
        PatchDataset(sampler, 4, threads=1), batch_size=None, num_workers=num_workers,
        multiprocessing_context=context,
    )  # fmt: skip
    batches = iter(data)
    for k in range(7):
        check(next(batches), reference, k)
    del batches


def test_ranks_with_torch_workers_share_the_stream(sampler, reference):
    datasets = [PatchDataset(sampler, 4, rank=r, world_size=2, first_draw=8) for r in range(2)]
    streams = [
        iter(DataLoader(d, batch_size=None, num_workers=2 - r)) for r, d in enumerate(datasets)
    ]
    for step in range(3):
        for r in range(2):
            check(next(streams[r]), reference, 2 + 2 * step + r)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "context", "stopped_after"),
    [
        *((n, c, k) for n, c in ((0, None), (1, "fork"), (3, "fork")) for k in (0, 1, 5)),
        *((2, c, 3) for c in CONTEXTS),
    ],
)
def test_a_stateful_data_loader_resumes_exactly(
    sampler, reference, num_workers, context, stopped_after
):
    """More are in flight in every worker when the state is taken: that is where it breaks."""

    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(
            PatchDataset(sampler, 4, threads=1, prefetch=3), batch_size=None,
            num_workers=num_workers, multiprocessing_context=context,
        )  # fmt: skip

    first = loader()
    batches = iter(first)
    for k in range(stopped_after):
        check(next(batches), reference, k)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    assert len(json.dumps(state)) < 2000 * max(1, num_workers)
    del batches, first
    resumed = loader()
    resumed.load_state_dict(state)
    batches = iter(resumed)
    for k in range(stopped_after, stopped_after + 6):
        check(next(batches), reference, k)
    again = pickle.loads(pickle.dumps(resumed.state_dict()))  # and once more, from a resumed one
    del batches, resumed
    third = loader()
    third.load_state_dict(again)
    check(next(iter(third)), reference, stopped_after + 6)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_epochs_of_a_sampler_that_ends_begin_anew(finite, reference, num_workers):
    """9 batches, the last of 2 patches, whichever worker they fall to; persistent workers too."""
    for persistent in {False, num_workers > 0}:
        data = StatefulDataLoader(
            PatchDataset(finite, 4, threads=1), batch_size=None, num_workers=num_workers,
            persistent_workers=persistent,
        )  # fmt: skip
        assert len(data.dataset) == 9
        for _ in range(2):
            draws = []
            for pixels, numbers in data:
                draws += numbers.tolist()
                np.testing.assert_array_equal(pixels, reference[draws[-1] // 4][: len(pixels)])
            assert draws == list(range(34))


def test_a_state_between_epochs_begins_the_next_one(finite):
    data = StatefulDataLoader(PatchDataset(finite, 4), batch_size=None, num_workers=2)
    first = iter(data)
    taken = [next(first)[1][0] for _ in range(6)]
    state = data.state_dict()
    rest = StatefulDataLoader(PatchDataset(finite, 4), batch_size=None, num_workers=2)
    rest.load_state_dict(state)
    taken += [numbers[0] for _, numbers in rest]
    assert taken == list(range(0, 34, 4))
    assert [numbers[0] for _, numbers in rest] == list(range(0, 34, 4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_of_a_stream_that_ends_take_as_many_batches_each(finite, num_workers):
    """34 draws over 3 ranks of 4: the last rank's third batch is empty, and comes."""
    drawn = [
        [numbers.tolist() for _, numbers in DataLoader(
            PatchDataset(finite, 4, rank=r, world_size=3), batch_size=None, num_workers=num_workers)]
        for r in range(3)
    ]  # fmt: skip
    assert [len(some) for some in drawn] == [3, 3, 3]
    assert [len(some[-1]) for some in drawn] == [4, 4, 2]
    assert sorted(n for some in drawn for numbers in some for n in numbers) == list(range(34))


def test_loader_processes_inside_torch_workers_are_refused_by_name(sampler):
    data = DataLoader(PatchDataset(sampler, 4, workers=2), batch_size=None, num_workers=1)
    with pytest.raises(errors.LoaderError, match="inside another loader's process"):
        next(iter(data))


def test_torch_workers_cannot_agree_with_other_ranks(sampler):
    dataset = PatchDataset(sampler, 4, rank=0, world_size=2, gather=_alone)
    assert next(iter(dataset))[1].tolist() == [0, 1, 2, 3]
    with pytest.raises(errors.LoaderError, match="gather needs the training process"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1)))


def test_torch_workers_quarantine_nothing(sampler):
    """Or the stream would depend on their number."""
    assert PatchDataset(sampler, 4).state_dict()["quarantine_after"] is None
    dataset = PatchDataset(sampler, 4, quarantine_after=3)
    assert dataset.state_dict()["quarantine_after"] == 3
    with pytest.raises(errors.LoaderError, match="2 torch workers cannot agree on quarantines"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=2)))


def _alone(mine: object) -> list[object]:
    return [mine]


def test_an_endless_dataset_has_no_length(sampler):
    with pytest.raises(TypeError):
        len(PatchDataset(sampler, 4))
