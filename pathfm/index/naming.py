"""Slide ids: what a slide is called in every table, as the name of its files, in sampled.jsonl.

A slide's id is the last part of its URI, safe as a file name. A name that several slides of a cohort
share (100,000 slides in many folders do) is given to none of them: each gets the name, a dash, and
eight hexadecimal digits of the SHA-256 of its URI without credentials and query. So an id follows from
the cohort alone, whatever the order, and whatever of it turns out to be usable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from online_patching.formats import slide_id_of

_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_MOST_BYTES = 180  # a file's name may have 255, and suffixes and temporary names come on top
_HASH_LENGTHS = (8, 16, 64)


def slide_ids(
    addresses: Sequence[str], titles: Sequence[str], taken: Iterable[str] = ()
) -> list[str]:
    """An id for each slide, no two alike even where letter case does not count, none among `taken`.

    `titles` are what slides are called: their URIs, mostly. A picture beside its slide (a.jpg, a.svs)
    does not take the name from it. No two addresses may be alike: ids could not tell them apart.
    """
    names = [slide_id_of(title) for title in titles]
    claims: dict[str, list[tuple[bool, int]]] = {}
    for place, (name, title) in enumerate(zip(names, titles, strict=True)):
        claims.setdefault(name.casefold(), []).append((title.lower().endswith(_PICTURES), place))
    used = {name.casefold() for name in taken}
    plain = {
        _only_one(claimants)
        for key, claimants in claims.items()
        if key not in used and len(key.encode()) <= _MOST_BYTES
    }
    used |= claims.keys()
    out = list(names)
    for place, (name, address) in enumerate(zip(names, addresses, strict=True)):
        if place not in plain:
            out[place] = _hashed(name, address, used)
            used.add(out[place].casefold())
    return out


def _only_one(claimants: list[tuple[bool, int]]) -> int | None:
    """The one that has a name to itself, if there is one: slides go before pictures."""
    slides = [place for is_picture, place in claimants if not is_picture]
    best = slides or [place for _, place in claimants]
    return best[0] if len(best) == 1 else None


def _hashed(name: str, address: str, used: set[str]) -> str:
    digest = hashlib.sha256(address.encode(errors="surrogatepass")).hexdigest()
    short = name.encode()[:_MOST_BYTES].decode(errors="ignore")
    tries = [f"{short}-{digest[:length]}" for length in _HASH_LENGTHS]
    return next((name for name in tries if name.casefold() not in used), tries[-1])
