"""How much a cache folder holds, counted by all processes together, and what goes when it is full."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHARDS = 256
_TABLE = struct.Struct(f"<{SHARDS}QQ")  # bytes in each shard, and the one to look at next
_BLOCK_BYTES = 4096
_LOOK_AT_FILES = 2048
_ROOM = 16  # evicting goes on until this part of the limit is free
_LEFT_BEHIND_S = 3600.0  # a file that was never renamed, of a process that was killed


def on_disk(size_bytes: int) -> int:
    """What a file takes: whole blocks."""
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class _Kept:
    used_at: float
    path: str
    size_bytes: int
    shard: int


class Usage:
    """The bytes of each shard of a cache, in one small file that its processes lock in turn.

    Room is counted before a file is written, so a crash counts too much, never too little; looking
    through a shard to evict from it counts it anew. OSError where the disk refuses.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.evicted = 0
        self._handle, self._pid = -1, 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def room(self, shard: int, size_bytes: int) -> Iterator[bool]:
        """A block in which a file of that size may be written; False when others keep the lock too long.

        It is written under the lock: what is looked through meanwhile would else miss it.
        """
        with self._lock, self._turn() as mine:
            if mine:
                table = self._load()
                if sum(table[:SHARDS]) + size_bytes > self.limit_bytes:
                    self._evict(table, size_bytes)
                table[shard] += size_bytes
                os.pwrite(self._handle, _TABLE.pack(*table), 0)
            yield mine

    @contextlib.contextmanager
    def _turn(self) -> Iterator[bool]:
        """The lock between processes, or False after some milliseconds: a tile is not worth waiting for."""
        if self._pid != os.getpid():  # a fork's copy would share its parent's lock
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._handle = os.open(self.folder / "usage", flags, 0o600)
            self._pid = os.getpid()
        for _ in range(8):
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.0005)
            else:
                break
        else:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_UN)

    def _load(self) -> list[int]:
        """The table; counted from the files where it is missing or torn."""
        data = os.pread(self._handle, _TABLE.size + 1, 0)
        if len(data) == _TABLE.size:
            table = list(_TABLE.unpack(data))
            if max(table) < 2**56:
                return table
        os.ftruncate(self._handle, 0)
        counted = [sum(kept.size_bytes for kept in self._files(shard)) for shard in range(SHARDS)]
        return [*counted, 0]

    def _evict(self, table: list[int], wanted: int) -> None:
        """Remove the longest unused of some shards, an eighth at a time, until there is room again."""
        goal = self.limit_bytes - self.limit_bytes // _ROOM - wanted
        idle = 0
        while sum(table[:SHARDS]) > goal and idle < SHARDS:
            looked_at = self._look(table)
            looked_at.sort(key=lambda kept: kept.used_at)
            idle = 0 if looked_at else SHARDS
            for kept in looked_at[: -(-len(looked_at) // 8)]:
                if sum(table[:SHARDS]) <= goal:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(kept.path)
                table[kept.shard] = max(0, table[kept.shard] - kept.size_bytes)
                self.evicted += 1

    def _look(self, table: list[int]) -> list[_Kept]:
        """The files of the next shards, enough to tell old from new; counts these shards anew."""
        found: list[_Kept] = []
        for _ in range(SHARDS):
            shard = table[SHARDS] % SHARDS
            table[SHARDS] = shard + 1
            files = list(self._files(shard))
            table[shard] = sum(kept.size_bytes for kept in files)
            found += [kept for kept in files if kept.used_at < math.inf]
            if len(found) >= _LOOK_AT_FILES:
                break
        return found

    def _files(self, shard: int) -> Iterator[_Kept]:
        with (
            contextlib.suppress(FileNotFoundError),
            os.scandir(self.folder / f"{shard:02x}") as all_of_it,
        ):
            for entry in all_of_it:
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    stat = entry.stat(follow_symlinks=False)
                    used_at = stat.st_mtime
                    if entry.name.startswith("."):  # being written: counted, and left alone
                        if time.time() - used_at > _LEFT_BEHIND_S:
                            os.unlink(entry.path)
                            continue
                        used_at = math.inf
                    yield _Kept(used_at, entry.path, on_disk(stat.st_size), shard)
