"""The cache of tiles on disk: right or absent, bounded, shared, and never in the way."""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from online_patching import errors
from online_patching.stores import disk_usage
from online_patching.stores.disk_cache import DiskCache, identity
from online_patching.stores.disk_usage import on_disk

MIB = 2**20
TILE = bytes(range(256)) * 80


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "usage"]


def held(folder: Path) -> int:
    return sum(on_disk(path.stat().st_size) for path in files_of(folder))


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 4 * MIB)


def test_what_was_put_is_got_by_its_object_version_and_range_alone(cache: DiskCache) -> None:
    cache.put("s3://b/a", "v1", 100, 100 + len(TILE), TILE)
    assert cache.get("s3://b/a", "v1", 100, 100 + len(TILE)) == TILE
    assert cache.get("s3://b/a", "v2", 100, 100 + len(TILE)) is None
    assert cache.get("s3://b/c", "v1", 100, 100 + len(TILE)) is None
    assert cache.get("s3://b/a", "v1", 101, 101 + len(TILE)) is None
    assert (cache.counts.hits, cache.counts.misses, cache.counts.written) == (1, 3, 1)
    again = pickle.loads(pickle.dumps(cache))
    assert again.get("s3://b/a", "v1", 100, 100 + len(TILE)) == TILE


def test_an_object_without_a_version_is_not_kept(cache: DiskCache) -> None:
    cache.put("s3://b/a", "", 0, len(TILE), TILE)
    assert cache.get("s3://b/a", "", 0, len(TILE)) is None
    assert not cache.folder.exists()


def test_bytes_that_are_not_the_range_are_not_kept(cache: DiskCache) -> None:
    cache.put("s3://b/a", "v1", 0, 10, TILE)
    assert cache.get("s3://b/a", "v1", 0, 10) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://h/a?X-Amz-Signature=1&X-Amz-Date=2", "https://h/a?X-Amz-Signature=3", True),
        ("https://h/a?sv=1&sig=2&se=3&sp=r&sr=c", "https://h/a?sv=1&sig=9", True),
        ("https://h/a?Expires=1&Signature=2&Key-Pair-Id=3", "https://h/a", True),
        ("https://me:secret@h/a", "https://h/a", True),
        ("https://h/a?id=1", "https://h/a?id=2", False),
        (
            "https://h/a?st=1&sp=2",
            "https://h/a?st=2&sp=2",
            False,
        ),  # Azure's names, and no signature
        ("https://h/a?id=1&sig=2", "https://h/a?id=1", True),
        ("s3://b/a?versionId=1", "s3://b/a?versionId=2", False),
        ("https://h/a#x", "https://h/a", True),
    ],
)
def test_an_object_signed_anew_is_the_same_object(one: str, other: str, same: bool) -> None:
    assert (identity(one) == identity(other)) is same


def test_no_name_or_secret_is_written(cache: DiskCache) -> None:
    cache.put("https://u:hunter2@h/patient-7.svs?token=s3cret", '"e"', 0, len(TILE), TILE)
    for path in cache.folder.rglob("*"):
        assert "patient" not in path.name
        data = path.read_bytes() if path.is_file() else b""
        assert b"hunter2" not in data
        assert b"s3cret" not in data
        assert b"patient" not in data
        assert path.stat().st_mode & 0o077 == 0


def test_the_longest_unused_goes_first_and_the_bound_holds(cache: DiskCache) -> None:
    size = 20_000
    for i in range(120):
        cache.put("s3://b/a", "v", i * size, (i + 1) * size, bytes([i]) * size)
        for path in files_of(
            cache.folder
        ):  # older by a second each step, the first ones kept fresh
            stat = path.stat()
            os.utime(path, (stat.st_atime - 10, stat.st_mtime - 10))
        if i % 10 == 0:
            for first in range(20):
                cache.get("s3://b/a", "v", first * size, (first + 1) * size)
    for i in range(120, 400):
        cache.put("s3://b/a", "v", i * size, (i + 1) * size, bytes([i % 256]) * size)
        if i % 10 == 0:
            assert held(cache.folder) <= cache.limit_bytes
    kept = [i for i in range(400) if cache.get("s3://b/a", "v", i * size, (i + 1) * size)]
    assert held(cache.folder) > 0.8 * cache.limit_bytes
    assert cache.counts.evicted > 100
    assert not {*range(20, 100)} & {*kept}  # long unused
    assert {399, 398, 397} <= {*kept}


@pytest.mark.parametrize("change", ["cut", "longer", "flip", "header", "empty", "swap"])
def test_a_torn_file_is_never_returned(cache: DiskCache, change: str) -> None:
    cache.put("s3://b/a", "v", 0, len(TILE), TILE)
    (path,) = files_of(cache.folder)
    data = path.read_bytes()
    if change == "swap":  # another range's file under this one's name
        cache.put("s3://b/a", "v", 7, 7 + len(TILE), TILE[::-1])
        data = next(p for p in files_of(cache.folder) if p != path).read_bytes()
    broken = {
        "cut": data[:-1],
        "longer": data + b"x",
        "flip": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "header": b"OPC2" + data[4:],
        "empty": b"",
        "swap": data,
    }
    path.write_bytes(broken[change])
    assert cache.get("s3://b/a", "v", 0, len(TILE)) is None
    assert cache.counts.damaged == 1
    assert not path.exists()
    cache.put("s3://b/a", "v", 0, len(TILE), TILE)
    assert cache.get("s3://b/a", "v", 0, len(TILE)) == TILE


