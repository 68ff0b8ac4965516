"""Every other scheme (s3://, gs://, az://, memory://, ...) through fsspec, in threads."""

from __future__ import annotations

import asyncio
from typing import Any

import fsspec

from online_patching.errors import ObjectNotFoundError, ShortReadError, StoreError, redact
from online_patching.stores.retry import RetryPolicy, TransientError, with_retries

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}


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
        token = (
            info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
        )
        return int(info["size"] or 0), str(token or "")

    async def read(self, key: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Bytes start..stop of an object, or all of it when stop is None. `token` is not used."""
        data = await self._call(key, lambda fs, path: fs.cat_file(path, start=start, end=stop))
        if stop is not None and len(data) != stop - start:
            raise ShortReadError(redact(key), start, stop, start + len(data))
        return bytes(data)

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
                raise StoreError(redact(key), "access refused. Check the credentials.") from None
            except (OSError, TimeoutError) as error:
                raise TransientError(type(error).__name__) from None
            except Exception as error:  # filesystems raise their SDKs' own types
                raise StoreError(
                    redact(key), f"{type(error).__name__} from its filesystem."
                ) from None

        def count() -> None:
            self.retries += 1

        return await with_retries(self.policy, redact(key), once, count)


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
