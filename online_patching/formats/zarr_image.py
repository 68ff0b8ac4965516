"""Which arrays of a Zarr store are the slide's levels: OME multiscales, bioformats2raw containers, plain arrays.

Only metadata documents are read here, all that are needed at the same time, and consolidated ones where a
store has them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from online_patching.errors import (
    DamagedSlideError,
    NotASlideError,
    ObjectNotFoundError,
    PatchingError,
    UnsupportedSlideError,
)
from online_patching.formats.vendors import Mpp
from online_patching.formats.zarr_metadata import (
    MAX_DOCUMENT_BYTES,
    BadDocumentError,
    ZarrArray,
    parse_array,
    parse_json,
)
from online_patching.stores import Stores

_ROOT = ("zarr.json", ".zgroup", ".zarray", ".zattrs", ".zmetadata")
_MAX_LEVELS = 32
_TO_UM = {
    "micrometer": 1.0, "micron": 1.0, "um": 1.0, "µm": 1.0, "millimeter": 1e3, "nanometer": 1e-3,
    "meter": 1e6, "centimeter": 1e4,
}  # fmt: skip
_RGB = ({"FF0000", "00FF00", "0000FF"}, {"RED", "GREEN", "BLUE"})
_STAINS = re.compile(
    r"\b(dapi|fitc|tritc|cy[2357]|hoechst|texas ?red|alexa|af\d{3}|opal|gfp|rfp|cd\d+)",
    re.IGNORECASE,
)


class Documents:
    """The metadata documents of a store: parsed, by path; `raw` are the bytes of those fetched."""

    def __init__(self, uri: str, stores: Stores) -> None:
        self.uri, self._stores = uri, stores
        self.raw: dict[str, bytes] = {}
        self._parsed: dict[str, dict[str, Any]] = {}
        self._asked: set[str] = set()
        self.refused: PatchingError | None = None

    def fetch(self, names: list[str]) -> None:
        """Read those that are not known yet, at the same time. What is not there stays unknown."""
        names = [n for n in names if n not in self._parsed and n not in self._asked]
        self._asked.update(names)
        keys = [f"{self.uri.rstrip('/')}/{name}" for name in names]
        wanted: list[tuple[str, tuple[str, int, int, str]]] = []
        versions = self._stores.version_many(keys)
        for name, key, found in zip(names, keys, versions, strict=True):
            if isinstance(found, PatchingError):
                self._absent(found)
            elif found[0] > MAX_DOCUMENT_BYTES and name.endswith(".zmetadata"):
                continue  # what it holds can be read one by one
            elif found[0] > MAX_DOCUMENT_BYTES:
                raise DamagedSlideError(
                    self.uri, f"its metadata document {name[:80]} is {found[0]:,} bytes long."
                )
            else:
                wanted.append((name, (key, 0, found[0], found[1])))
        bodies = self._stores.read_many([request for _, request in wanted])
        for (name, _), body in zip(wanted, bodies, strict=True):
            if isinstance(body, PatchingError):
                self._absent(body)
                continue
            self.raw[name] = body
            try:
                self._learn(name, parse_json(body))
            except BadDocumentError as error:
                raise DamagedSlideError(self.uri, f"its {name[:80]} is {error}.") from None

    def _absent(self, error: PatchingError) -> None:
        # Buckets that may not be listed answer 403 for what is not there.
        if not isinstance(error, ObjectNotFoundError) and error.code != "access":
            raise error
        if error.code == "access":
            self.refused = error

    def _learn(self, name: str, parsed: dict[str, Any]) -> None:
        """Keep a document, and those that it consolidates."""
        folder, _, last = name.rpartition("/")
        base = f"{folder}/" if folder else ""
        inside: Any = {}
        if last == ".zmetadata":
            inside = parsed.get("metadata")
        else:
            self._parsed[name] = parsed
        if last == "zarr.json" and isinstance(parsed.get("consolidated_metadata"), dict):
            inside = parsed["consolidated_metadata"].get("metadata")
        if isinstance(inside, dict):
            ending = "" if last == ".zmetadata" else "/zarr.json"
            for path, one in inside.items():
                if isinstance(one, dict):
                    self._parsed.setdefault(f"{base}{path}{ending}", one)

    def get(self, folder: str, name: str) -> dict[str, Any] | None:
        """A document of a folder, where there is one."""
        return self._parsed.get(f"{folder}/{name}" if folder else name)

    def load(self, folder: str) -> None:
        """Read what a group or array may have."""
        self.fetch([f"{folder}/{name}" if folder else name for name in _ROOT])

    def load_arrays(self, folders: list[str], version: int) -> None:
        """Read the documents of arrays."""
        name = "zarr.json" if version == 3 else ".zarray"
        self.fetch([f"{folder}/{name}" for folder in folders])

    def version(self, folder: str) -> int:
        """3 or 2, or 0 where there is neither a group nor an array."""
        if self.get(folder, "zarr.json") is not None:
            return 3
        return 2 if self.get(folder, ".zgroup") or self.get(folder, ".zarray") else 0

    def attributes(self, folder: str) -> dict[str, Any]:
        """What users store with a group or array."""
        three = self.get(folder, "zarr.json")
        found = self.get(folder, ".zattrs") if three is None else three.get("attributes")
        return found if isinstance(found, dict) else {}

    def array(self, folder: str) -> ZarrArray | None:
        """The array of a folder; None where there is none. BadDocumentError and NotReadError as parse_array."""
        found = self.get(folder, "zarr.json") or self.get(folder, ".zarray")
        return None if found is None or found.get("node_type") == "group" else parse_array(found)

    def fingerprint(self) -> str:
        """SHA-256 of what was fetched so far."""
        return hashlib.sha256(repr(sorted(self.raw.items())).encode()).hexdigest()


@dataclass(frozen=True)
class ZarrImage:
    """The slide in a store: its arrays' paths, finest first, their axes, and µm/px of the first.

    `axes` is "" for a plain array that does not name them.
    """

    container: str
    paths: tuple[str, ...]
    axes: str
    mpp: Mpp | None
    fingerprint: str


def find_image(name: str, documents: Documents) -> ZarrImage:
    """The only image of a store. NotASlideError when there is none, UnsupportedSlideError for several."""
    base = _base(name, documents)
    token = documents.fingerprint()
    attributes = documents.attributes(base)
    found = documents.get(base, "zarr.json") or documents.get(base, ".zarray")
    if found is not None and found.get("node_type", "array") == "array":
        return ZarrImage("zarr", (base,), _dimension_names(found, attributes), None, token)
    ome = attributes.get("ome")
    multiscale = _multiscale(name, ome if isinstance(ome, dict) else attributes)
    _refuse_stains(name, ome if isinstance(ome, dict) else attributes)
    axes = _axes(name, multiscale)
    datasets = multiscale.get("datasets")
    if not isinstance(datasets, list) or not 0 < len(datasets) <= _MAX_LEVELS:
        raise DamagedSlideError(
            name, f"its multiscale lists no usable datasets ({datasets!r:.60})."
        )
    paths = tuple(_joined(base, _safe_path(name, dataset)) for dataset in datasets)
    documents.load_arrays(list(paths), documents.version(base))
    return ZarrImage("ome-zarr", paths, axes, _mpp(multiscale, datasets[0], axes), token)


def _base(name: str, documents: Documents) -> str:
    """The folder of the image: the store itself, or the one of a bioformats2raw container."""
    documents.load("")
    if not documents.version(""):
        if documents.refused is not None:
            raise documents.refused
        raise NotASlideError(name, "no Zarr array or group is there (zarr.json, .zgroup, .zarray).")
    attributes = documents.attributes("")
    ome = attributes.get("ome")
    if isinstance(ome, dict):
        attributes = ome
    if "bioformats2raw.layout" not in attributes or "multiscales" in attributes:
        return ""
    documents.load("0")
    documents.fetch(["1/zarr.json", "1/.zgroup"])
    if documents.version("1"):
        raise UnsupportedSlideError(
            name,
            "a container of several images (bioformats2raw). Point at one of them, such as …/0.",
        )
    return "0"


def _multiscale(name: str, attributes: dict[str, Any]) -> dict[str, Any]:
    found = attributes.get("multiscales")
    first = found[0] if isinstance(found, list) and found else None
    if not isinstance(first, dict):
        plate = (
            "a plate of wells" if "plate" in attributes else "a Zarr group without OME multiscales"
        )
        raise NotASlideError(name, f"{plate}. Point at an image's group, or at an array.")
    return first


def _refuse_stains(name: str, attributes: dict[str, Any]) -> None:
    """Refuse channels that say of themselves that they are not red, green and blue."""
    omero = attributes.get("omero")
    channels = omero.get("channels") if isinstance(omero, dict) else None
    if not isinstance(channels, list) or len(channels) > 1000:
        return
    channels = [one for one in channels if isinstance(one, dict)]
    labels = [str(one.get("label", ""))[:80] for one in channels]
    stain = next((label for label in labels if _STAINS.search(label)), None)
    colours = [str(one.get("color", "")).upper()[-6:] for one in channels[:3]]
    # Writers that know no colours give all the same, or none.
    odd = len(set(colours)) == 3 and set(colours) not in _RGB
    if stain is not None or odd:
        told = f"a channel {stain!r}" if stain is not None else f"channels of colours {colours}"
        many = len(channels) > 4
        raise UnsupportedSlideError(
            name, f"{told}: {'multiplex' if many else 'fluorescence'}, not a stained slide.",
            "multiplex" if many else "fluorescence",
        )  # fmt: skip


def _axes(name: str, multiscale: dict[str, Any]) -> str:
    raw = multiscale.get("axes", ["t", "c", "z", "y", "x"])
    if not isinstance(raw, list) or not 2 <= len(raw) <= 5:
        raise DamagedSlideError(name, f"its multiscale has axes {raw!r:.60}.")
    axes = "".join(str(a.get("name") if isinstance(a, dict) else a)[:8] for a in raw)
    if not set("yx") <= set(axes) <= set("tczyx") or len(set(axes)) != len(axes):
        raise UnsupportedSlideError(name, f"axes {axes!r}; only t, c, z, y, x are read.")
    return axes


def _dimension_names(document: dict[str, Any], attributes: dict[str, Any]) -> str:
    """Axes that a plain array names one letter each, as xarray and Zarr v3 do; "" otherwise."""
    names = document.get("dimension_names") or attributes.get("_ARRAY_DIMENSIONS")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        return ""
    short = {"channel": "c", "channels": "c", "s": "c", "rgb": "c", "band": "c"}
    axes = "".join(short.get(n.lower(), n.lower()) for n in names)
    whole = set("yx") <= set(axes) <= set("tczyx")
    return axes if whole and len(set(axes)) == len(axes) == len(names) else ""


def _safe_path(name: str, dataset: Any) -> str:
    path = str(dataset.get("path", "")) if isinstance(dataset, dict) else ""
    parts = path.strip("/").split("/")
    odd = any(mark in path for mark in ("://", "%", "\\", "?", "#")) or not path.isprintable()
    if not path or path.startswith("/") or odd or {"", ".", ".."} & set(parts) or len(path) > 500:
        raise DamagedSlideError(name, f"a dataset path {path[:60]!r} leaves the store.")
    return "/".join(parts)


def _joined(base: str, path: str) -> str:
    return f"{base}/{path}" if base else path


def _mpp(multiscale: dict[str, Any], dataset: dict[str, Any], axes: str) -> Mpp | None:
    """Level 0's scale times the multiscale's own, in µm, when the axes carry a unit of length."""
    try:
        units = {a["name"]: _TO_UM[a["unit"]] for a in multiscale["axes"] if a["name"] in "yx"}
        um = dict(units)
        for holder in (dataset, multiscale):
            for transform in holder.get("coordinateTransformations", [])[:8]:
                if transform["type"] == "scale":
                    if len(transform["scale"]) != len(axes):
                        return None
                    um = {a: um[a] * float(transform["scale"][axes.index(a)]) for a in "yx"}
        return Mpp(um["x"], um["y"], "ome metadata")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
