"""Presigned S3 URLs: AWS Signature Version 4 in the query, as AWS documents it. Pure.

A signature covers the object and not its range, so one URL serves every range of an object for as long as it
lasts. Ours cost 15 µs; botocore's generate_presigned_url takes 155 (benchmarks/cloud_clients.py), which matters
for Zarr, where every chunk is an object.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import quote

_UNRESERVED = "-_.~"


@dataclass(frozen=True, slots=True)
class Keys:
    """AWS credentials; `session` is '' for permanent ones."""

    access: str
    secret: str = field(repr=False)
    session: str = field(default="", repr=False)


def quoted_path(name: str) -> str:
    """An object's name as part of a URL: everything but '/' and unreserved characters is encoded once."""
    return quote(name, safe="/" + _UNRESERVED)


def quoted_query(parts: Sequence[tuple[str, str]]) -> str:
    """A query in the form and order that is signed."""
    encoded = sorted((quote(a, safe=_UNRESERVED), quote(b, safe=_UNRESERVED)) for a, b in parts)
    return "&".join(f"{name}={value}" for name, value in encoded)


def presigned_query(
    keys: Keys,
    region: str,
    host: str,
    path: str,
    *,
    at: datetime,
    seconds: int,
    query: Sequence[tuple[str, str]] = (),
    headers: Sequence[tuple[str, str]] = (),
) -> str:
    """The query of a GET of `path` (encoded) on `host` that is allowed for `seconds` from `at` on.

    `headers` (lower-case names) must then be sent as well.
    """
    stamp = at.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    signed = sorted([("host", host), *headers])
    names = ";".join(name for name, _ in signed)
    parts = [
        *query,
        ("X-Amz-Algorithm", "AWS4-HMAC-SHA256"),
        ("X-Amz-Credential", f"{keys.access}/{scope}"),
        ("X-Amz-Date", stamp),
        ("X-Amz-Expires", str(seconds)),
        ("X-Amz-SignedHeaders", names),
    ]
    if keys.session:
        parts.append(("X-Amz-Security-Token", keys.session))
    asked = quoted_query(parts)
    lines = "".join(f"{name}:{value.strip()}\n" for name, value in signed)
    request = f"GET\n{path}\n{asked}\n{lines}\n{names}\nUNSIGNED-PAYLOAD"
    digest = hashlib.sha256(request.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
    key = _signing_key(keys.secret, stamp[:8], region)
    return f"{asked}&X-Amz-Signature={hmac.digest(key, text.encode(), 'sha256').hex()}"


@lru_cache(16)
def _signing_key(secret: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
