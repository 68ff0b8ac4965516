"""Ids instead of names: what is written of patients, cases and, if asked, files is a salted hash.

HMAC-SHA256 of the kind and the name, keyed with a salt; 20 hexadecimal digits of it. Who has no salt cannot
try out names; the same salt gives the same ids in every corpus, so tables can still be joined.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from online_patching.errors import redact
from online_patching.stores import is_remote, local_path
from pathfm.cohorts.options import CohortOptions
from pathfm.cohorts.row import CohortRow
from pathfm.runtime import PathfmError, make_folder

ENVIRONMENT = "PATHFM_SALT"
FEWEST_CHARACTERS = 16
_MARK_DIGITS = 9
_ID_DIGITS = 20  # 80 bits: of a million names, two share an id with probability 4e-13


class Salt:
    """Ids for names, and the salt they are made with; it is looked for when it is first needed.

    From `salt_file`, else the environment variable PATHFM_SALT, else `<corpus>.salt`, a file beside the
    corpus folder (not in it, so that who is given the corpus is not given the salt) that is made once
    and that only its owner may read. Threads may share it.
    """

    def __init__(self, options: CohortOptions, corpus: Path) -> None:
        self._options = options
        self._corpus = Path(os.path.abspath(corpus))
        self._key = b""
        self._lock = threading.Lock()

    def id(self, kind: str, name: str) -> str:
        """The id of a name; "" for "". Equal names of different kinds have different ids."""
        if not name:
            return ""
        digest = hmac.new(self._salt(), f"{kind}\0{name}".encode(), hashlib.sha256)
        return f"{kind[0]}{digest.hexdigest()[:_ID_DIGITS]}"

    @property
    def mark(self) -> str:
        """What tells ids made with this salt from those of another one, or from plain names."""
        return "plain" if self._options.ids == "plain" else self.id("mark", "salt")[:_MARK_DIGITS]

    def mark_of(self, row: CohortRow) -> str:
        """The mark, for a row that names anybody; else ""."""
        return self.mark if row.patient or row.case or self._options.salt_names else ""

    def hide(self, rows: Sequence[CohortRow]) -> list[CohortRow]:
        """The rows with ids for patients and cases, and if asked with links for their files."""
        if self._options.ids == "salted":
            rows = [
                replace(
                    row, patient=self.id("patient", row.patient), case=self.id("case", row.case)
                )
                for row in rows
            ]
        return [self._behind_link(row) for row in rows] if self._options.salt_names else list(rows)

    def sources(self, sources: Sequence[str]) -> tuple[str, ...]:
        """What may be written of the sources that a person named: ids where files' names are hidden."""
        if not self._options.salt_names:
            return tuple(sources)
        return tuple(f"hidden-{self.id('name', source)}" for source in sources)

    def _behind_link(self, row: CohortRow) -> CohortRow:
        """The row as a link in `<corpus>.names`, a folder that only its owner may enter."""
        if is_remote(row.uri):
            raise PathfmError(
                f"{redact(row.uri)}: the name of a remote slide cannot be hidden, since its index must "
                "name it to read it. Mount or copy it, or leave out --cohort.salt_names"
            )
        target = Path(local_path(row.uri))
        name = self.id("slide", str(target))
        folder = make_folder(self._corpus.with_name(f"{self._corpus.name}.names"))
        folder.chmod(0o700)
        link = folder / f"{name}{_suffixes(target)}"
        _link(link, target)
        if target.suffix.lower() == ".mrxs":  # its data lie in a folder of the same name
            _link(link.with_suffix(""), target.with_suffix(""))
        return replace(row, uri=str(link), name="", twin_of="")

    def _salt(self) -> bytes:
        with self._lock:
            if not self._key:
                self._key = self._found()
            return self._key

    def _found(self) -> bytes:
        named, told = self._options.salt_file, os.environ.get(ENVIRONMENT, "")
        if named is not None:
            return _checked(str(named), _read(named))
        if told:
            return _checked(ENVIRONMENT, told.encode())
        path = self._corpus.with_name(f"{self._corpus.name}.salt")
        make_folder(path.parent)
        if path.exists():
            return _checked(str(path), _private(path))
        try:
            _made_once(path)
        except OSError as error:
            raise PathfmError(
                f"{path}: the salt of patients' ids cannot be written ({error.strerror}). "
                f"Set {ENVIRONMENT}, or name a file with --cohort.salt_file"
            ) from None
        return _checked(str(path), _read(path))


def _made_once(path: Path) -> None:
    """Make a salt, whole from the start; one that another process makes meanwhile stays."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # its owner's alone
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(name, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.rename(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PathfmError(f"{path}: the salt cannot be read: {error.strerror}") from None


def _private(path: Path) -> bytes:
    if path.stat().st_mode & 0o077:
        raise PathfmError(f"{path}: others may read this salt: chmod 600 {path}")
    return _read(path)


def _checked(where: str, salt: bytes) -> bytes:
    salt = salt.strip()
    if len(salt) < FEWEST_CHARACTERS:
        raise PathfmError(
            f"{where}: a salt of {len(salt)} characters can be guessed; give at least "
            f"{FEWEST_CHARACTERS}, e.g. from `openssl rand -hex 32`"
        )
    return salt


def _suffixes(target: Path) -> str:
    """What readers know a file by: its suffix, and the .ome before it."""
    before = target.suffixes[-2:-1]
    return (before[0] if before and before[0].lower() == ".ome" else "") + target.suffix


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and os.readlink(link) == str(target):
        return
    if os.path.lexists(link):
        raise PathfmError(
            f"{link}: in the way of the link to another slide; two slides of one name?"
        )
    link.symlink_to(target)
