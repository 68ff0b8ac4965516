"""What lies below a prefix of a bucket: pages of XML, read as strictly as bytes from strangers are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import unquote, unquote_plus
from xml.etree.ElementTree import Element

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import ParseError, fromstring

from online_patching.errors import StoreError, redact
from online_patching.stores.cloud import Place
from online_patching.stores.listing import Listed, check_count

Query = list[tuple[str, str]]
Page = tuple[list[tuple[str, int, str]], str]
"""(name, size in bytes, token) of some objects, and where the next page begins ('' : there is none)."""


async def list_place(
    prefix: str, place: Place, most: int, ask: Callable[[Query], Awaitable[bytes]]
) -> list[Listed]:
    """Every object below the folder that `prefix` names, in no order; `ask` gets a page by its query."""
    folder = place.name.rstrip("/")
    folder = f"{folder}/" if folder else ""
    root = prefix[: len(prefix) - len(place.name)].rstrip("/")
    found: list[Listed] = []
    marker, seen = "", set[str]()
    while True:
        query, parse = _azure(folder, marker) if place.cloud == "az" else _s3(folder, marker)
        objects, marker = _parsed(prefix, await ask(query), parse)
        for name, size_bytes, token in objects:
            if name.startswith(folder) and not name.endswith("/"):  # "folders" that consoles make
                found.append(Listed(f"{root}/{name}", size_bytes, token))
        check_count(prefix, len(found), most)
        if not marker:
            return found
        if marker in seen or len(seen) > most:
            raise StoreError(
                redact(prefix), "its listing does not end: a page leads back to itself."
            )
        seen.add(marker)


def _parsed(prefix: str, data: bytes, parse: Callable[[Element], Page]) -> Page:
    try:
        return parse(fromstring(data))
    except (ParseError, DefusedXmlException, ValueError):
        raise StoreError(
            redact(prefix), "its listing is not one: the server sent other XML."
        ) from None


def _s3(folder: str, marker: str) -> tuple[Query, Callable[[Element], Page]]:
    query = [("list-type", "2"), ("encoding-type", "url"), ("prefix", folder)]
    return query + ([("continuation-token", marker)] if marker else []), _s3_page


def _s3_page(root: Element) -> Page:
    """A page of S3's ListObjectsV2, which GCS speaks too."""
    space = root.tag.rpartition("}")[0] + "}" if "}" in root.tag else ""
    if root.tag != f"{space}ListBucketResult":
        raise ValueError(root.tag)
    # S3 says a space as "+" and a plus as "%2B".
    plain = unquote_plus if root.findtext(f"{space}EncodingType") == "url" else str
    objects = [
        (
            plain(item.findtext(f"{space}Key") or ""),
            _size(item.findtext(f"{space}Size")),
            _token(item.findtext(f"{space}ETag")),
        )
        for item in root.iter(f"{space}Contents")
    ]
    if root.findtext(f"{space}IsTruncated") != "true":
        return objects, ""
    marker = root.findtext(f"{space}NextContinuationToken")
    if not marker:
        raise ValueError("truncated without a token")
    return objects, marker


def _azure(folder: str, marker: str) -> tuple[Query, Callable[[Element], Page]]:
    query = [("restype", "container"), ("comp", "list"), ("prefix", folder)]
    return query + ([("marker", marker)] if marker else []), _azure_page


def _azure_page(root: Element) -> Page:
    """A page of Azure's List Blobs."""
    if root.tag != "EnumerationResults":
        raise ValueError(root.tag)
    objects = []
    for blob in root.iter("Blob"):
        if blob.findtext("Properties/ResourceType") == "directory":
            continue
        name = blob.find("Name")
        text = (name.text or "") if name is not None else ""
        if name is not None and name.get("Encoded") == "true":
            text = unquote(text)
        size = _size(blob.findtext("Properties/Content-Length"))
        objects.append((text, size, _token(blob.findtext("Properties/Etag"))))
    return objects, root.findtext("NextMarker") or ""


def _size(text: str | None) -> int:
    if text is None or not text.isdecimal() or len(text) > 18:
        raise ValueError(text)
    return int(text)


def _token(text: str | None) -> str:
    """An ETag as the header says it: with its quotes."""
    return f'"{text}"' if text and not text.startswith(('"', "W/")) else text or ""
