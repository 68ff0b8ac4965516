"""What lies below a prefix, and which of it are slides: files, DICOM series, Zarr stores."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from online_patching.formats import DICOM_SUFFIXES, NOT_SLIDES
from online_patching.stores import Listed, Stores

_GLOB = re.compile(r"[*?\[]")
_ZARR_META = ("zarr.json", ".zgroup")


def has_glob(uri: str) -> bool:
    """Whether a URI of an object store has wildcards (in http(s), `?` begins a query)."""
    return not uri.startswith(("http://", "https://")) and bool(_GLOB.search(uri))


def slides_below(uri: str, stores: Stores) -> list[str]:
    """URIs of the slides below a prefix of an object store, or that match its wildcards, sorted.

    `*` and `?` stay within a folder, `**` does not. A series of DICOM instances is one slide, its folder
    with a trailing slash; so is a Zarr store. A single object is itself.
    """
    fixed = uri[: match.start()] if (match := _GLOB.search(uri)) and has_glob(uri) else uri
    prefix = fixed.rpartition("/")[0] + "/" if fixed != uri else uri
    found = slides_among(stores.list(prefix))
    if fixed == uri:
        return found
    wanted = _pattern(uri)
    return [slide for slide in found if wanted.fullmatch(slide.rstrip("/"))]


def slides_among(listed: Iterable[Listed]) -> list[str]:
    """The slides among listed objects."""
    names = [item.uri for item in listed]
    stores = _zarr_roots(names)
    folders: dict[str, list[str]] = {}
    slides = set(stores)
    for name in names:
        folder, _, last = name.rpartition("/")
        if last and not last.startswith(".") and not _inside(folder, stores):
            folders.setdefault(folder, []).append(name)
    for folder, files in folders.items():
        if all(_suffix(name) in DICOM_SUFFIXES for name in files) and len(files) > 0:
            slides.add(f"{folder}/")
        else:
            slides.update(name for name in files if _suffix(name) not in NOT_SLIDES)
    return sorted(slides)


def _zarr_roots(names: Iterable[str]) -> set[str]:
    """Folders that are Zarr stores: called .zarr, or the topmost ones with a Zarr group's metadata."""
    roots = set()
    for name in names:
        folder, _, last = name.rpartition("/")
        if last in _ZARR_META:
            roots.add(folder)
        if (at := f"{folder}/".find(".zarr/")) >= 0:
            roots.add(folder[: at + len(".zarr")])
    return {root for root in roots if not _inside(root.rpartition("/")[0], roots)}


def _inside(folder: str, roots: set[str]) -> bool:
    while "/" in folder:
        if folder in roots:
            return True
        folder = folder.rpartition("/")[0]
    return False


def _suffix(name: str) -> str:
    last = name.rpartition("/")[2]
    return f".{last.rpartition('.')[2].lower()}" if "." in last else ""


def _pattern(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression in which only `**` crosses folders."""
    parts = []
    for piece in re.split(r"(\*\*/?|\*|\?|\[[^\]/]*\])", glob.rstrip("/")):
        if piece.startswith("**"):
            parts.append("(?:.*/)?" if piece.endswith("/") else ".*")
        elif piece in ("*", "?"):
            parts.append("[^/]" + ("*" if piece == "*" else ""))
        elif piece.startswith("[") and len(piece) > 2:
            parts.append(re.sub(r"^\(\?s:|\)\\[zZ]$", "", fnmatch.translate(piece)))
        else:
            parts.append(re.escape(piece))
    return re.compile("".join(parts), re.DOTALL)
