"""A file that one process at a time holds: a run's folder, a study's cell, a store's tables."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pathfm.runtime import PathfmError

LOCK = ".lock"
"""Its name in a folder that one process works in: there while it does, and after it was killed; empty."""

_AGAIN_S = 0.1
_TAKEN = (errno.EAGAIN, errno.EACCES)


class HeldError(PathfmError):
    """Another process holds the file."""


@contextmanager
def locked(path: Path, wait_s: float = 0.0, told: str = "") -> Iterator[None]:
    """Holds the lock file while this lives, and takes it away at the end.

    It goes with the process that took it, however that ends: processes that it forked do not keep
    it. A file system that knows no locks is taken as it is. Parts of one process are not kept apart.

    Raises HeldError (`told`, if given) when another process still holds it after `wait_s`, PathfmError
    when the file cannot be written.
    """
    file = _held(path, time.monotonic() + wait_s, told)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(file)


def is_locked(path: Path) -> bool:
    """Whether another process holds the file. Never ask of one that this process holds: it would be let go."""
    try:
        with path.open("r+b") as file:
            return not _lock(file.fileno())
    except OSError:
        return False


def _held(path: Path, until_s: float, told: str) -> int:
    """The file, open and locked."""
    while True:
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise PathfmError(f"{path} cannot be written: {error.strerror}") from error
        ours = _lock(file)
        if ours and _is_at(file, path):
            return file
        os.close(file)  # another's, or one that went with its process just now
        if not ours:
            if time.monotonic() >= until_s:
                raise HeldError(told or f"{path}: another process holds it")
            time.sleep(_AGAIN_S)


def _lock(file: int) -> bool:
    """Whether it is ours now; also where no locks are known."""
    try:
        # of the process, unlike flock's, which forked children would go on holding
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _TAKEN
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
