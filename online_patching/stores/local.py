"""Local files: one pread a range, and atomic writes."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from online_patching.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    PatchingError,
    ShortReadError,
    StoreError,
)
from online_patching.stores.listing import MOST_LISTED, Listed, list_folder, token_of

_MAX_OPEN_FILES = 128
_MAX_READ_BYTES = 256 * 2**20
_UMASK = os.umask(0o022)
os.umask(_UMASK)


class LocalStore:
    """Byte ranges of local files, by absolute path. Reads are synchronous and thread-safe.

    A pread costs about 3 µs; an event-loop hop 30: local reads happen inside the decode threads.
    mmap is avoided on purpose: a file that shrinks under it kills the process (SIGBUS).
    """

    def __init__(self) -> None:
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()

    def version(self, key: str) -> tuple[int, str]:
        """Size in bytes and a token that changes when the file does."""
        try:
            stat = os.stat(key)
        except FileNotFoundError:
            raise ObjectNotFoundError(key, "there is no such file. Check the path.") from None
        except OSError as error:
            raise _cannot_be_opened(key, error) from None
        if not S_ISREG(stat.st_mode) and not S_ISDIR(stat.st_mode):
            # To open a pipe would wait for its writer.
            raise StoreError(key, "is neither a file nor a folder, but a pipe or device.")
        return stat.st_size, token_of(stat)

    def list(self, prefix: str, most: int = MOST_LISTED) -> list[Listed]:
        """Every file below a folder (or the file itself), by path."""
        return list_folder(prefix, most)

    def read(self, key: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Bytes start..stop of a file (to its end when stop is None), of the version `token` if one is given.

        A short file raises, and one that is not that version.
        """
        with self._opened(key) as handle:
            try:
                stat = os.fstat(handle)
                size = stat.st_size
                if token and token != token_of(stat):
                    raise ObjectChangedError(
                        key, "changed since it was indexed (size or time). Index it again."
                    )
                stop = size if stop is None else stop
                if stop - start > _MAX_READ_BYTES:
                    raise StoreError(
                        key, f"a read of {stop - start:,} bytes; no tile is that large."
                    )
                data = os.pread(handle, stop - start, start)
                while len(data) < stop - start:
                    more = os.pread(handle, stop - start - len(data), start + len(data))
                    if not more:
                        raise ShortReadError(key, start, stop, size)
                    data += more
            except OSError as error:  # a directory, a stale NFS handle, a failing disk
                raise StoreError(key, f"cannot be read: {error.strerror}.") from None
        return data

    @contextlib.contextmanager
    def hold(self, keys: Iterable[str]) -> Iterator[dict[str, int | PatchingError]]:
        """Descriptors of several files, open for as long as the block lasts; an error where one is not."""
        with contextlib.ExitStack() as stack:
            held: dict[str, int | PatchingError] = {}
            for key in keys:
                try:
                    held[key] = stack.enter_context(self._opened(key))
                except PatchingError as error:
                    held[key] = error
            yield held

    def close(self) -> None:
        """Close every descriptor; the store opens files again when asked."""
        with self._lock:
            for handle in self._handles.values():
                with contextlib.suppress(OSError):
                    os.close(handle)
            self._handles.clear()

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """A descriptor that no other thread closes meanwhile; at most 128 stay open."""
        with self._lock:
            handle = self._handles.pop(key, None)
        if handle is None:
            try:
                handle = os.open(key, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise ObjectNotFoundError(key, "there is no such file. Check the path.") from None
            except OSError as error:
                raise _cannot_be_opened(key, error) from None
        try:
            yield handle
        finally:
            with self._lock:
                spare = self._handles.pop(key, None)
                self._handles[key] = handle
                stale = [spare] if spare is not None else []
                while len(self._handles) > _MAX_OPEN_FILES:
                    stale.append(self._handles.pop(next(iter(self._handles))))
            for old in stale:
                os.close(old)


def _cannot_be_opened(key: str, error: OSError) -> StoreError:
    code = "access" if isinstance(error, PermissionError) else None
    return StoreError(key, f"cannot be opened: {error.strerror}.", code)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise StoreError(
            str(target), f"cannot be written: {error.strerror}. Choose another output folder."
        ) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_UMASK)
        os.replace(name, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise StoreError(
                str(target),
                f"cannot be written: {error.strerror}. Free space, or choose another folder.",
            ) from None
        raise


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` in UTF-8."""
    atomic_write_bytes(path, text.encode())
