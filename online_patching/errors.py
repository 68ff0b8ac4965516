"""Everything that can go wrong between a slide's URI and a patch, as one tree.

PatchingError
├── SlideError                 something about one slide: list it and go on
│   ├── NotASlideError         not a container we, OpenSlide or tiffslide know
│   ├── UnsupportedSlideError  a real image that must not be used (fluorescence, multiplex, ...)
│   ├── DamagedSlideError      truncated, or its headers lie
│   │   ├── ShortReadError     the object ends before the bytes its index promises
│   │   └── TileDecodeError    one tile's bytes do not decode to the tile they claim to be
│   └── MppError               no µm/px, or one outside the sane range
├── StoreError                 something about reading bytes
│   ├── ObjectNotFoundError    404 / no such file
│   ├── RangeIgnoredError      a server that answers a Range request with something else
│   ├── ObjectChangedError     the object is not the one that was indexed (size, mtime, ETag)
│   └── StoreUnavailableError  still failing after every retry
├── MaskError                  a foreground mask that cannot be used
├── CorpusError                a corpus folder that is missing, stale or damaged
├── SamplerError               nothing can be drawn under the conditions asked
└── LoaderError                the stream of batches cannot go on
    ├── FailureBudgetError     too many bad draws
    ├── StateMismatchError     a saved state that belongs to another stream
    └── WorkerDiedError        a loader process ended without saying why

Messages say what, where, the numbers and the remedy, in one line; the facts are fields too. Every error
has a `code`, one of CODES: what tables of refused slides are counted by. Codes stay what they are.
"""

from __future__ import annotations

import re

CODES = {
    # about a slide
    "not_a_slide": "no reader at hand recognises a whole-slide image in it",
    "damaged": "its headers contradict its bytes, or themselves",
    "truncated": "it ends before the bytes its headers promise: cut short, or still uploading",
    "bad_tile": "a tile's bytes do not decode to that tile",
    "unsupported": "an image, but not in a way of storing it that can be read here",
    "fluorescence": "a fluorescence image: not what an H&E or IHC model is trained on",
    "multiplex": "many stains in channels of their own: not an RGB image",
    "no_mpp": "it carries no µm/px; give it in an override table",
    "bad_mpp": "µm/px that no scanner makes, or that differ by axis; give them in an override table",
    "duplicate": "another slide of the cohort has the same address once queries are left out",
    "slide": "something else about the slide, said in the reason",
    # about reading bytes
    "missing": "there is no such file or object, or it may not be seen",
    "access": "the store refuses these credentials, or the file's permissions do",
    "no_ranges": "a server that does not honour byte ranges",
    "changed": "other bytes than those that were indexed",
    "unavailable": "the store kept failing past every retry",
    "store": "something else about reading bytes, said in the reason",
    # about what is made of slides
    "mask": "a foreground mask that is empty, damaged or another slide's",
    "corpus": "a corpus folder that is missing, stale or damaged",
    "sampler": "nothing can be drawn under the conditions asked for",
    "loader": "the stream of batches cannot go on",
    "too_many_failures": "more draws failed than the run allows",
    "other_stream": "a saved state of another stream",
    "worker": "a loader process ended without saying why",
    "error": "anything else",
}
"""What each `code` of an error means, in a few words."""

_NEXT_LINK = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*://)")  # not the '::' of an IPv6 address


