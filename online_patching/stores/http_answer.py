"""The head of an HTTP answer: parsed strictly, and checked against the range that was asked for.

Pure functions, no sockets. What a plain file server or object store never says to a range request
(chunked bodies, redirects, folded headers, HTTP/1.0) is `UnusualAnswerError`: somebody with a
complete HTTP client should ask again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from online_patching.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    RangeIgnoredError,
    ShortReadError,
    StoreError,
    redact,
)
from online_patching.stores.retry import TransientError

MAX_HEAD_BYTES = 16 * 2**10
"""The longest head that is read; S3's have 400 to 1,000 bytes."""

MAX_OBJECT_BYTES = 256 * 2**20
"""The largest tile, chunk or metadata document that is read whole."""

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_HEAD = re.compile(
    r"HTTP/1\.([01]) ([1-9]\d\d)(?: [^\r\n\0]*)?((?:\r\n[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\0]*)*)"
)
_FIELDS = re.compile(
    r"\r\n(connection|content-encoding|content-length|content-range|etag|last-modified"
    r"|retry-after|transfer-encoding):([^\r]*)",
    re.IGNORECASE,
)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")


class UnusualAnswerError(Exception):
    """An answer that is not a plain one to a range request; `why` says what was seen."""


@dataclass(frozen=True, slots=True)
class Head:
    """What an answer's head says about its object: '' or -1 for what it does not say.

    `length` is Content-Length in bytes, `token` the ETag (or else Last-Modified), `encoding` the
    Content-Encoding, `keep` whether the connection may carry another request, `after_s` what an error
    says of when to ask again.
    """

    status: int
    content_range: str = ""
    token: str = ""
    length: int = -1
    keep: bool = True
    encoding: str = ""
    after_s: float = 0.0

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str]) -> Head:
        """The same from another client's parsed answer, whose body that client counts."""
        token = headers.get("ETag") or headers.get("Last-Modified", "")
        encoding = headers.get("Content-Encoding", "")
        after_s = _seconds(headers.get("Retry-After", ""))
        return cls(
            status, headers.get("Content-Range", ""), token, encoding=encoding, after_s=after_s
        )


def parse_head(data: bytes) -> Head:
    """The head of a response, given without its closing blank line.

    Raises UnusualAnswerError for anything that RFC 9112 lets a recipient refuse, and for what only
    a complete client should handle: redirects, interim answers, transfer encodings. Of an error (400
    and above) only the status, Content-Range and Retry-After matter, as its body is not read: object stores
    and proxies say "slow down" in chunks or in HTTP/1.0. It may be kept where its length is plain.
    """
    text = data.decode("latin-1")
    match = _HEAD.fullmatch(text)
    if match is None:
        raise UnusualAnswerError(f"a head that begins {text[:40]!r}")
    status, fields = int(match[2]), _FIELDS.findall(match[3])
    kept = {name.lower(): value.strip(" \t") for name, value in fields}
    if status >= 400:
        return _error_head(status, kept, plain=match[1] == "1" and len(kept) == len(fields))
    if match[1] == "0":
        raise UnusualAnswerError("HTTP/1.0")
    if len(kept) != len(fields):
        raise UnusualAnswerError("a header twice")
    return _head(status, kept)


def _error_head(status: int, kept: dict[str, str], plain: bool) -> Head:
    length = kept.get("content-length", "")
    plain = (
        plain and "transfer-encoding" not in kept and re.fullmatch("[0-9]{1,9}", length) is not None
    )
    keep = plain and kept.get("connection", "keep-alive").lower() == "keep-alive"
    after_s = _seconds(kept.get("retry-after", ""))
    size = int(length) if plain else -1
    return Head(status, kept.get("content-range", ""), "", size, keep, after_s=after_s)


def _head(status: int, kept: dict[str, str]) -> Head:
    if status < 200 or 300 <= status < 400:
        raise UnusualAnswerError(f"HTTP {status}")
    if "transfer-encoding" in kept:
        raise UnusualAnswerError("a transfer encoding")
    length = kept.get("content-length", "")
    if length and not (length.isascii() and length.isdigit() and len(length) <= 18):
        raise UnusualAnswerError(f"Content-Length {length[:40]!r}")
    if status == 206 and not length:
        raise UnusualAnswerError("no Content-Length")
    return Head(
        status,
        kept.get("content-range", ""),
        kept.get("etag") or kept.get("last-modified", ""),
        int(length) if length else -1,
        kept.get("connection", "keep-alive").lower() == "keep-alive",
        kept.get("content-encoding", ""),
    )


def _seconds(retry_after: str) -> float:
    """What a Retry-After means from now on: seconds, or a date. 0 for nothing and for nonsense."""
    if not retry_after or re.fullmatch(r"[0-9]{1,9}", retry_after):
        return float(retry_after or 0)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return 0.0


