"""Every other scheme (s3://, gs://, az://, memory://, ...) through fsspec, in threads."""

from __future__ import annotations

import asyncio
from typing import Any

import fsspec

from online_patching.errors import ObjectNotFoundError, ShortReadError, StoreError, redact
from online_patching.stores.listing import MOST_LISTED, Listed, check_count, in_order
from online_patching.stores.retry import RetryPolicy, TransientError, with_retries

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}
_ETAGS = ("ETag", "etag")


class FsspecStore:
    """Byte ranges through any fsspec filesystem, keyed by URL.

    Credentials come from where the filesystem looks for them (environment, files, instance).
    Blocking calls run in threads; retries are ours, on top of the filesystem's own.
    """

    def __init__(self, policy: RetryPolicy | None = None) -> None:
        self.policy = policy or RetryPolicy()
        self.retries = 0

    async def version(self, key: str) -> tuple[int, str]:
        """Size in bytes and whatever identifies this version (ETag, mtime) where there is one."""
        info = await self._call(key, lambda fs, path: fs.info(path))
        return int(info["size"] or 0), _token(info)

    async def read(self, key: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Bytes start..stop of an object, or all of it when stop is None. `token` is not used."""
        data = await self._call(key, lambda fs, path: fs.cat_file(path, start=start, end=stop))
        if stop is not None and len(data) != stop - start:
            raise ShortReadError(redact(key), start, stop, start + len(data))
        return bytes(data)

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

    async def _call(self, key: str, work: Any) -> Any:
        async def once() -> Any:
            try:
                async with asyncio.timeout(self.policy.timeout_s):
                    return await asyncio.to_thread(lambda: work(*_filesystem(key)))
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
            except (OSError, TimeoutError) as error:
                raise TransientError(type(error).__name__) from None
            except Exception as error:  # filesystems raise their SDKs' own types
                raise StoreError(
                    redact(key), f"{type(error).__name__} from its filesystem."
                ) from None

        def count() -> None:
            self.retries += 1

        return await with_retries(self.policy, redact(key), once, count)


def _uri(fs: Any, prefix: str, path: str, name: str) -> str:
    """A name that its filesystem gave, spelt as the prefix was: `path` is what it made of that."""
    if name == path or name.startswith(f"{path.rstrip('/')}/"):
        return prefix.rstrip("/") + name[len(path.rstrip("/")) :]
    return str(fs.unstrip_protocol(name))


def _token(info: dict[str, Any]) -> str:
    """Whatever identifies a version of an object; '' where its filesystem tells nothing."""
    names = (*_ETAGS, "mtime", "LastModified", "last_modified", "updated", "modified", "created")
    return str(next((info[name] for name in names if info.get(name)), ""))


def _filesystem(key: str) -> tuple[Any, str]:
    scheme = key.partition("://")[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(key)
    except ImportError:
        extra = _EXTRAS.get(scheme)
        remedy = (
            f"pip install 'pathfm[{extra}]'"
            if extra
            else f"install fsspec's filesystem for {scheme}"
        )
        raise StoreError(redact(key), f"reading {scheme}:// needs a package: {remedy}.") from None
    except ValueError:
        raise StoreError(redact(key), f"no reader knows the scheme {scheme}://.") from None
    return filesystem, path
