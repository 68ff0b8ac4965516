"""Where a redirect may lead: not from https to http, nor from the public internet into a private network.

Not checked: the URL that was asked for (a manifest may name any host, so trust it as you would a
shell script, or run where nothing private can be reached); names that a proxy resolves, for which
only addresses and what this machine knows count; a name that changes its address between our look
and the connection's; and what fsspec's own clients follow.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket

from yarl import URL

from online_patching.errors import StoreError, redact
from online_patching.stores.http_target import proxy_for
from online_patching.stores.retry import TransientError

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MOST_REDIRECTS = 5


async def redirect_target(key: str, first: URL, here: URL, location: str) -> URL:
    """The URL that `location` means in an answer from `here`, when `first` was asked for `key`.

    User and password stay with their origin. StoreError where we do not go.
    """
    try:
        url = here.join(URL(location))
    except ValueError:
        raise StoreError(redact(key), "is redirected to what is not a URL.") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise StoreError(redact(key), "is redirected to what is not http(s).")
    if here.scheme == "https" and url.scheme == "http":
        raise StoreError(redact(key), f"is redirected from https to http ({url.host}). Name it.")
    if url.host != first.host and await _is_inside(url) and not await _is_inside(first):
        raise StoreError(
            redact(key),
            f"is redirected into a private network ({url.host}). If that is meant, name it.",
        )
    if url.origin() == here.origin() and url.raw_user is None:
        return url.with_user(here.user).with_password(here.password) if here.user else url
    return url


async def _is_inside(url: URL) -> bool:
    """Whether a host is this machine or in a private or link-local network."""
    host = url.host or ""
    try:
        return _is_private(host)
    except ValueError:
        pass
    if proxy_for(url.scheme, host):
        return False
    return any(map(_is_private, await addresses_of(host, url.port or 0)))


async def addresses_of(host: str, port: int) -> list[str]:
    """The addresses of a name."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TransientError(f"cannot resolve {host} ({type(error).__name__})") from None
    except UnicodeError:
        raise StoreError(host, "is not a host's name.") from None
    return [str(item[4][0]) for item in found]


def _is_private(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return not (getattr(parsed, "ipv4_mapped", None) or parsed).is_global
