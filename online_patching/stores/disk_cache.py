"""A bounded folder of byte ranges that were read before: tiles of remote slides, kept on a local disk.

One file a range, written beside its name and renamed, with a checksum over what it holds: a torn file
is never returned. Any number of processes share a folder. Nothing here raises once the cache is made:
a disk that is full, read-only or gone costs hits, and one warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import struct
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_patching.errors import StoreError, redact
from online_patching.stores.disk_usage import SHARDS, Usage, on_disk

SMALLEST_LIMIT_BYTES = 2**20
_LARGEST_SHARE = 16  # an entry larger than this part of the limit is not kept
_HEAD = struct.Struct("<4s16sQI")  # mark, the first half of the key, length, CRC-32 of the body
_MARK = b"OPC1"
_TOUCHED_S = 1.0  # how old a file's time must be before a read renews it
_PAUSE_S = 60.0  # how long nothing is written after the disk refused
_SIGNING = re.compile(  # parts of a query that say who may read, not what
    r"(?:x-(?:amz|goog)-[^=&]*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id"
    r"|token|access_token)(?:=[^&]*)?",
    re.IGNORECASE,
)
_SAS = re.compile(  # the same of Azure, whose short names mean other things elsewhere
    r"(?:s[vrpsteikd]|s[ktr][oitesv]|sig|spr|sip|sdd|ses|sce)(?:=[^&]*)?", re.IGNORECASE
)
_log = logging.getLogger("online_patching")


@dataclass
class CacheCounts:
    """What a DiskCache has done in this process; `damaged` files were found torn and removed."""

    hits: int = 0
    misses: int = 0
    written: int = 0
    damaged: int = 0
    evicted: int = 0
    skipped: int = 0  # not written: no token, too large, a disk that refuses, another's turn


class DiskCache:
    """Ranges of versioned objects in `folder`, at most `limit_bytes` of disk; the least recently used go first.

    `get` and `put` may be called from any thread and any process, and take tens of microseconds. The
    folder is made when first used; an instance may be pickled or forked. Objects without a version
    token are never kept. StoreError when `limit_bytes` is under 1 MiB.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder).expanduser().absolute(), limit_bytes
        if limit_bytes < SMALLEST_LIMIT_BYTES:
            raise StoreError(
                str(folder),
                f"a cache of {limit_bytes:,} bytes is too small to be of use. Give it at least "
                f"{SMALLEST_LIMIT_BYTES:,}.",
            )
        self.counts = CacheCounts()
        self._usage = Usage(self.folder, limit_bytes)
        self._names = itertools.count()
        self._paused_until = 0.0
        self._warned = False
        self._lock = threading.Lock()

    def get(self, uri: str, token: str, start: int, stop: int) -> bytes | None:
        """Bytes start..stop of the version `token` of an object, or None when they are not here."""
        if not token:
            return None
        key = _key(uri, token, start, stop)
        path = self._path(key)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # absent, or a disk that is gone: the same to whoever reads
            self._missed()
            return None
        try:
            body = _body(_read(handle, _HEAD.size + stop - start + 1), key, stop - start)
            if body is not None and time.time() - os.fstat(handle).st_mtime > _TOUCHED_S:
                with contextlib.suppress(OSError):
                    os.utime(handle)
        except OSError:
            self._missed()
            return None
        finally:
            os.close(handle)
        if body is None:
            self._remove_damaged(path)
            self._missed()
            return None
        with self._lock:
            self.counts.hits += 1
        return body

    def put(self, uri: str, token: str, start: int, stop: int, data: bytes) -> None:
        """Keep the bytes start..stop of the version `token` of an object, if there is room and a token."""
        key = _key(uri, token, start, stop)
        size = on_disk(_HEAD.size + len(data))
        fits = token and len(data) == stop - start and size * _LARGEST_SHARE <= self.limit_bytes
        if not fits or time.monotonic() < self._paused_until:
            return self._skipped()
        try:
            with self._usage.room(key[0], size) as granted:
                if granted:
                    head = _HEAD.pack(_MARK, key[:16], len(data), zlib.crc32(data))
                    self._write(self._path(key), head + data)
        except OSError as error:
            return self._refused(error)
        with self._lock:
            self.counts.written += granted
            self.counts.skipped += not granted
            self.counts.evicted = self._usage.evicted
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (DiskCache, (self.folder, self.limit_bytes))

    def _path(self, key: bytes) -> str:
        name = key.hex()
        return f"{self.folder}/{name[:2]}/{name[2:]}"

    def _write(self, path: str, data: bytes) -> None:
        folder, _, _ = path.rpartition("/")
        beside = f"{folder}/.{os.getpid()}-{id(self):x}-{next(self._names)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            handle = os.open(beside, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            handle = os.open(beside, flags, 0o600)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                if file.write(data) != len(data):
                    raise OSError(28, "No space left on device")
            os.rename(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise

    def _missed(self) -> None:
        with self._lock:
            self.counts.misses += 1

    def _skipped(self) -> None:
        with self._lock:
            self.counts.skipped += 1

    def _remove_damaged(self, path: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(path)
        with self._lock:
            self.counts.damaged += 1

    def _refused(self, error: OSError) -> None:
        with self._lock:
            self.counts.skipped += 1
            self._paused_until = time.monotonic() + _PAUSE_S
            told, self._warned = self._warned, True
        if not told:
            _log.warning(
                "%s: the cache of tiles cannot be written (%s); reading goes on without. Free space, "
                "or choose another folder.",
                self.folder,
                error.strerror,
            )


def _key(uri: str, token: str, start: int, stop: int) -> bytes:
    """What names a range: its object without credentials, its version and its place."""
    words = "\0".join((identity(uri), token, str(start), str(stop)))
    return hashlib.blake2b(words.encode("utf-8", "surrogateescape"), digest_size=32).digest()


def identity(uri: str) -> str:
    """A URI without what merely says who may read it: an object signed anew is the same object.

    Only ever hashed: a query that is not a signature may hold a secret too.
    """
    head, _, query = uri.partition("?")
    if not query or not head.lower().startswith(("http://", "https://")):
        return redact(uri)
    parts = query.partition("#")[0].split("&")
    kept = [part for part in parts if not _SIGNING.fullmatch(part)]
    if any(part.lower().startswith("sig=") for part in kept):
        kept = [part for part in kept if not _SAS.fullmatch(part)]
    return "?".join([redact(head), *(["&".join(kept)] if kept else [])])


def _read(handle: int, most: int) -> bytes:
    data = os.read(handle, most)
    while data and len(data) < most:
        more = os.read(handle, most - len(data))
        if not more:
            break
        data += more
    return data


def _body(data: bytes, key: bytes, size: int) -> bytes | None:
    """What a file holds, if it is whole and about this key."""
    if len(data) != _HEAD.size + size:
        return None
    mark, half, length, checksum = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    whole = mark == _MARK and half == key[:16] and length == size and zlib.crc32(body) == checksum
    return body if whole else None


assert SHARDS == 256  # a key's first byte names its shard
