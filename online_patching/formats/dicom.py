"""DICOM whole-slide images -> SlideIndex: a folder or prefix of instances, or one of its files.

dicom_tags.py reads attributes, dicom_series.py sorts instances into slides and levels, dicom_frames.py
finds the frames, dicom_levels.py lays them out, dicom_codec.py says how they are stored. Decision 0016.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from online_patching.errors import (
    CorpusError,
    NotASlideError,
    ObjectNotFoundError,
    PatchingError,
    StoreError,
    StoreUnavailableError,
    UnsupportedSlideError,
)
from online_patching.formats.dicom_attributes import MANUFACTURER, SAMPLES, BadDicomError
from online_patching.formats.dicom_codec import HEAD_BYTES, codec_of, kind_of
from online_patching.formats.dicom_levels import Table, check_sizes, level_table
from online_patching.formats.dicom_series import (
    Instance,
    parts_of_levels,
    says_no_level,
    slide_error,
    slides_of,
)
from online_patching.formats.dicom_tags import Source, is_dicom
from online_patching.formats.vendors import Mpp, require_mpp
from online_patching.fragments import BadItemsError, joined
from online_patching.slide_index import Codec, Level, SlideIndex, SlideObject
from online_patching.stores import Listed, Stores, is_remote, redact

__all__ = ["group_files", "is_dicom", "may_be_dicom", "read_file_index", "read_index"]

MAX_FILES = 1024
"""Files of one folder that may be instances: a series has about ten."""

_KIND_BYTES = 2**10  # ImageType is among them
_FIRST_BYTES = 64 * 2**10
_MAX_HASHED_BYTES = 2**20
_AT_ONCE = (
    4  # files of a remote series: of each, attributes and tables are read one part after another
)

_Found = TypeVar("_Found")


def may_be_dicom(name: str) -> bool:
    """Whether a file's name is one that DICOM files have: .dcm, .dicom, none, or a UID's last number."""
    suffix = os.path.splitext(name)[1].lower()
    return not name.startswith(".") and (suffix in ("", ".dcm", ".dicom") or suffix[1:].isdigit())


def read_index(uri: str, slide_id: str, override: Mpp | None, stores: Stores) -> SlideIndex | None:
    """The index of the one slide in a folder or prefix; None when no DICOM file lies directly in it.

    Raises UnsupportedSlideError when there are several, and names a file of each.
    """
    base = uri.rstrip("/")
    instances = _instances(uri, base, _children(base, stores), stores)
    if not instances:
        return None
    slides = {key: found for key, found in slides_of(instances).items() if _levels_of(found)}
    if len(slides) > 1:
        names = sorted(_levels_of(found)[0].shown for found in slides.values())
        raise UnsupportedSlideError(
            redact(uri),
            f"holds {len(slides)} slides ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''}): "
            "name one file of the slide that is meant, or give each a folder.",
        )
    if not slides:
        raise _no_level(redact(uri), instances)
    return _index(uri, slide_id, override, stores, next(iter(slides.values())))


def read_file_index(
    uri: str, slide_id: str, override: Mpp | None, stores: Stores, size: int, token: str
) -> SlideIndex:
    """The index of the slide that one file belongs to, with its siblings in the same folder.

    Of a file over http(s), which cannot list, that file alone; `size` and `token` are the file's.
    """
    folder, _, name = uri.rpartition("/")
    own = _instances(uri, folder, [Listed(uri, size, token)], stores)[0]
    try:
        listed = [one for one in _children(folder, stores) if one.uri != uri]
    except StoreUnavailableError:  # it may have siblings, and be a level of theirs
        raise
    except StoreError:  # no listing, or too long a one
        listed = []
    others = _instances(uri, folder, listed, stores, lenient=True)
    found = next(
        group for group in slides_of([own, *others]).values() if any(one is own for one in group)
    )
    levels = _levels_of(found)
    if not levels:
        raise _no_level(redact(uri), [own])
    index = _index(uri, slide_id, override, stores, sorted(found, key=lambda one: one.name))
    if [item.name for item in index.objects] == [name]:
        return replace(index, objects=(), size_bytes=size, token=token)
    return replace(index, beside=True)


def group_files(paths: list[str]) -> list[list[str]]:
    """Local files of one folder by the slide they belong to, those that name the slide best first.

    Files that are no DICOM are left out; one that cannot be read is a group of its own.
    """
    groups: dict[object, list[tuple[bool, str]]] = {}
    stores = Stores()
    for path in paths:
        try:
            size, token = stores.version(path)
            if not is_dicom(stores.read(path, 0, min(size, 132), token)):
                continue
            [found] = _instances(path, os.path.dirname(path), [Listed(path, size, token)], stores)
            groups.setdefault(found.slide, []).append((not found.is_level, path))
        except PatchingError:
            groups[path] = [(False, path)]
    stores.close()
    return sorted([path for _, path in sorted(found)] for found in groups.values())


def _children(base: str, stores: Stores) -> list[Listed]:
    """What lies directly in a folder or below a prefix and has a DICOM file's name."""
    if is_remote(base):
        found = stores.list(base + "/")
        names = [one.uri.removeprefix(base + "/") for one in found]
        return [
            one
            for one, name in zip(found, names, strict=True)
            if name != one.uri and "/" not in name and may_be_dicom(name)
        ]
    try:
        paths = sorted(e.path for e in os.scandir(base) if may_be_dicom(e.name) and e.is_file())
    except OSError as error:
        raise ObjectNotFoundError(base, f"cannot be listed: {error.strerror}.") from None
    return [Listed(path, *stores.version(path)) for path in paths[: MAX_FILES + 1]]


