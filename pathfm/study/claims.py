"""Who works on which cell: a lock file in its folder, and what a finished or failed one leaves there.

cells/<arm>-s<seed>-<digest>/
    .lock          held while a process works on it; the system frees it however that ends
    result.json    written last, whole or not at all: the cell is done
    failed.txt     why the last try ended
    words.log      what its verbs printed; bars and errors go to the terminal
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from online_patching.stores.local import atomic_write_text
from pathfm.locks import LOCK, HeldError, is_locked, locked
from pathfm.runtime import make_folder

RESULT, FAILED, WORDS = "result.json", "failed.txt", "words.log"
State = Literal["done", "running", "failed", "stopped", "waiting"]
_MOST_BYTES = 1 << 24


def digest_of(facts: Any) -> str:
    """SHA-256 of plain facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Place:
    """A cell's folder. `digest` covers all that its figures depend on, so a changed study has other folders."""

    folder: Path
    digest: str

    def result(self) -> dict[str, Any] | None:
        """What a finished cell found; None where it is not done, or of other settings."""
        path = self.folder / RESULT
        try:
            if path.stat().st_size > _MOST_BYTES:
                return None
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("digest") != self.digest:
            return None
        return found

    def finish(self, facts: dict[str, Any]) -> None:
        """Writes result.json: from now on the cell is done."""
        text = json.dumps({"digest": self.digest, **facts}, indent=1, allow_nan=False)
        atomic_write_text(self.folder / RESULT, text + "\n")
        (self.folder / FAILED).unlink(missing_ok=True)

    def fail(self, why: str) -> None:
        """Keeps the reason for whoever looks at the grid."""
        atomic_write_text(self.folder / FAILED, why + "\n")

    def failed(self) -> str:
        """Why the last try ended; "" where there was none."""
        try:
            return (self.folder / FAILED).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def failed_since(self, moment_s: float) -> bool:
        """Whether a try ended in failure after that moment (seconds since 1970)."""
        try:
            return (self.folder / FAILED).stat().st_mtime > moment_s
        except OSError:
            return False

    def state(self) -> State:
        """What is known of the cell from its folder; never to be asked of one that this process holds."""
        if self.result() is not None:
            return "done"
        if is_locked(self.folder / LOCK):
            return "running"
        if self.failed():
            return "failed"
        return "stopped" if self.folder.exists() else "waiting"

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Whether the cell is ours while this lives; False where another process works on it."""
        with ExitStack() as held:
            try:
                # not at once: who only looks at the grid holds it for a moment
                held.enter_context(locked(make_folder(self.folder) / LOCK, 0.5))
            except HeldError:
                yield False
                return
            yield True


@contextmanager
def aside(path: Path) -> Iterator[None]:
    """What is printed meanwhile is added to a file: tables and advice of one verb among dozens."""
    make_folder(path.parent)
    with path.open("a", encoding="utf-8") as log, redirect_stdout(log):
        yield


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """One process at a time: waits for the others as long as they live, and says so."""
    path = make_folder(folder) / LOCK
    with ExitStack() as held:
        try:
            held.enter_context(locked(path, 5.0))
        except HeldError:
            print(f"waiting for another `pathfm study` that works in {folder}", flush=True)
            held.enter_context(locked(path, math.inf))
        yield