def check_token(key: str, head: Head, token: str) -> None:
    """ObjectChangedError when the answer is not known to be about the version `token` ('' : any)."""
    if not token or head.token == token or head.status not in (200, 206):
        return
    if head.token:
        raise ObjectChangedError(
            redact(key), "changed since it was indexed (ETag). Index it again."
        )
    raise ObjectChangedError(
        redact(key),
        "had an ETag or Last-Modified when it was indexed, and is answered without: it may be another "
        "object. Index it again.",
    )


def check_encoding(key: str, head: Head) -> None:
    """StoreError when the body is not the object's own bytes: we asked for no encoding."""
    # aws-chunked is how it was uploaded; some object stores repeat it with the plain bytes.
    if head.encoding.lower() not in ("", "identity", "aws-chunked"):
        raise StoreError(
            redact(key),
            f"the server sends it encoded (Content-Encoding {head.encoding[:40]!r}) though asked not "
            "to. Store and serve it without.",
        )


def check_range(key: str, head: Head, start: int, stop: int) -> None:
    """Returns when the answer holds exactly the bytes start..stop; raises what it is otherwise."""
    if head.status == 206 and head.content_range.endswith("/0"):
        raise ShortReadError(redact(key), start, stop, 0)
    if head.status == 206:
        check_encoding(key, head)
        first, last, size = content_range(key, head)
        if first == start and last == stop - 1:
            return check_length(key, head, stop - start)
        if first == start and last == size - 1 < stop - 1:
            raise ShortReadError(redact(key), start, stop, size)
        raise RangeIgnoredError(
            redact(key), f"asked for bytes {start}-{stop - 1}, got {first}-{last}."
        )
    if head.status == 200:
        raise RangeIgnoredError(
            redact(key),
            "the server ignores byte ranges (200 to a Range request); reading patches would download "
            "the whole slide each time. Use a server that answers 206, or copy the slide.",
        )
    if head.status == 416:
        raise ShortReadError(redact(key), start, stop, max(0, content_range(key, head)[2]))
    return raise_for_status(key, head)


def whole_size(key: str, head: Head) -> int:
    """How many bytes the answer to a request for all of an object brings; raises what else it is."""
    raise_for_status(key, head)
    check_encoding(key, head)
    if head.length < 0:
        raise UnusualAnswerError("no Content-Length")
    check_size(key, head.length, MAX_OBJECT_BYTES)
    return head.length


def check_length(key: str, head: Head, wanted: int) -> None:
    """Whether the body will have the `wanted` bytes, where the head says how many it has."""
    if head.length > wanted:
        raise sent_more(key, wanted)
    if 0 <= head.length < wanted:
        raise TransientError(f"{head.length:,} bytes where {wanted:,} were promised")


def check_size(key: str, wanted: int, most: int) -> None:
    """StoreError for more than may be read whole."""
    if wanted > most:
        raise StoreError(
            redact(key), f"a read of {wanted:,} bytes; at most {most:,} are read whole."
        )


def sent_more(key: str, limit: int) -> RangeIgnoredError:
    """The error for a body larger than what was asked for."""
    return RangeIgnoredError(redact(key), f"sent more than the {limit:,} bytes asked for.")


class RefusedError(StoreError):
    """HTTP 400, 401 or 403: an expired signature is answered so, among other things."""


def raise_for_status(key: str, head: Head) -> None:
    """Returns for 200 only."""
    name, status = redact(key), head.status
    if status in (404, 410):
        raise ObjectNotFoundError(name, f"HTTP {status}: there is no such object. Check the URL.")
    if status in (401, 403):
        raise RefusedError(name, f"HTTP {status}: access refused. Check the credentials.", "access")
    if status == 412:
        raise ObjectChangedError(name, "changed since it was indexed (HTTP 412). Index it again.")
    if status in _RETRIED:
        raise TransientError(f"HTTP {status}", head.after_s)
    if status == 400:
        raise RefusedError(name, "HTTP 400, which is no answer to this request.")
    if status != 200:
        raise StoreError(name, f"HTTP {status}, which is no answer to this request.")


def content_range(key: str, head: Head) -> tuple[int, int, int]:
    """First and last byte and the object's size; -1 for what a 416 or an error does not say."""
    match = _CONTENT_RANGE.fullmatch(head.content_range)
    if match:
        first, last, size = (int(part) if part else -1 for part in match.groups())
        return first, last, size
    if head.status == 206:
        raise RangeIgnoredError(
            redact(key), f"the server's Content-Range {head.content_range[:60]!r} is not one."
        )
    return -1, -1, -1