def _instances(
    uri: str, base: str, listed: list[Listed], stores: Stores, lenient: bool = False
) -> list[Instance]:
    """The DICOM files among those listed, their attributes read; `lenient` leaves out those that cannot be read."""
    name = redact(uri)
    if len(listed) > MAX_FILES:
        raise UnsupportedSlideError(
            name, f"more than {MAX_FILES:,} files lie in one folder. Give each series a folder."
        )

    def read(one: Listed, head: bytes | PatchingError, is_other: bool) -> Instance | None:
        try:
            if isinstance(head, PatchingError):
                raise head
            return _instance(name, base, one, head, is_other, stores) if is_dicom(head) else None
        except PatchingError as error:
            if not lenient or isinstance(error, StoreUnavailableError):
                raise
            return None

    heads = _heads(listed, stores)
    jobs = [partial(read, one, *head) for one, head in zip(listed, heads, strict=True)]
    return [found for found in _all(jobs, is_remote(base)) if found is not None]


def _instance(
    name: str, base: str, one: Listed, head: bytes, is_other: bool, stores: Stores
) -> Instance:
    own, fetch = one.uri.removeprefix(base + "/"), partial(_fetch, stores, one)
    try:
        if is_other:  # which slide it belongs to is all that matters
            source = Source(fetch, one.size_bytes, head, _KIND_BYTES)
            return Instance.read(own, one, source, SAMPLES)
        source = Source(fetch, one.size_bytes, head, remote=is_remote(one.uri))
        return Instance.read(own, one, source)
    except BadDicomError as error:
        raise slide_error(name, own, one.size_bytes, error) from None


def _all(jobs: Sequence[Callable[[], _Found]], away: bool) -> list[_Found]:
    """What each job returns; some at a time where each waits for a network. The first error is raised."""
    if not away or len(jobs) < 2:
        return [job() for job in jobs]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="dicom") as pool:
        return [waiting.result() for waiting in [pool.submit(job) for job in jobs]]


def _heads(listed: list[Listed], stores: Stores) -> list[tuple[bytes | PatchingError, bool]]:
    """The first bytes of each file, and whether it is a label or the like.

    Of those only as much as it takes to know it, so that no pixel of theirs comes along.
    """
    wanted = [(one.uri, 0, min(one.size_bytes, _KIND_BYTES), one.token) for one in listed]
    heads = [
        (head, isinstance(head, bytes) and says_no_level(head, one.size_bytes))
        for one, head in zip(listed, stores.read_many(wanted), strict=True)
    ]
    rest = [
        i
        for i, (head, is_other) in enumerate(heads)
        if isinstance(head, bytes) and is_dicom(head) and not is_other
    ]
    longer = [
        (listed[i].uri, 0, min(listed[i].size_bytes, _FIRST_BYTES), listed[i].token) for i in rest
    ]
    for i, head in zip(rest, stores.read_many(longer), strict=True):
        heads[i] = (head, False)
    return heads


def _fetch(stores: Stores, one: Listed, ranges: list[tuple[int, int]]) -> list[bytes]:
    out = []
    for found in stores.read_many([(one.uri, *span, one.token) for span in ranges]):
        if isinstance(found, PatchingError):
            raise found
        out.append(found)
    return out


def _levels_of(instances: list[Instance]) -> list[Instance]:
    return [item for item in instances if item.is_level]