def redact(uri: str) -> str:
    """A URI without user and password and, for http(s), without query and fragment.

    What is left may be logged and stored. In object stores `?` and `#` are part of a name. Chained
    fsspec URIs (`simplecache::https://...`) are redacted link by link. Any string at all has an answer:
    messages about URIs that are none are made with it too.
    """
    links = _NEXT_LINK.split(uri)
    if len(links) > 1:
        return "::".join(map(redact, links))
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    if scheme.lower() in ("http", "https"):
        rest = re.split("[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    if scheme.lower() in ("abfs", "abfss") and ":" not in host:  # container@account
        return uri
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


class PatchingError(Exception):
    """Root of every error this package raises on purpose. `code` names its kind in tables."""

    code = "error"


class SlideError(PatchingError):
    """One slide cannot be used; `uri` names it and `reason` says why, without the URI."""

    code = "slide"

    def __init__(self, uri: str, reason: str) -> None:
        uri = redact(uri)
        super().__init__(f"{_in_a_line(uri)}: {reason}")
        self.uri, self.reason = uri, reason

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


class NotASlideError(SlideError):
    """The file is not a whole-slide image that any reader at hand recognises."""

    code = "not_a_slide"


class UnsupportedSlideError(SlideError):
    """The file is an image, but not one to train an H&E or IHC model on; `code` says which kind."""

    code = "unsupported"

    def __init__(self, uri: str, reason: str, code: str = "unsupported") -> None:
        super().__init__(uri, reason)
        self.code = code


class DamagedSlideError(SlideError):
    """The slide is truncated or its headers contradict its bytes."""

    code = "damaged"


class ShortReadError(DamagedSlideError):
    """The object ended before the bytes its tile index promises."""

    code = "truncated"

    def __init__(self, uri: str, start: int, stop: int, size_bytes: int) -> None:
        super().__init__(
            uri,
            f"tile bytes {start:,}-{stop:,} lie past the end of the object ({size_bytes:,} bytes). "
            "The slide is truncated or still uploading: copy it again, or leave it out.",
        )
        self.start, self.stop, self.size_bytes = start, stop, size_bytes


class TileDecodeError(DamagedSlideError):
    """A tile's bytes do not decode to the tile they claim to be."""

    code = "bad_tile"

    def __init__(self, uri: str, level: int, tile: int, why: str) -> None:
        super().__init__(uri, f"level {level} tile {tile} does not decode: {why}")
        self.level, self.tile, self.why = level, tile, why


class MppError(SlideError):
    """The slide carries no µm per pixel, or (code bad_mpp) one that no scanner makes."""

    code = "no_mpp"

    def __init__(self, uri: str, reason: str, code: str = "no_mpp") -> None:
        super().__init__(uri, reason)
        self.code = code


class StoreError(PatchingError):
    """Bytes could not be read; `key` names the object without credentials or query.

    `code` says so where it was for want of rights ("access").
    """

    code = "store"

    def __init__(self, key: str, reason: str, code: str | None = None) -> None:
        key = redact(key)
        super().__init__(f"{_in_a_line(key)}: {reason}")
        self.key, self.reason = key, reason
        self.code = code or self.code

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


class ObjectNotFoundError(StoreError):
    """There is no such object (or it may not be seen)."""

    code = "missing"


class RangeIgnoredError(StoreError):
    """The server did not honour a byte range; reading on would download whole slides."""

    code = "no_ranges"


class ObjectChangedError(StoreError):
    """The object is not the one whose headers were indexed."""

    code = "changed"


class StoreUnavailableError(StoreError):
    """The store kept failing past every retry."""

    code = "unavailable"


class MaskError(PatchingError):
    """A foreground mask is empty, damaged or belongs to another slide."""

    code = "mask"


class CorpusError(PatchingError):
    """A corpus folder is missing, stale or damaged."""

    code = "corpus"


class SamplerError(PatchingError):
    """No patch can be drawn under the conditions asked for."""

    code = "sampler"


class LoaderError(PatchingError):
    """The stream of batches cannot go on."""

    code = "loader"


class FailureBudgetError(LoaderError):
    """More draws failed than the run allows."""

    code = "too_many_failures"


class StateMismatchError(LoaderError):
    """A saved loader state belongs to another corpus, mask set or sampler."""

    code = "other_stream"


class WorkerDiedError(LoaderError):
    """A loader process ended without handing over an error."""

    code = "worker"


def _in_a_line(name: str) -> str:
    """A name as a message may hold it: line ends and halves of characters are escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _rebuild(
    kind: type[Exception], args: tuple[object, ...], fields: dict[str, object]
) -> Exception:
    """Unpickle an error whose __init__ takes other arguments than Exception.args holds."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error
