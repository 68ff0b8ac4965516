"""Bytes of a header -> SlideIndex. One file a container; `read_slide_index` picks the one that fits.

Own index (byte ranges): tiff.py (SVS, generic tiled TIFF, OME-TIFF) and zarr.py (OME-Zarr).
Everything else that OpenSlide or tiffslide opens: fallback.py, read region by region.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from online_patching.errors import NotASlideError, ObjectNotFoundError, UnsupportedSlideError
from online_patching.formats import fallback, tiff, zarr
from online_patching.formats.vendors import Mpp
from online_patching.slide_index import SlideIndex
from online_patching.stores import Stores, is_remote, local_path, redact

__all__ = ["find_slides", "read_slide_index"]

NOT_SLIDES = frozenset(
    {
        ".csv",
        ".json",
        ".txt",
        ".md",
        ".yaml",
        ".yml",
        ".xml",
        ".html",
        ".geojson",
        ".parquet",
        ".log",
    }
    | {".py", ".sh", ".zip", ".index", ".bin", ".sha256", ".md5"}
)
DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})


def read_slide_index(
    uri: str, *, mpp: float | tuple[float, float] | None = None, stores: Stores | None = None
) -> SlideIndex:
    """The SlideIndex of one slide, from its headers alone.

    `mpp` overrides the µm/px that the file carries: one value, or (mpp_x, mpp_y), which may differ
    as much as they do (what the file says may not, beyond 5 %). Raises a SlideError
    that says why the slide cannot or should not be used: not a slide, damaged, fluorescence or
    multiplex, no µm/px; or a StoreError when its bytes cannot be read.
    """
    own = stores is None
    stores = stores or Stores()
    override = None if mpp is None else Mpp.override(mpp, uri)
    try:
        return _read(uri if is_remote(uri) else local_path(uri), override, stores)
    finally:
        if own:
            stores.close()


def _read(uri: str, override: Mpp | None, stores: Stores) -> SlideIndex:
    slide_id = slide_id_of(uri)
    if is_zarr(uri):
        return zarr.read_index(uri, slide_id, override, stores)
    if not is_remote(uri) and Path(uri).is_dir():
        if dicom_files(Path(uri)):
            return fallback.read_index(uri, slide_id, override)
        raise NotASlideError(
            redact(uri), "a folder that is neither OME-Zarr nor DICOM. Name a slide."
        )
    size, token = stores.version(uri)
    head = stores.read(uri, 0, min(size, 16), token) if size else b""
    if tiff.is_tiff(head):  # what it calls damaged is: others would read such headers without end
        found = tiff.read_index(uri, slide_id, override, stores, size, token)
        if found is not None:
            return replace(found, size_bytes=size, token=token)
    if is_remote(uri):
        raise UnsupportedSlideError(
            redact(uri),
            "only tiled TIFF/SVS and OME-Zarr are read remotely; copy this slide to disk.",
        )
    return replace(fallback.read_index(uri, slide_id, override), size_bytes=size, token=token)


def find_slides(root: str) -> list[str]:
    """URIs under a folder that may be slides, sorted: every file that is not plainly something
    else, OME-Zarr folders, and one URI for each folder of DICOM instances (or lone instance).

    A file or URL comes back as itself. Hidden files are left out.
    """
    if is_remote(root):
        return [root]
    top = Path(local_path(root))
    if not top.exists():
        raise ObjectNotFoundError(str(top), "there is no such file or folder. Check the path.")
    if top.is_file() or is_zarr(str(top)):
        return [str(top)]
    found: list[str] = []
    _walk(top, found)
    return found


def _walk(folder: Path, found: list[str], above: frozenset[Path] = frozenset()) -> None:
    here = folder.resolve()
    if here in above:
        return  # a symbolic link to a folder above
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    files = [p for p in entries if p.is_file()]
    instances = [p for p in files if p.suffix.lower() in DICOM_SUFFIXES]
    if instances and len(instances) == len(files):
        found.append(str(folder))
        return
    for path in entries:
        if is_zarr(str(path)):
            found.append(str(path))
        elif path.is_dir():
            _walk(path, found, above | {here})
        elif path.is_file() and path.suffix.lower() not in NOT_SLIDES:
            found.append(str(path))


def is_zarr(uri: str) -> bool:
    """Whether a URI names a Zarr store by its suffix or, locally, by its metadata files."""
    path = urlsplit(uri).path if is_remote(uri) else uri
    if path.rstrip("/").endswith(".zarr"):
        return True
    if is_remote(uri):
        return False
    return any((Path(uri) / name).is_file() for name in (".zgroup", "zarr.json"))


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM instances directly inside a folder, sorted."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in DICOM_SUFFIXES)


def slide_id_of(uri: str) -> str:
    """A name for a slide from its URI: the last part without suffixes, safe as a file name."""
    name = (urlsplit(uri).path if is_remote(uri) else uri).rstrip("/").rsplit("/", 1)[-1]
    for suffix in (".ome.tiff", ".ome.tif", ".ome.zarr"):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    else:
        name = name.rsplit(".", 1)[0] if "." in name[-8:] else name
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".")
    return safe[:120] or "slide"
