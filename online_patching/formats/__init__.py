"""Bytes of a header -> SlideIndex. One file a container; `read_slide_index` picks the one that fits.

Own index (byte ranges): tiff.py (SVS, generic tiled TIFF, OME-TIFF), dicom.py and zarr.py (OME-Zarr).
Everything else that OpenSlide or tiffslide opens: fallback.py, read region by region.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from online_patching.errors import NotASlideError, ObjectNotFoundError, StoreError
from online_patching.formats import dicom, fallback, tiff, zarr
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
    if not is_remote(uri) and os.path.isdir(uri):
        if not os.access(uri, os.R_OK | os.X_OK):
            raise StoreError(uri, "cannot be listed: permission denied.", "access")
        series = dicom.read_index(uri, slide_id, override, stores)
        if series is not None:
            return series
        raise NotASlideError(
            redact(uri), "a folder that is neither OME-Zarr nor DICOM. Name a slide."
        )
    try:
        size, token = stores.version(uri)
    except ObjectNotFoundError:  # a prefix that does not say what lies below it
        below = _below(uri, slide_id, override, stores) if is_remote(uri) else None
        if below is None:
            raise
        return below
    below = _below(uri, slide_id, override, stores) if is_remote(uri) and not size else None
    if below is not None:
        return below
    head = stores.read(uri, 0, min(size, 132), token) if size else b""
    if dicom.is_dicom(head):
        return dicom.read_file_index(uri, slide_id, override, stores, size, token)
    if tiff.is_tiff(head):  # what it calls damaged is: others would read such headers without end
        found = tiff.read_index(uri, slide_id, override, stores, size, token)
        if found is not None:
            return replace(found, size_bytes=size, token=token)
    found = fallback.read_index(uri, slide_id, override, size, token)
    return replace(found, size_bytes=size, token=token)


def _below(uri: str, slide_id: str, override: Mpp | None, stores: Stores) -> SlideIndex | None:
    """The slide whose objects lie below a remote prefix; None when there is none."""
    if zarr.is_there(uri, stores):
        return zarr.read_index(uri, slide_id, override, stores)
    if uri.startswith(("http://", "https://")):  # which cannot list
        return None
    try:
        return dicom.read_index(uri, slide_id, override, stores)
    except ObjectNotFoundError:
        return None


def find_slides(root: str) -> list[str]:
    """URIs under a folder that may be slides, sorted: every file that is not plainly something
    else, OME-Zarr folders, and one URI for each slide of DICOM instances: their folder where there is
    no other slide or folder in it, or else one of them.

    A file or URL comes back as itself, and so does a folder that may not be listed: reading it says why.
    Hidden files are left out.
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
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        found.append(str(folder))
        return
    files = [p for p in entries if os.path.isfile(p)]
    series = dicom.group_files([str(p) for p in files if dicom.may_be_dicom(p.name)])
    instances = {path for group in series for path in group}
    slides = [
        str(p) for p in files if str(p) not in instances and p.suffix.lower() not in NOT_SLIDES
    ]
    folders = [p for p in entries if os.path.isdir(p)]
    if len(series) == 1 and not slides and not folders:
        slides = [str(folder)]
    else:
        slides += [group[0] for group in series]
    for path in folders:
        if is_zarr(str(path)):
            slides.append(str(path))
        else:
            _walk(path, slides, above | {here})
    found.extend(sorted(slides))


def is_zarr(uri: str) -> bool:
    """Whether a URI names a Zarr store: by its suffix, as an image within one, or, locally, by its metadata."""
    path = urlsplit(uri).path if is_remote(uri) else uri
    if path.rstrip("/").endswith(".zarr"):
        return True
    if is_remote(uri):
        return ".zarr/" in path and "." not in path.rpartition(".zarr/")[2]
    return any(
        os.path.isfile(os.path.join(uri, name)) for name in (".zgroup", ".zarray", "zarr.json")
    )


def slide_id_of(uri: str) -> str:
    """A name for a slide from its URI: the last part without suffixes, safe as a file name."""
    path = (urlsplit(uri).path if is_remote(uri) else uri).rstrip("/")
    store, inside, image = path.rpartition(".zarr/")
    if inside and "." not in image:  # a.zarr/0: every container has a 0
        path = f"{store.removesuffix('.ome')}_{image.replace('/', '_')}"
    name = path.rsplit("/", 1)[-1]
    for suffix in (".ome.tiff", ".ome.tif", ".ome.zarr"):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    else:
        uid = set(name) <= set("0123456789.")  # of a DICOM series: its last number is no suffix
        name = name.rsplit(".", 1)[0] if "." in name[-8:] and not uid else name
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".")
    return safe[:120] or "slide"
