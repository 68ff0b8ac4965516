"""One run folder, one run: two of them would tear each other's files."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pathfm.ranks import Ranks, together
from pathfm.runtime import PathfmError, make_folder

LOCK = ".lock"
"""In a run's folder while it runs, and after one that was killed; empty."""


@contextmanager
def only_run(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keeps every other process out of a run's folder while this lives; rank 0 holds the lock.

    It goes with the process that took it, however that ends: loader processes that it forked do not
    keep it. A file system that knows no locks is taken as it is. Raises PathfmError, on every rank,
    when another process has it; two runs of one process are not kept apart.
    """
    with ExitStack() as held:
        with together():
            if ranks.first:
                held.enter_context(locked(make_folder(folder)))
        yield


class RunningError(PathfmError):
    """Another process works in the folder."""


@contextmanager
def locked(folder: Path, verb: str = "pathfm pretrain") -> Iterator[None]:
    """Holds a folder's lock file, and takes it away at the end; RunningError where another process does."""
    path = folder / LOCK
    while True:
        try:
            file = path.open("ab")
        except OSError as error:
            raise PathfmError(f"{path} cannot be written: {error.strerror}") from error
        with file:
            _lock(file.fileno(), folder, verb)
            if not _is_at(file.fileno(), path):
                continue  # that of a run which ended just now: it took the file with it
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock file. Never of one that this process holds: it would be let go."""
    try:
        with path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    return False


def _lock(file: int, folder: Path, verb: str) -> None:
    try:
        # of the process, unlike flock's, which forked children would go on holding
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise RunningError(
                f"{folder}: another `{verb}` is running there. Wait for it or end it, or "
                "choose another --out"
            ) from None


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
