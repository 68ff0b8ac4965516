"""How an object is asked for over HTTP: its URL, headers, and the request's constant part."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from online_patching.stores.http_headers import on_forget
from online_patching.stores.http_target import Target, target_of


@dataclass(frozen=True, slots=True)
class Address:
    """Where and how to ask for an object. Never shown, logged or stored: it may hold a signature.

    `target` is None where a complete client must ask. A `signed` one is followed nowhere else.
    """

    url: str = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    target: Target | None = field(default=None, repr=False)
    signed: bool = False


@lru_cache(4096)
def plain_address(key: str) -> Address:
    """The address of an http(s) URL: itself. StoreError when it is no URL."""
    return Address(key, (), target_of(key))


on_forget(plain_address.cache_clear)
