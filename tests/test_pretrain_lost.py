"""Never lost: whatever ends a run, the same command goes on, and ends where the undisturbed one does."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from online_patching import Corpus, ForegroundMask, PatchLoader, read_slide_index
from online_patching.errors import FailureBudgetError, StoreError
from pathfm.backbone import load_backbone
from pathfm.checkpoint import load_newest
from pathfm.methods.dino import Dino
from pathfm.pretrain import run
from pathfm.pretrain.rows_log import read_rows
from pathfm.pretrain.sampler import sampler_of
from pathfm.runtime import PathfmError, save_config
from tests.lives import Nursery
from tests.pretraining import assert_same_run, config, losses

KILLS = 20


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def rows(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_kill_9_at_twenty_random_points_changes_nothing(small_corpus, tmp_path, nursery):
    changes: dict[str, Any] = {"steps": 30, "checkpoint_every_steps": 2, "batch_size": 2}
    whole = tmp_path / "whole"
    log = tmp_path / "whole.log"
    given = save_config(config(small_corpus, whole, **changes), tmp_path, "whole.yaml")
    assert nursery.ended(nursery.start(given, log)) == 0, log.read_text()
    times_ms = [row["time_ms"] for row in read_rows(whole / "metrics.jsonl")]
    step_s = (times_ms[-1] - times_ms[0]) / 1000 / len(times_ms)  # checkpoints among it
    chance, kills, steps_at = random.Random(6), 0, []
    for number in range(KILLS):
        out, log = tmp_path / f"killed{number}", tmp_path / f"killed{number}.log"
        given = save_config(config(small_corpus, out, **changes), tmp_path, f"{number}.yaml")
        while True:
            whole_before = (out / "summary.json").exists()  # and was killed before it could exit
            # some steps further than the life before came (0: while it starts), and anywhere in one
            pid, until = nursery.start(given, log), rows(out) + chance.randint(0, 4)
            if not whole_before:
                while rows(out) < until and not (out / "summary.json").exists():
                    time.sleep(0.002)
                time.sleep(chance.uniform(0, 3 * step_s))
                os.kill(pid, signal.SIGKILL)
            code = nursery.ended(pid)
            if code != -signal.SIGKILL:
                break
            kills += 1
            steps_at.append(rows(out))
        assert code == 0, log.read_text()
        assert_same_run(out, whole)
        if kills >= KILLS:
            break
    assert kills >= KILLS
    assert len(set(steps_at)) > KILLS // 3  # they did come at many different steps


def test_a_full_disk_stops_in_a_line_and_nothing_is_lost(small_corpus, tmp_path, monkeypatch):
    """Every file of the run in turn is refused; each time the next life goes on."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    changes: dict[str, Any] = {"steps": 8, "checkpoint_every_steps": 2}
    run(config(small_corpus, whole, **changes))
    refused = []

    def full(name: str) -> None:
        def refuse(*arguments: object, **named: object) -> None:
            refused.append(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        # a module of its own: the true one is everybody's
        mine = SimpleNamespace(fsync=refuse) if name.endswith(".os") else refuse
        monkeypatch.setattr(name, mine)
        with pytest.raises(PathfmError, match=r"No space left on device.*(Free space|free)"):
            run(config(small_corpus, out, **changes))
        monkeypatch.undo()

    run(config(small_corpus, out, stop_after_steps=2, **changes))
    for name in ("save_file", "_sync", "atomic_write_text"):
        full(f"pathfm.checkpoint.{name}")
        assert load_newest(out / "checkpoints") is not None
    full("pathfm.pretrain.rows_log.os")
    assert len(refused) >= 4
    assert run(config(small_corpus, out, **changes)).finished
    assert_same_run(out, whole)


@pytest.mark.slow
def test_a_disk_that_really_is_full_stops_the_run_and_the_next_goes_on(
    small_corpus, tmp_path, nursery
):
    """A tmpfs of 24 MB, filled up; freed, the run ends as the undisturbed one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=24m tmpfs {disk} 2>/dev/null"):
        pytest.skip("no tmpfs can be mounted here")
    try:
        changes: dict[str, Any] = {"steps": 8, "checkpoint_every_steps": 2}
        whole, out, log = tmp_path / "whole", disk / "run", tmp_path / "log"
        run(config(small_corpus, whole, **changes))
        run(config(small_corpus, out, stop_after_steps=4, **changes))
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(free - 2**20))
        given = save_config(config(small_corpus, out, **changes), tmp_path, "given.yaml")
        assert nursery.ended(nursery.start(given, log)) == 2
        (line,) = [row for row in log.read_text().splitlines() if row.startswith("error:")]
        assert "No space left on device" in line
        (disk / "filler").unlink()
        assert nursery.ended(nursery.start(given, log)) == 0, log.read_text()
        assert_same_run(out, whole)
    finally:
        os.system(f"umount {disk}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_so_in_the_exit_code(
    small_corpus, tmp_path, monkeypatch, number
):
    out, whole = tmp_path / "run", tmp_path / "whole"
    run(config(small_corpus, whole))
    true_loss = Dino.loss

    def told_in_step_2(self, micro):
        if micro.step == 2:
            os.kill(os.getpid(), number)
        return true_loss(self, micro)

    monkeypatch.setattr(Dino, "loss", told_in_step_2)
    before = signal.getsignal(number)
    result = run(config(small_corpus, out, checkpoint_every_steps=100))
    assert (result.finished, result.steps, result.exit_code) == (False, 3, 128 + number)
    assert signal.getsignal(number) is before
    saved = load_newest(out / "checkpoints")
    assert saved is not None
    assert (saved.step, len(losses(out))) == (3, 3)
    monkeypatch.undo()
    result = run(config(small_corpus, out, checkpoint_every_steps=100))
    assert (result.finished, result.exit_code) == (True, 0)
    assert_same_run(out, whole)


def test_a_second_ctrl_c_interrupts_at_once_but_not_the_same_passed_on_by_a_launcher(
    monkeypatch, capfd
):
    from pathfm.pretrain import stopping

    clock_s = 100.0
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: clock_s))
    with stopping.listening() as told:
        os.kill(os.getpid(), signal.SIGINT)
        assert told.number == signal.SIGINT
        assert "Ctrl-C again" in capfd.readouterr().err
        clock_s += 0.05
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's
        clock_s += 5.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_a_run_that_cannot_begin_leaves_no_folder_of_its_own(small_corpus, tmp_path):
    missing, made = tmp_path / "missing", tmp_path / "made"
    made.mkdir()
    for out in (missing, made):
        with pytest.raises(PathfmError, match="no such file"):
            run(config(small_corpus, out, weights=str(tmp_path / "no.safetensors")))
    assert not missing.exists()
    assert made.is_dir()


def _corpus(folder: Path, slides: list[Path]) -> Path:
    for path in slides:
        index = read_slide_index(str(path))
        index.save(folder / "slides" / f"{index.slide_id}.index")
        ForegroundMask.everything(index).save(folder / "masks" / f"{index.slide_id}.png")
    Corpus.build(folder)
    return folder


@pytest.mark.parametrize("how", ["vanishes", "is replaced"])
def test_a_slide_that_is_lost_in_mid_run_is_replaced_draw_by_draw_and_named(
    small_slides, tmp_path, how
):
    """Its draws take their next attempt, in the life that loses it as in one that never had it."""
    runs = {}
    for name in ("once", "again"):
        slides = [tmp_path / name / path.name for path in small_slides[:2]]
        slides[0].parent.mkdir()
        for slide, source in zip(slides, small_slides, strict=False):
            shutil.copy2(source, slide)
        corpus, out = _corpus(tmp_path / f"corpus_{name}", slides), tmp_path / f"run_{name}"
        runs[name] = out
        run(config(corpus, out, stop_after_steps=3))
        lost = slides[1]
        if how == "vanishes":
            lost.unlink()
        else:
            shutil.copy2(small_slides[0], lost)  # another slide of that name, the index is the old
        if name == "once":
            assert run(config(corpus, out)).finished
            continue
        for stop in (4, 5, 6):  # stopped after every step: the ledger goes through checkpoints
            run(config(corpus, out, stop_after_steps=stop))
    assert_same_run(runs["once"], runs["again"])
    failed = read_rows(runs["once"] / "failures.jsonl")
    sampled = read_rows(runs["once"] / "sampled.jsonl")
    lost_id = failed[0]["slide_id"]
    assert {row["slide_id"] for row in failed} == {lost_id}
    assert min(row["draw"] for row in failed) >= 12
    assert lost_id in {row["slide_id"] for row in sampled[:12]}
    assert lost_id not in {row["slide_id"] for row in sampled[12:]}
    # every draw that would have been of the lost slide is named, and nothing else
    whole = config(tmp_path / "corpus_once", tmp_path / "x")
    sampler = sampler_of(whole, Corpus.open(whole.corpus))
    wanted = [draw for draw in range(12, 24) if sampler[draw].slide_id == lost_id]
    assert sorted({row["draw"] for row in failed}) == wanted
    assert json.loads((runs["once"] / "summary.json").read_text())["replaced_draws"] == len(failed)


@pytest.mark.parametrize("window_draws", [2**16, pytest.param(16, marks=pytest.mark.slow)])
def test_a_run_that_loses_one_of_two_slides_equals_one_in_which_it_was_barred_at_that_step(
    small_slides, tmp_path, monkeypatch, capfd, window_draws
):
    """Half of the draws, with the loader's own budget; in a small window up to the quarantine and past it."""
    from pathfm.pretrain import feed

    slides = [Path(shutil.copy2(path, tmp_path / path.name)) for path in small_slides[:2]]
    corpus, out, barred = (
        _corpus(tmp_path / "corpus", slides),
        tmp_path / "out",
        tmp_path / "barred",
    )
    changes: dict[str, Any] = {
        "steps": 30,
        "monitor_patches": 128,  # more of them are lost than a budget of theirs would bear
        "loader": {"window_draws": window_draws},
    }
    run(config(corpus, out, stop_after_steps=10, **changes))
    shutil.copytree(out, barred)
    lost = slides[1]
    kept = lost.rename(tmp_path / "kept")
    run(config(corpus, out, stop_after_steps=25, **changes))
    lost_id = read_rows(out / "failures.jsonl")[0]["slide_id"]
    told = f"WARNING slide {lost_id} is lost, its draws are replaced, first "
    assert capfd.readouterr().out.count(told) == 1
    assert run(config(corpus, out, **changes)).finished  # in a life that never saw the slide
    left_out = f"{lost_id} is not read any more since draw 80: too many failed"
    assert (left_out in capfd.readouterr().out) == (window_draws == 16)

    kept.rename(lost)
    sampler = sampler_of(config(corpus, out, **changes), Corpus.open(corpus))
    load = feed._SlideFeed.load_state_dict
    row = sampler.corpus.slide_ids.index(lost_id)

    def with_the_slide_barred(self: Any, state: dict[str, Any]) -> None:
        load(self, state | {"quarantined": [[lost_id, row, 40, {}]]})

    monkeypatch.setattr(feed._SlideFeed, "load_state_dict", with_the_slide_barred)
    assert run(config(corpus, barred, **changes)).finished
    assert losses(out) == losses(barred)
    assert (out / "sampled.jsonl").read_bytes() == (barred / "sampled.jsonl").read_bytes()
    mine, theirs = (load_backbone("", str(folder)).digest for folder in (out, barred))
    assert mine == theirs
    assert read_rows(barred / "failures.jsonl") == []
    failed = read_rows(out / "failures.jsonl")
    until = 80 if window_draws == 16 else 120
    wanted = [draw for draw in range(40, until) if sampler[draw].slide_id == lost_id]
    assert len(wanted) > 0.05 * 120
    assert sorted({row["draw"] for row in failed}) == wanted
    assert {(row["slide_id"], row["reason"].partition(":")[0]) for row in failed} == {
        (lost_id, "ObjectNotFoundError")
    }


def test_damage_ends_a_run_with_a_remedy_that_works(small_slides, tmp_path):
    """Tiles overwritten in place, size and time as they were: they do not decode."""
    slides = [Path(shutil.copy2(path, tmp_path / path.name)) for path in small_slides[:2]]
    corpus, out = _corpus(tmp_path / "corpus", slides), tmp_path / "out"
    run(config(corpus, out, stop_after_steps=2))
    was = slides[1].stat()
    with slides[1].open("r+b") as file:
        file.seek(was.st_size // 10)
        file.write(bytes(was.st_size * 8 // 10))
    os.utime(slides[1], ns=(was.st_atime_ns, was.st_mtime_ns))
    with pytest.raises(FailureBudgetError, match=r"TileDecodeError.*--loader.max_failed_fraction"):
        run(config(corpus, out))
    assert run(config(corpus, out, loader={"max_failed_fraction": 1.0})).finished


def test_a_store_that_goes_away_stops_the_run_after_the_step_it_was_in(
    small_corpus, tmp_path, monkeypatch
):
    """What was learnt is saved, although no checkpoint was due; the next life goes on from there."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    run(config(small_corpus, whole))
    true_next = PatchLoader.next_batch

    def gone(self: PatchLoader) -> Any:
        if self.batch_size == 4 and self.next_draw == 12:
            self.close()
            raise StoreError("s3://bucket/a.svs", "no answer after 5 tries")
        return true_next(self)

    monkeypatch.setattr(PatchLoader, "next_batch", gone)
    with pytest.raises(StoreError, match="no answer"):
        run(config(small_corpus, out, checkpoint_every_steps=100))
    saved = load_newest(out / "checkpoints")
    assert saved is not None
    assert saved.step == 3
    monkeypatch.undo()
    run(config(small_corpus, out, checkpoint_every_steps=100))
    assert_same_run(out, whole)
