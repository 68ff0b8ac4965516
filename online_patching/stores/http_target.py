"""What a URL means to a plain range request: where it goes, what it says, or that it is not plain."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from yarl import URL

from online_patching.errors import StoreError, redact
from online_patching.stores.http_headers import headers_for, on_forget

Origin = tuple[str, str, int]
"""(scheme, host, port): what a connection may be shared between."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')  # weak ones (W/...) may not be used with If-Match


def if_match(token: str) -> str:
    """A token as a value of If-Match; '' where it is none, or not fit for a header."""
    return token if _STRONG_ETAG.fullmatch(token) else ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL's requests go, and all that its requests have in common."""

    origin: Origin
    prefix: bytes = field(repr=False)  # may hold a signature


@lru_cache(256)  # looking through the environment takes longer than a request
def proxy_for(scheme: str, host: str) -> str | None:
    """The http proxy that the environment asks for; never for this machine's own addresses."""
    proxies = getproxies_environment()
    proxy = proxies.get(scheme) or proxies.get("all") or ""
    if not proxy or proxy_bypass_environment(host, proxies) or _is_here(host):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    return proxy if proxy.startswith(("http://", "https://")) else None


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_url(key: str, encoded: bool = False) -> URL:
    """A URL in parts; StoreError when it is none. An `encoded` one is left as it is."""
    try:
        return URL(key, encoded=encoded)
    except ValueError:  # whose words may hold a password
        raise StoreError(redact(key), "is not a URL.") from None


@lru_cache(4096)
def target_of(key: str) -> Target | None:
    """What a plain http(s) URL means to a RangeClient; None when it needs a complete client.

    StoreError when it is no URL.
    """
    url = parse_url(key)
    host, port = url.raw_host, url.port
    if url.scheme not in ("http", "https") or not host or not port or url.raw_user is not None:
        return None
    if url.raw_password is not None or proxy_for(url.scheme, host):
        return None
    return make_target((url.scheme, host, port), url.raw_path_qs, headers_for(url))


def make_target(origin: Origin, path: str, headers: Sequence[tuple[str, str]] = ()) -> Target:
    """A target from its parts: `path` with its query, percent-encoded, sent as it is."""
    scheme, host, port = origin
    named = f"[{host}]" if ":" in host else host
    if port != _DEFAULT_PORTS[scheme]:
        named += f":{port}"
    head = (
        f"GET {path} HTTP/1.1\r\nHost: {named}\r\nAccept: */*\r\n"
        "Accept-Encoding: identity\r\nUser-Agent: online_patching\r\n"
    )
    head += "".join(f"{name}: {value}\r\n" for name, value in headers)
    return Target(origin, head.encode("ascii"))


on_forget(target_of.cache_clear)


def request_of(target: Target, start: int, stop: int | None, token: str) -> bytes:
    """The bytes of a request for bytes start..stop (all of it when stop is None) of the version `token`."""
    match = f"If-Match: {if_match(token)}\r\n" if if_match(token) else ""
    if stop is None:
        return target.prefix + f"{match}\r\n".encode("ascii")
    return target.prefix + f"{match}Range: bytes={start}-{stop - 1}\r\n\r\n".encode("ascii")
