"""s3://, gs:// and az:// as plain HTTP: whose objects they are, and with which signature one asks for them.

Each cloud's own library finds the credentials; a signature serves every range of an object, so the bytes
themselves come through the same small client as http(s) (docs/decisions/0013-clouds.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from online_patching.errors import StoreError, redact
from online_patching.stores.address import Address, plain_address
from online_patching.stores.cloud import Grant, Place, Provider, place_of
from online_patching.stores.retry import TransientError

_MOST_KEPT = 50_000  # addresses; of a Zarr array every chunk has one
_SETTLED_S = 5.0  # a refusal of credentials that are newer than this is meant


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
