"""S3 and what speaks like it: botocore finds credentials, region and endpoint; we sign."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ConnectionError,
    HTTPClientError,
    PartialCredentialsError,
)

from online_patching.errors import StoreError
from online_patching.stores.cloud import (
    Grant,
    Headers,
    Place,
    Query,
    Signature,
    host_header,
    in_thread,
)
from online_patching.stores.cloud_options import S3Options
from online_patching.stores.retry import TransientError
from online_patching.stores.sigv4 import Keys, presigned_query, quoted_query

_LASTS_S = 3600  # a signed URL; one that is older than _FRESH_S is not asked with any more
_FRESH_S = 600.0
_REREAD_S = 60.0  # keys that were exchanged in a file are seen by the next grant after this
_REGION = re.compile(r"[a-z0-9-]{1,40}")
_AWS = re.compile(r".*\.amazonaws\.com(\.cn)?")
_PAYER = (("x-amz-request-payer", "requester"),)
_MOST_KNOWN = 1000
_KNOWN: dict[tuple[str, str | None, int], tuple[str, str, float]] = {}
"""(bucket, region, hash of AWS_*) -> URL, region, until when; for all stores of a process."""


class S3:
    """Grants for buckets, in the region that each bucket is in. Not safe in two loops."""

    def __init__(self, header: Callable[[str, str, str], Awaitable[str]]) -> None:
        self._header = header
        self._session: Any = None
        self._made_at = 0.0

    async def grant(self, place: Place) -> Grant:
        """Fresh for ten minutes: credentials are looked at again after that."""
        options, uri = S3Options.read(), f"s3://{place.bucket}"
        try:
            url, region = await in_thread(
                "looking for an S3 endpoint", self._base, place.bucket, None
            )
            if _AWS.fullmatch(urlsplit(url).hostname or ""):
                found = await self._header(uri, url, "x-amz-bucket-region")
                if found != region and _REGION.fullmatch(found):
                    url, region = await in_thread(
                        "looking for an S3 endpoint", self._base, place.bucket, found
                    )
            keys = None
            if not options.anonymous:
                keys = await in_thread("looking for AWS credentials", self._keys)
        except (ConnectionError, HTTPClientError) as error:
            raise TransientError(type(error).__name__) from None
        except PartialCredentialsError:
            raise StoreError(uri, "the AWS credentials are incomplete.", "access") from None
        except BotoCoreError as error:  # its words may quote a configuration file
            raise StoreError(
                uri,
                f"AWS is not set up ({type(error).__name__}). Check ~/.aws and AWS_*.",
                "access",
            ) from None
        parts = urlsplit(url)
        endpoint = f"{parts.scheme}://{host_header(url)}"
        payer: Headers = _PAYER if options.requester_pays else ()
        return Grant(
            endpoint,
            parts.path.rstrip("/"),
            _signature(keys, region, host_header(url), payer),
            time.monotonic() + _FRESH_S,
            anonymous=keys is None,
        )

    def _base(self, bucket: str, region: str | None) -> tuple[str, str]:
        """The URL of a bucket and the region to sign for, by all that botocore knows of endpoints."""
        if self._session is None or time.monotonic() - self._made_at > _REREAD_S:
            self._session, self._made_at = botocore.session.Session(), time.monotonic()
        told = hash(frozenset(item for item in os.environ.items() if item[0].startswith("AWS_")))
        url, known_region, until = _KNOWN.get((bucket, region, told), ("", "", 0.0))
        if time.monotonic() >= until:
            url, known_region = self._asked(bucket, region)
            if len(_KNOWN) > _MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[bucket, region, told] = url, known_region, time.monotonic() + _FRESH_S
        return url, known_region

    def _asked(self, bucket: str, region: str | None) -> tuple[str, str]:
        """The same from botocore itself: a client takes 60 to 150 ms to make."""
        told = os.environ.get("AWS_REGION")  # as all SDKs but botocore read it
        region = region or told or self._session.get_config_variable("region") or "us-east-1"
        client = self._client(region, {})
        styled = (self._session.get_scoped_config().get("s3") or {}).get("addressing_style")
        if not styled and _AWS.fullmatch(urlsplit(client.meta.endpoint_url).hostname or ""):
            # Else botocore names the host of all regions, which redirects for a day after a bucket is made.
            client = self._client(region, {"s3": {"addressing_style": "virtual"}})
        url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
        return url.partition("?")[0][: -len("/k")] + "/", region

    def _client(self, region: str, config: dict[str, Any]) -> Any:
        """A client that only ever tells URLs: its keys are nobody's."""
        return self._session.create_client(
            "s3",
            region_name=region,
            aws_access_key_id="none",
            aws_secret_access_key="none",  # noqa: S106
            config=Config(signature_version="s3v4", **config),
        )

    def _keys(self) -> Keys | None:
        found = self._session.get_credentials()
        if found is None:
            return None
        frozen = found.get_frozen_credentials()
        return Keys(frozen.access_key, frozen.secret_key, frozen.token or "")


def _signature(keys: Keys | None, region: str, host: str, headers: Headers) -> Signature:
    def sign(path: str, query: Query) -> tuple[str, Headers]:
        if keys is None:
            return quoted_query(query), headers
        now = datetime.now(UTC)
        asked = presigned_query(
            keys, region, host, path, at=now, seconds=_LASTS_S, query=query, headers=headers
        )
        return asked, headers

    return sign
