"""Every other scheme (sftp://, hdfs://, webdav://, memory://, ...) through fsspec, in threads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar, cast

import fsspec

from online_patching.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    ShortReadError,
    StoreError,
    redact,
)
from online_patching.stores.http_answer import MAX_OBJECT_BYTES, check_size
from online_patching.stores.listing import MOST_LISTED, Listed, check_count, in_order
from online_patching.stores.retry import RetryPolicy, TransientError, with_retries

_MOST_THREADS = 32
_ETAGS = ("ETag", "etag")
_REFUSED = "reference"  # its documents, which may lie anywhere, hold templates that are run
T = TypeVar("T")


class FsspecStore:
    """Byte ranges through any fsspec filesystem, keyed by URL.

    Credentials come from where the filesystem looks for them (environment, files, instance). Its blocking
    calls run in at most 32 daemon threads: one that never returns costs a slot, not the process's end.
    Retries are ours, on top of the filesystem's own. A read is followed by a look at the version: what it
    gave is then the version asked for, at the price of a second call.
    """

    def __init__(self, policy: RetryPolicy | None = None) -> None:
        self.policy = policy or RetryPolicy()
        self.retries = 0
        self._slots = threading.Semaphore(_MOST_THREADS)

    async def version(self, key: str) -> tuple[int, str]:
        """Size in bytes and whatever identifies this version (ETag, mtime) where there is one."""
        info = await self._call(key, _fresh_info)
        return int(info["size"] or 0), _token(info)

    async def read(self, key: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Bytes start..stop of an object, or to its end when stop is None, of the version `token`."""

        def read(fs: Any, path: str) -> tuple[bytes, str]:
            end = start + MAX_OBJECT_BYTES + 1 if stop is None else stop
            data = b"" if start == stop else fs.cat_file(path, start=start, end=end)
            return bytes(data), _token(_fresh_info(fs, path)) if token else ""

        if stop is not None:
            check_size(key, stop - start, MAX_OBJECT_BYTES)
        data, found = await self._call(key, read)
        check_size(key, len(data), MAX_OBJECT_BYTES)
        if found != token:
            raise ObjectChangedError(redact(key), "changed since it was indexed. Index it again.")
        if stop is not None and len(data) != stop - start:
            raise ShortReadError(redact(key), start, stop, (await self.version(key))[0])
        return data

    async def list(self, prefix: str, most: int = MOST_LISTED) -> list[Listed]:
        """Every object below a prefix, by URI."""

        def find(fs: Any, path: str) -> list[Listed]:
            infos = fs.find(path, detail=True)
            check_count(prefix, len(infos), most)
            return [
                Listed(_uri(fs, prefix, path, name), int(info["size"] or 0), _token(info))
                for name, info in infos.items()
            ]

        return in_order(prefix, await self._call(prefix, find))

    async def close(self) -> None:
        """Filesystems are cached by fsspec itself; nothing to close."""

    async def _call(self, key: str, work: Callable[[Any, str], T]) -> T:
        async def once() -> T:
            try:
                async with asyncio.timeout(self.policy.timeout_s):
                    return await self._in_thread(lambda: work(*_filesystem(key)))
            except StoreError:
                raise
            except FileNotFoundError:
                raise ObjectNotFoundError(
                    redact(key), "there is no such object. Check the URI."
                ) from None
            except PermissionError:
                raise StoreError(
                    redact(key), "access refused. Check the credentials.", "access"
                ) from None
            except TimeoutError:
                raise TransientError(f"not finished within {self.policy.timeout_s:g} s") from None
            except OSError as error:
                raise TransientError(type(error).__name__) from None
            except Exception as error:  # filesystems raise their SDKs' own types
                raise StoreError(
                    redact(key), f"{type(error).__name__} from its filesystem."
                ) from None

        def count() -> None:
            self.retries += 1

        return await with_retries(self.policy, redact(key), once, count)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def told(value: T | None, error: BaseException | None) -> None:
            if not answer.done():
                answer.set_exception(error) if error else answer.set_result(cast(T, value))

        def run() -> None:
            value, problem = None, None
            try:
                value = work()
            except BaseException as error:
                problem = error
            finally:
                self._slots.release()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(told, value, problem)

        while not self._slots.acquire(blocking=False):  # noqa: ASYNC110 - threads release it, not this loop
            await asyncio.sleep(0.002)
        threading.Thread(target=run, name="patch-fsspec", daemon=True).start()
        return await answer


def _uri(fs: Any, prefix: str, path: str, name: str) -> str:
    """A name that its filesystem gave, spelt as the prefix was: `path` is what it made of that."""
    if name == path or name.startswith(f"{path.rstrip('/')}/"):
        return prefix.rstrip("/") + name[len(path.rstrip("/")) :]
    return str(fs.unstrip_protocol(name))


def _token(info: dict[str, Any]) -> str:
    """Whatever identifies a version of an object; '' where its filesystem tells nothing."""
    names = (*_ETAGS, "mtime", "LastModified", "last_modified", "updated", "modified", "created")
    found = next((info[name] for name in names if info.get(name)), "")
    return str(
        found.timestamp() if isinstance(found, datetime) else found
    )  # a listing may say it so


def _fresh_info(fs: Any, path: str) -> dict[str, Any]:
    """What a filesystem knows of an object now, not when it last listed its folder."""
    fs.invalidate_cache(fs._parent(path))
    info: dict[str, Any] = fs.info(path)
    return info


def _filesystem(key: str) -> tuple[Any, str]:
    scheme = key.partition("://")[0]
    if _REFUSED in scheme.lower().split("::"):
        raise StoreError(redact(key), f"{_REFUSED}:// is not read: name the slide itself.")
    try:
        filesystem, path = fsspec.core.url_to_fs(key)
    except ImportError:
        raise StoreError(
            redact(key),
            f"reading {scheme}:// needs a package: install fsspec's filesystem for {scheme}.",
        ) from None
    except ValueError:
        raise StoreError(redact(key), f"no reader knows the scheme {scheme}://.") from None
    return filesystem, path
