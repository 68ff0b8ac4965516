"""index.journal: what is known of every slide of a corpus folder, one JSON line each, appended.

A slide's line is written when its .index file is on disk, so that whatever ends a run (kill -9 too), the
next one finds what is done. The first lines are the corpus as the last finished run left it; what follows
them belongs to a run that has not finished. At its end a run writes the whole journal anew, atomically.

    {"journal": 1, "committed": 2, ...}                          first: of which form it is
    {"uri": ..., "token": ..., "slide_id": ..., ...}             a usable slide, with its row of the table
    {"uri": ..., "token": ..., "code": ..., "reason": ...}       a refused one
    {"void": "a"}                                                a.index is about to be replaced

A corpus folder is one run's at a time: the file `index.unfinished` is locked by it, and is left behind
by one that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from online_patching.slide_index import INDEX_MAGIC
from pathfm import __version__
from pathfm.runtime import INDEX_UNFINISHED, PathfmError

JOURNAL = "index.journal"
_FORM = 1
_RULES = 1
"""Raised when indexing makes something else of the same slides: then they are all read again."""
_SYNC_EVERY_S = 10.0

Record = dict[str, Any]


class Known(NamedTuple):
    """What a line of the journal says, as far as it is needed to tell whether it still holds.

    `slide_id` is empty for a refused slide. `told` are the µm/px that were given for it.
    `index_bytes` is the size of its .index file; `plain` that its token is that of one object; `salt`
    marks what its ids of patients were made with.
    """

    offset: int
    told: tuple[float, float] | None
    token: str
    slide_id: str
    index_bytes: int
    plain: bool
    salt: str


class Journal:
    """The journal of a corpus folder; open it with `opened`, which locks the folder.

    `known` is by address: the URI without secrets. `damaged` counts lines that are not what they should be
    and committed ones that are gone. `committed` are the addresses of the corpus as the
    last finished run left it, in order, and where their lines are. Threads may call every method.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.known: dict[str, Known] = {}
        self.committed: dict[str, int] = {}
        self.damaged = 0
        self._lock = threading.Lock()
        self._synced_s = time.monotonic()
        self._owner: dict[str, str] = {}
        self._began_bytes = self._load()
        # kept open: every slide's line goes into it
        self._file = open(self.path, "r+b" if self._began_bytes else "w+b")  # noqa: SIM115
        self._file.truncate(self._began_bytes)  # a line that a killed run has left half-written
        self.rolled_back = False
        if not self._began_bytes:
            self._append(_header(0))
        self._file.seek(0, io.SEEK_END)

    def add(self, record: Record) -> None:
        """Remember a slide: its line is in the file (the system's, not yet the disk's) on return."""
        with self._lock:
            self._note(self._append(record), record)
            if time.monotonic() - self._synced_s > _SYNC_EVERY_S:
                os.fsync(self._file.fileno())
                self._synced_s = time.monotonic()

    def void(self, slide_id: str) -> None:
        """Forget whose file an id's is: it is about to be replaced."""
        with self._lock:
            self._append({"void": slide_id})
            self._forget(slide_id)

    def read(self, address: str) -> Record:
        """All that is remembered of a slide; of one that is not known any more, what was committed."""
        known = self.known.get(address)
        with self._lock:
            self._file.seek(self.committed[address] if known is None else known.offset)
            line = self._file.readline()
            self._file.seek(0, io.SEEK_END)
        record: Record = json.loads(line)
        return record

    def commit(self, records: Iterable[Record], count: int) -> None:
        """Make these the corpus: the journal is replaced by one of their lines, in their order."""
        name = self.path.with_name(f".{JOURNAL}.tmp")
        try:
            with open(name, "wb") as file:
                file.write(_line(_header(count)))
                file.writelines(_line(record) for record in records)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def roll_back(self) -> None:
        """Take back everything that this run has added: it changed nothing."""
        with self._lock:
            self._file.truncate(self._began_bytes)
            if not self._began_bytes:
                self.path.unlink()
            self.rolled_back = True

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _append(self, record: Record) -> int:
        at = self._file.seek(0, io.SEEK_END)
        self._file.write(_line(record))
        self._file.flush()
        return at

    def _load(self) -> int:
        """Read what is there; returns its length up to the last whole line, 0 for none of ours."""
        if not self.path.exists():
            return 0
        with open(self.path, "rb") as file:
            head = _parsed(file.readline())
            if head is None or head.get("journal") != _FORM or head.get("rules") != _RULES:
                return 0
            same_index = head.get("index") == INDEX_MAGIC.decode()
            same_version = head.get("version") == __version__
            committed = int(head.get("committed", 0))
            at = whole = file.tell()
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                record = _parsed(line)
                if record is None:
                    self.damaged += 1
                elif "void" in record:
                    self._forget(str(record["void"]))
                else:
                    if number < committed:
                        self.committed[str(record.get("uri"))] = at
                    # what an older version refused, this one may read
                    if same_index if "slide_id" in record else same_version:
                        self._note(at, record)
                at = whole = at + len(line)
            self.damaged += max(0, committed - len(self.committed))
            return whole

    def _note(self, at: int, record: Record) -> None:
        try:
            uri, slide_id = str(record["uri"]), str(record.get("slide_id", ""))
            told = record.get("told")
            known = Known(
                at,
                None if told is None else (float(told[0]), float(told[1])),
                str(record.get("token", "")),
                slide_id,
                int(record.get("index_bytes", 0)),
                bool(record.get("plain", True)),
                sys.intern(str(record.get("salt", ""))),
            )
        except (KeyError, TypeError, ValueError, IndexError):
            self.damaged += 1
            return
        self.known[uri] = known
        if slide_id:
            if self._owner.get(slide_id, uri) != uri:  # the file is the later one's
                self.known.pop(self._owner[slide_id], None)
            self._owner[slide_id] = uri

    def _forget(self, slide_id: str) -> None:
        owner = self._owner.pop(slide_id, None)
        if owner is not None:
            self.known.pop(owner, None)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    """The journal of a folder that is this run's alone; PathfmError while another has it.

    The mark of an unfinished run goes when the block is left without an error, or rolled back.
    """
    mark = folder / INDEX_UNFINISHED
    was_there = mark.exists()
    with open(mark, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino != os.stat(mark).st_ino:
                raise OSError  # that of a run which ended meanwhile: the file has gone with it
        except OSError:
            raise PathfmError(
                f"{folder}: another `pathfm index` is writing there. Wait for it, or choose another --out"
            ) from None
        journal = Journal(folder)
        try:
            yield journal
            mark.unlink(missing_ok=True)
        finally:
            if journal.rolled_back and not was_there:
                mark.unlink(missing_ok=True)
            journal.close()


def _header(committed: int) -> Record:
    return {
        "journal": _FORM,
        "rules": _RULES,
        "index": INDEX_MAGIC.decode(),
        "version": __version__,
        "committed": committed,
    }


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
