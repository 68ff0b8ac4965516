"""Checkpoints: what is saved comes back, what is damaged or half-written is never trusted."""

import logging

import pytest
import torch

from pathfm.checkpoint import (
    digest_of,
    load_checkpoint,
    load_newest,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from pathfm.runtime import PathfmError


def save(root, step, keep_last=3, **more):
    tensors = {"student.w": torch.full((2, 3), float(step)), "criterion.center": torch.zeros(1, 4)}
    return save_checkpoint(root, step, tensors, {"run_id": "abc"}, keep_last=keep_last, **more)


def test_tensors_and_state_come_back(tmp_path):
    path = save(tmp_path, 7)
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.state["run_id"], loaded.path) == (7, "abc", path)
    assert torch.equal(loaded.tensors["student.w"], torch.full((2, 3), 7.0))
    assert (tmp_path / "last").read_text().strip() == path.name
    assert len(digest_of(path)) == 64


def test_no_checkpoint_is_none(tmp_path):
    assert load_newest(tmp_path / "missing") is None


def test_the_newest_are_kept_by_step_not_by_time(tmp_path):
    for step in (2, 10, 100, 30):
        save(tmp_path, step, keep_last=2)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["last", "step_00000030", "step_00000100"]


def _truncate(path):
    data = (path / "tensors.safetensors").read_bytes()
    (path / "tensors.safetensors").write_bytes(data[:-5])


def _flip(path):
    data = bytearray((path / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(data)


def _lose(path):
    (path / "state.json").unlink()


def _lose_sums(path):
    (path / "checksums.json").unlink()


def _spoil_sums(path):
    (path / "checksums.json").write_text("[1")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, "bytes"),
        (_flip, "other bytes"),
        (_lose, "state.json is missing"),
        (_lose_sums, "checksums.json is missing"),
        (_spoil_sums, "cannot be read"),
    ],
)
def test_a_damaged_newest_is_skipped_with_a_warning(tmp_path, caplog, damage, words):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    damage(newest)
    with caplog.at_level(logging.WARNING):
        loaded = load_newest(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert words in caplog.text
    with pytest.raises(PathfmError, match="damaged"):
        load_checkpoint(newest)


def test_a_damaged_checkpoint_is_replaced_when_the_run_gets_there_again(tmp_path):
    _flip(save(tmp_path, 2))
    save(tmp_path, 2)
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert loaded.step == 2


def test_a_save_that_fails_half_way_leaves_the_one_before(tmp_path):
    save(tmp_path, 1)

    def full_disk(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(PathfmError, match="No space left"):
        save(tmp_path, 2, write_more=full_disk)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step_00000001"]


def test_an_unfinished_folder_is_never_loaded_and_swept_by_the_next_save(tmp_path):
    (tmp_path / ".unfinished-step_00000009").mkdir()
    assert load_newest(tmp_path) is None
    save(tmp_path, 10)
    assert not list(tmp_path.glob(".unfinished*"))


def test_files_the_caller_adds_are_checked_too(tmp_path):
    path = save(tmp_path, 1, write_more=lambda folder: (folder / "more").write_text("x") and None)
    assert load_newest(tmp_path) is not None
    (path / "more").write_text("y")
    assert load_newest(tmp_path) is None


def test_an_optimizer_continues_bit_for_bit(tmp_path):
    def train(weight, optimizer, steps):
        for step in steps:
            ((weight - step) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        weight = torch.nn.Parameter(torch.arange(5.0))
        return weight, torch.optim.AdamW([weight], lr=0.1, weight_decay=0.3)

    weight, optimizer = fresh()
    train(weight, optimizer, range(3))
    packed, groups = pack_optimizer(optimizer)
    state = {"groups": groups}
    save_checkpoint(tmp_path, 3, {"w": weight, **packed}, state, keep_last=1)
    train(weight, optimizer, range(3, 6))

    again, resumed = fresh()
    loaded = load_newest(tmp_path)
    assert loaded is not None
    with torch.no_grad():
        again.copy_(loaded.tensors["w"])
    unpack_optimizer(resumed, loaded.tensors, loaded.state["groups"])
    train(again, resumed, range(3, 6))
    assert torch.equal(again, weight)


def test_a_rank_that_keeps_nothing_still_takes_part_in_every_tensor():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights)
    sum((w**2).sum() for w in weights).backward()
    optimizer.step()
    asked = {True: [], False: []}
    packed = {
        keep: pack_optimizer(optimizer, lambda t, to=asked[keep]: to.append(t) or t, keep=keep)
        for keep in asked
    }
    assert len(packed[True][0]) == len(asked[True]) == 6  # two moments and a count, twice
    assert [id(t) for t in asked[False]] == [id(t) for t in asked[True]]
    assert packed[False] == ({}, packed[True][1])


def test_retention_keeps_the_one_just_written_and_counts_no_damaged_ones(tmp_path):
    for step in (1, 2, 4, 5):
        save(tmp_path, step)
    for step in (4, 5):
        (tmp_path / f"step_{step:08d}" / "tensors.safetensors").write_bytes(b"cut")
    save(tmp_path, 3, keep_last=2)
    kept = {path.name for path in tmp_path.glob("step_*")}
    assert kept == {"step_00000003", "step_00000002"}
    assert load_newest(tmp_path).step == 3


class Killed(BaseException):
    """What `kill -9` looks like from inside: nothing is caught, nothing is cleaned up."""


def test_a_kill_between_any_two_file_operations_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Every write, sync, rename and deletion of a save is in turn the last that happens."""
    import os
    import shutil
    from pathlib import Path

    from pathfm import checkpoint

    left = [0]
    calls = (
        (checkpoint, "save_file"),
        (checkpoint, "_sync"),
        (checkpoint, "atomic_write_text"),
        (shutil, "rmtree"),
        (Path, "write_text"),
        (Path, "mkdir"),
        (Path, "rename"),
        (os, "rmdir"),
    )

    def until_killed(true):
        def call(*given, **named):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return true(*given, **named)

        return call

    kills = 0
    for after in range(1, 200):
        root = tmp_path / str(after)
        for step in (1, 2, 3):
            save(root, step, keep_last=2)
        left[0] = after
        with monkeypatch.context() as patched:
            for owner, name in calls:
                patched.setattr(owner, name, until_killed(getattr(owner, name)))
            try:
                save(root, 4, keep_last=2)
            except Killed:
                kills += 1
            else:
                break
        found = load_newest(root)
        assert found is not None
        assert found.step in (3, 4)
        assert torch.equal(found.tensors["student.w"], torch.full((2, 3), float(found.step)))
        save(root, 4, keep_last=2)  # the next life gets there too
        assert load_newest(root).step == 4
        assert sorted(p.name for p in root.iterdir()) == ["last", "step_00000003", "step_00000004"]
    assert kills > 12


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "checksums.json"])
def test_a_file_torn_at_any_byte_is_noticed(tmp_path, name):
    save(tmp_path, 1)
    torn = save(tmp_path, 2) / name
    data = torn.read_bytes()
    for size in sorted({0, 1, 7, len(data) // 2, len(data) - 1}):
        torn.write_bytes(data[:size])
        assert load_newest(tmp_path).step == 1, size
        zeroed = data[:size] + bytes(len(data) - size)  # what a power cut may leave of a file's end
        torn.write_bytes(zeroed)
        assert zeroed == data or load_newest(tmp_path).step == 1, size
    torn.write_bytes(data)
    assert load_newest(tmp_path).step == 2
