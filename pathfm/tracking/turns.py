"""Processes that open one sqlite store take turns: MLflow makes its tables without asking who else does."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LONGEST_S = 60.0  # making the tables takes seconds
_AGAIN_S = 0.05


@contextmanager
def own_turn(database: Path) -> Iterator[None]:
    """Keeps other processes from opening the database while this lives, by a file beside it.

    `.NAME.lock` is taken away at the end. Where none can be written or locked, or another process
    holds it for a minute, it goes on without. Threads of one process are not kept apart.
    """
    path = database.with_name(f".{database.name}.lock")
    file = _held(path, time.monotonic() + _LONGEST_S)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink()
            os.close(file)


def _held(path: Path, until_s: float) -> int | None:
    """The lock file, open and locked, or None."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError:
            return None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except OSError as error:
            # gone: the one before took it away just now
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.ENOENT):
                until_s = 0.0
        os.close(file)
        if time.monotonic() > until_s:
            return None
        time.sleep(_AGAIN_S)
