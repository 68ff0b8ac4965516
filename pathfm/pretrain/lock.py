"""One run folder, one run: two of them would tear each other's files."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from pathfm.ranks import Ranks, together
from pathfm.runtime import PathfmError, make_folder

LOCK = ".lock"
"""In a run's folder, empty; it stays there, for a file that goes could be locked by two."""


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
                held.enter_context(_locked(make_folder(folder)))
        yield


def _locked(folder: Path) -> BinaryIO:
    """The lock file, which is ours as long as it is open."""
    path = folder / LOCK
    try:
        file = path.open("ab")
    except OSError as error:
        raise PathfmError(f"{path} cannot be written: {error.strerror}") from error
    try:
        # of the process, unlike flock's, which forked children would go on holding
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.close()
            raise PathfmError(
                f"{folder}: another `pathfm pretrain` is running there. Wait for it or end it, or "
                "choose another --out"
            ) from None
    return file
