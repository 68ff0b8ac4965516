"""What s3://, gs:// and az:// have in common: a place, and a grant to ask for what lies there.

Why signatures of our own: docs/decisions/0013-clouds.md.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from online_patching.errors import StoreError, redact
from online_patching.stores.address import Address
from online_patching.stores.http_target import Origin, make_target, proxy_for
from online_patching.stores.retry import TransientError
from online_patching.stores.sigv4 import quoted_path

CLOUDS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
"""What each scheme means; anything else is http(s) or fsspec's."""

_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._:-]{0,221}")  # stands in requests as it is

T = TypeVar("T")
Query = Sequence[tuple[str, str]]
Headers = tuple[tuple[str, str], ...]
Signature = Callable[[str, Query], tuple[str, Headers]]
"""(path, query) -> the query as it is sent, and headers that must be sent with it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A URI of a cloud in parts; `host` is the account's, where the URI names one (abfs://box@host/name)."""

    cloud: str
    bucket: str
    name: str
    host: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """What one needs to ask for the objects of a bucket, until the monotonic time `until`."""

    endpoint: str  # scheme://host[:port]
    path: str  # of the bucket, without a '/' at its end: "" or "/bucket"
    sign: Signature = field(repr=False)
    until: float
    anonymous: bool = False
    made_at: float = field(default_factory=time.monotonic)

    def address(self, name: str, query: Query = ()) -> Address:
        """How to ask for an object, or with '' for the bucket itself."""
        path = f"{self.path}/{quoted_path(name)}" if name else self.path or "/"
        asked, headers = self.sign(path, query)
        path_query = f"{path}?{asked}" if asked else path
        parts = urlsplit(self.endpoint)
        origin: Origin = (parts.scheme, parts.hostname or "", port_of(self.endpoint))
        target = None
        if not proxy_for(parts.scheme, parts.hostname or ""):
            target = make_target(origin, path_query, headers)
        return Address(self.endpoint + path_query, headers, target, signed=True)


class Provider(Protocol):
    """One cloud: makes grants, and says what to do when its objects may not be read."""

    async def grant(self, place: Place) -> Grant:
        """What one needs for the bucket of `place`; TransientError is worth another try."""
        ...


def place_of(key: str) -> Place | None:
    """A cloud's URI in parts, or None for other schemes. StoreError when it names no bucket, or no text."""
    scheme, mark, rest = key.partition("://")
    cloud = CLOUDS.get(scheme.lower()) if mark else None
    if cloud is None:
        return None
    bucket, _, name = rest.partition("/")
    host = ""
    if cloud == "az":
        bucket, _, host = bucket.partition("@")
    if not _BUCKET.fullmatch(bucket):
        raise StoreError(redact(key), f"names no bucket. Write {scheme}://bucket/name.")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise StoreError(redact(key), "holds what is no text: half a character.") from None
    return Place(cloud, bucket, name, host.lower())


async def in_thread(what: str, work: Callable[..., T], *args: Any) -> T:
    """A library's blocking call, outside the loop; it is given a minute."""
    try:
        async with asyncio.timeout(60):
            return await asyncio.to_thread(work, *args)
    except TimeoutError:
        raise TransientError(f"{what} took more than 60 s") from None


def port_of(url: str) -> int:
    """The port of a URL, its scheme's own when it names none."""
    parts = urlsplit(url)
    return parts.port or {"http": 80, "https": 443}[parts.scheme]


def host_header(url: str) -> str:
    """A URL's host as the Host header says it: with the port unless it is the scheme's own."""
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}[parts.scheme]
    name = parts.hostname or ""
    name = f"[{name}]" if ":" in name else name
    return name if parts.port in (None, default) else f"{name}:{parts.port}"


def may_carry_token(url: str) -> bool:
    """Whether a bearer token may be sent there: over TLS, or to this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or parts.hostname in ("127.0.0.1", "::1", "localhost")