def _no_level(name: str, instances: list[Instance]) -> PatchingError:
    kinds = sorted({item.kind for item in instances})
    if kinds == ["unknown"]:
        return NotASlideError(name, "a DICOM file, but of no whole-slide image.")
    return UnsupportedSlideError(
        name, f"holds no VOLUME image, only {', '.join(kinds)}: their pixels are not read."
    )


def _index(
    uri: str, slide_id: str, override: Mpp | None, stores: Stores, instances: list[Instance]
) -> SlideIndex:
    name = redact(uri)
    levels = parts_of_levels(name, _levels_of(instances))
    check_sizes(name, levels)
    first = levels[0][0]
    found = require_mpp(name, override, _spacing(first), _volume(first))
    parts = [part for level in levels for part in level]
    ends = list(itertools.accumulate(part.size_bytes for part in parts))
    bases = {part.name: end - part.size_bytes for part, end in zip(parts, ends, strict=True)}

    def table(level: list[Instance]) -> Table:
        try:
            kind_of(level[0].found)
            return level_table(name, level, [bases[part.name] for part in level])
        except BadDicomError as error:
            raise slide_error(name, level[0].name, level[0].size_bytes, error) from None

    tables = _all([partial(table, level) for level in levels], is_remote(uri))
    vendor = " ".join(first.found.text(MANUFACTURER).lower().split())[:40]
    try:
        objects = tuple(SlideObject(part.name, part.size_bytes, part.token) for part in parts)
    except CorpusError as error:
        raise UnsupportedSlideError(name, f"{error} cannot be a part of a slide.") from None
    codecs, content_hash = _looked_at(name, levels, tables, parts, ends, stores)
    return SlideIndex(
        slide_id, uri, "dicom", vendor or "dicom", found.x, found.y, found.source,
        _levels(levels, codecs, tables, found), ends[-1], content_hash=content_hash,
        objects=objects,
    )  # fmt: skip


def _spacing(part: Instance) -> Mpp | None:
    spacing = part.found.spacing_mm()
    if spacing is None:
        return None
    return Mpp(spacing[1] * 1e3, spacing[0] * 1e3, "dicom pixel spacing")


def _volume(part: Instance) -> Mpp | None:
    volume = part.found.volume_mm()
    if volume is None:
        return None
    return Mpp(volume[0] * 1e3 / part.width, volume[1] * 1e3 / part.height, "dicom volume size")


def _looked_at(
    name: str, levels: list[list[Instance]], tables: list[Table], parts: list[Instance],
    ends: list[int], stores: Stores,
) -> tuple[list[Codec], str]:  # fmt: skip
    """Each level's codec, by the head of its first stored frame, and a fingerprint of the pixels.

    The fingerprint is of the middle stored frame of the coarsest level: attributes alone cannot tell
    images apart.
    """
    ranges = [(table, 0.0, HEAD_BYTES) for table in tables]
    wanted: list[tuple[str, int, int, str] | None] = []
    for table, share, most in [*ranges, (tables[-1], 0.5, _MAX_HASHED_BYTES)]:
        if len(table.stored):
            start, stop = table.range(int(table.stored[int(share * len(table.stored))]))
            part = parts[bisect.bisect_right(ends, start)]
            base = ends[bisect.bisect_right(ends, start)] - part.size_bytes
            wanted.append((part.uri, start - base, min(stop, start + most) - base, part.token))
        else:
            wanted.append(None)
    answers = iter(stores.read_many([one for one in wanted if one is not None]))
    heads: list[bytes] = []
    for one in wanted:
        head = b"" if one is None else next(answers)
        if isinstance(head, PatchingError):
            raise head
        heads.append(head)
    codecs = []
    for level, head, table in zip(levels, heads, tables, strict=False):
        try:
            first = joined(head, cut=True) if table.fragments else head
            codecs.append(replace(codec_of(level[0].found, first), fragments=table.fragments))
        except (BadDicomError, BadItemsError) as error:
            raise slide_error(name, level[0].name, level[0].size_bytes, error) from None
    return codecs, hashlib.sha256(heads[-1]).hexdigest()


def _levels(
    levels: list[list[Instance]], codecs: list[Codec], tables: list[Table], mpp: Mpp
) -> tuple[Level, ...]:
    out, first = [], levels[0][0]
    for (part, *_), codec, table in zip(levels, codecs, tables, strict=True):
        dx, dy = first.width / part.width, first.height / part.height
        rows, overflow = table.rows()
        out.append(
            Level(part.width, part.height, *part.tile, dx, dy, mpp.x * dx, mpp.y * dy, codec, rows, overflow)
        )  # fmt: skip
    return tuple(out)