WRITER = """
import random, sys
from online_patching.stores.disk_cache import DiskCache
cache = DiskCache(sys.argv[1], int(sys.argv[2]))
dice = random.Random(int(sys.argv[3]))
print("up", flush=True)
sys.stdout = None
for _ in range(int(sys.argv[4])):
    i = dice.randrange(300)
    body = bytes([i % 251]) * (5000 + i)
    found = cache.get("s3://b/a", "v", i, i + len(body))
    assert found is None or found == body, i
    if found is None:
        cache.put("s3://b/a", "v", i, i + len(body), body)
"""


def start_writer(folder: Path, limit: int, seed: int, turns: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), folder, limit, seed, turns]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.stdout.close()
    return process


@pytest.mark.slow
def test_several_processes_share_a_folder_and_its_bound(tmp_path: Path) -> None:
    limit, most = MIB, 0
    writers = [start_writer(tmp_path, limit, seed, 600) for seed in range(3)]
    while any(writer.poll() is None for writer in writers):
        try:
            most = max(most, held(tmp_path))
        except FileNotFoundError:
            continue  # one was evicted while we looked
        time.sleep(0.005)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert 0.5 * limit < most <= limit


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_a_cache_that_is_right(tmp_path: Path) -> None:
    dice = random.Random(0)
    for seed in range(2):
        writer = start_writer(tmp_path, MIB, seed, 10**6)
        time.sleep(0.05 + dice.random() / 10)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    cache = DiskCache(tmp_path, MIB)
    hits = 0
    for i in range(300):
        body = bytes([i % 251]) * (5000 + i)
        found = cache.get("s3://b/a", "v", i, i + len(body))
        assert found in (None, body)
        hits += found is not None
    assert hits
    for i in range(1000, 1400):
        cache.put("s3://b/a", "v", i, i + 9000, bytes(9000))
    assert held(tmp_path) <= MIB


def test_a_half_written_file_of_a_dead_process_is_cleared_away(cache: DiskCache) -> None:
    cache.put("s3://b/a", "v", 0, len(TILE), TILE)
    (path,) = files_of(cache.folder)
    left = path.parent / ".999-7f-1"
    left.write_bytes(b"half")
    old = time.time() - 2 * disk_usage._LEFT_BEHIND_S
    os.utime(left, (old, old))
    for i in range(400):
        cache.put("s3://b/a", "v", i, i + 20_000, bytes(20_000))
    assert not left.exists()


@pytest.mark.parametrize("what", ["full", "not a folder"])
def test_a_disk_that_refuses_costs_one_warning(
    cache: DiskCache, what: str, monkeypatch, caplog, tmp_path
) -> None:
    cache.put("s3://b/a", "v", 0, len(TILE), TILE)
    if what == "full":
        monkeypatch.setattr(os, "rename", refuse)
    else:
        (tmp_path / "file").write_bytes(b"")
        cache = DiskCache(tmp_path / "file" / "cache", 4 * MIB)
    with caplog.at_level(logging.WARNING):
        for i in range(1, 20):
            cache.put("s3://b/a", "v", i, i + len(TILE), TILE)
            cache._paused_until -= 40  # as if time passed
    assert len(caplog.records) == 1
    assert "reading goes on without" in caplog.text
    assert cache.counts.skipped == 19
    assert cache.get("s3://b/a", "v", 1, 1 + len(TILE)) is None
    if what == "full":
        assert cache.get("s3://b/a", "v", 0, len(TILE)) == TILE
        assert len(files_of(cache.folder)) == 1
        monkeypatch.undo()
        cache._paused_until = 0.0
        cache.put("s3://b/a", "v", 1, 1 + len(TILE), TILE)
        assert cache.get("s3://b/a", "v", 1, 1 + len(TILE)) == TILE


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_usage_file_that_is_torn_is_counted_anew(cache: DiskCache) -> None:
    for i in range(100):
        cache.put("s3://b/a", "v", i, i + 20_000, bytes(20_000))
    (cache.folder / "usage").write_bytes(b"torn")
    again = DiskCache(cache.folder, cache.limit_bytes)
    for i in range(100, 400):
        again.put("s3://b/a", "v", i, i + 20_000, bytes(20_000))
    for i in range(400, 420):
        again.put("s3://b/a", "v", i, i + 20_000, bytes(20_000))
        assert held(cache.folder) <= cache.limit_bytes


def test_a_cache_that_is_deleted_meanwhile_starts_again(cache: DiskCache) -> None:
    import shutil

    cache.put("s3://b/a", "v", 0, len(TILE), TILE)
    shutil.rmtree(cache.folder)
    assert cache.get("s3://b/a", "v", 0, len(TILE)) is None
    cache.put("s3://b/a", "v", 0, len(TILE), TILE)
    assert cache.get("s3://b/a", "v", 0, len(TILE)) == TILE


def test_threads_share_one_cache(cache: DiskCache) -> None:
    wrong = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(200):
            i = dice.randrange(60)
            body = bytes([i]) * 9000
            found = cache.get("s3://b/a", "v", i, i + 9000)
            if found not in (None, body):
                wrong.append(i)
            cache.put("s3://b/a", "v", i, i + 9000, body)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.counts.hits > 400


def test_a_bound_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.StoreError, match="too small to be of use"):
        DiskCache(tmp_path, 1000)
