"""s3://, gs:// and az:// as plain HTTP: whose objects they are, and with which signature one asks for them.

Each cloud's own library finds the credentials; a signature serves every range of an object, so the bytes
themselves come through the same small client as http(s) (docs/decisions/0013-clouds.md).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from online_patching.errors import StoreError, redact
from online_patching.stores.address import Address, plain_address
from online_patching.stores.http_target import Origin, make_target, proxy_for
from online_patching.stores.retry import TransientError
from online_patching.stores.sigv4 import quoted_path

CLOUDS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
"""What each scheme means; anything else is http(s) or fsspec's."""

_MOST_KEPT = 50_000  # addresses; of a Zarr array every chunk has one
_SETTLED_S = 5.0  # a refusal of credentials that are newer than this is meant
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


class CloudAddresses:
    """Addresses of http(s) URLs and of the clouds' objects; signs anew when credentials grow old.

    `header` asks for one header of a URL (FullClient.header). Use it on one event loop only.
    """

    def __init__(self, header: Callable[[str, str, str], Awaitable[str]]) -> None:
        self._header = header
        self._providers: dict[str, Provider] = {}
        self._grants: dict[tuple[str, str, str], Grant] = {}
        self._making: dict[tuple[str, str, str], asyncio.Task[Grant]] = {}
        self._kept: dict[str, tuple[Address, Grant]] = {}

    def at_once(self, key: str) -> Address | None:
        """The key's address, or None when credentials must be fetched first."""
        if key.startswith("http"):
            return plain_address(key)
        now = time.monotonic()
        kept = self._kept.get(key)
        if kept is not None and now < kept[1].until:
            return kept[0]
        place = place_of(key)
        if place is None:  # http in capitals
            return plain_address(key)
        grant = self._grants.get((place.cloud, place.bucket, place.host))
        if grant is None or now >= grant.until:
            return None
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        self._kept[key] = (grant.address(place.name), grant)
        return self._kept[key][0]

    async def soon(self, key: str) -> Address:
        """The key's address, after fetching what it needs."""
        await self.grant_for(key)
        address = self.at_once(key)
        if address is None:  # it has grown old meanwhile
            raise TransientError("credentials that do not last")
        return address

    async def grant_for(self, key: str) -> Grant | None:
        """The grant for the key's bucket, made when there is none; None for http(s).

        One attempt serves all who wait for it, also where it fails: credentials that nobody answers for
        take a minute each.
        """
        place = place_of(key)
        if place is None:
            return None
        bucket = (place.cloud, place.bucket, place.host)
        grant = self._grants.get(bucket)
        if grant is not None and time.monotonic() < grant.until:
            return grant
        making = self._making.get(bucket)
        if making is None:
            making = asyncio.get_running_loop().create_task(self._make(bucket, place))
            self._making[bucket] = making
        try:
            return await asyncio.shield(making)
        except ImportError:
            extra = {"s3": "s3", "gs": "gcs", "az": "azure"}[place.cloud]
            raise StoreError(
                redact(key), f"reading it needs a package: pip install 'pathfm[{extra}]'."
            ) from None

    async def _make(self, bucket: tuple[str, str, str], place: Place) -> Grant:
        try:
            grant = self._grants[bucket] = await self._provider(place.cloud).grant(place)
        finally:
            del self._making[bucket]
        return grant

    def refused(self, key: str, address: Address) -> bool:
        """Whether new credentials may help: these are not anonymous, and not brand new."""
        kept, place = self._kept.get(key), place_of(key)
        if place is None:
            return False
        if kept is None or kept[0] is not address:
            return True  # another has been made meanwhile
        grant = kept[1]
        if grant.anonymous or time.monotonic() - grant.made_at < _SETTLED_S:
            return False
        del self._kept[key]
        if self._grants.get((place.cloud, place.bucket, place.host)) is grant:
            del self._grants[place.cloud, place.bucket, place.host]
        return True

    def hint(self, key: str) -> str:
        """What may mend a refusal of this key, as the end of a message; '' for http(s)."""
        place = place_of(key)
        grant = self._grants.get((place.cloud, place.bucket, place.host)) if place else None
        if grant is None:
            return ""
        if grant.anonymous:
            return " It was asked for without credentials: none were found, or none were wanted."
        return " If it is public, or its requester pays, say so (docs/stores.md)."

    def _provider(self, cloud: str) -> Provider:
        if cloud not in self._providers:
            self._providers[cloud] = _make_provider(cloud, self._header)
        return self._providers[cloud]


def _make_provider(cloud: str, header: Callable[[str, str, str], Awaitable[str]]) -> Provider:
    """Imported when first wanted: each brings a library of its own."""
    if cloud == "s3":
        from online_patching.stores.cloud_s3 import S3

        return S3(header)
    if cloud == "gs":
        from online_patching.stores.cloud_gcs import Gcs

        return Gcs()
    from online_patching.stores.cloud_azure import Azure

    return Azure()


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
