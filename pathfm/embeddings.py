"""Frozen features on disk: written once for a backbone, a data set and an input size.

One safetensors file: `features` float32 (n, d), `labels` int64 (n,), and everything else as JSON
in its header, so that a stale file is recognised without reading the features.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from online_patching.stores.local import atomic_write_bytes
from pathfm.runtime import PathfmError

_FORMAT = "pathfm.embeddings.1"
_MAX_HEADER_BYTES = 256 << 20


@dataclass(frozen=True)
class EmbeddingsInfo:
    """What features were made of. Two infos with one `key` have the same features."""

    name: str  # for tables: "init", "pretrained"
    backbone: str
    backbone_digest: str
    weights_note: str
    data: str
    data_digest: str
    input_px: int
    precision: str = "fp32"

    @property
    def key(self) -> str:
        """A digest of what the features depend on; the name and the notes are not part of it."""
        parts = (self.backbone_digest, self.data_digest, str(self.input_px), self.precision)
        return hashlib.sha256("\0".join((_FORMAT, *parts)).encode()).hexdigest()


@dataclass(frozen=True)
class Embeddings:
    """Features (n, d) float32 with labels (n,), class names, paths and, if known, groups."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    groups: tuple[str, ...]
    info: EmbeddingsInfo

    def __post_init__(self) -> None:
        n = len(self.features)
        if self.features.ndim != 2 or len(self.labels) != n or len(self.paths) != n:
            raise PathfmError(
                f"embeddings {self.info.name!r}: features {self.features.shape}, "
                f"{len(self.labels)} labels and {len(self.paths)} paths do not belong together"
            )
        if n and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise PathfmError(f"embeddings {self.info.name!r}: a label outside the classes")
        if not np.isfinite(self.features).all():
            bad = int((~np.isfinite(self.features)).any(axis=1).sum())
            raise PathfmError(
                f"embeddings {self.info.name!r}: {bad:,} of {n:,} rows are not finite; "
                f"the backbone has diverged"
            )

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        header = {
            "format": _FORMAT,
            "key": self.info.key,
            "info": json.dumps(vars(self.info)),
            "classes": json.dumps(self.classes),
            "paths": json.dumps(self.paths),
            "groups": json.dumps(self.groups),
        }
        tensors: dict[str, NDArray[Any]] = {
            "features": np.ascontiguousarray(self.features),
            "labels": self.labels,
        }
        atomic_write_bytes(path, safetensors.numpy.save(tensors, header))

    @staticmethod
    def load(path: Path) -> Embeddings:
        """Reads a file that `save` wrote; `PathfmError` for anything else."""
        meta = read_header(path)
        try:
            tensors = safetensors.numpy.load_file(path)
            return Embeddings(
                features=tensors["features"],
                labels=tensors["labels"],
                classes=tuple(json.loads(meta["classes"])),
                paths=tuple(json.loads(meta["paths"])),
                groups=tuple(json.loads(meta["groups"])),
                info=EmbeddingsInfo(**json.loads(meta["info"])),
            )
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise PathfmError(f"{path}: damaged embeddings ({error}); delete the file") from None


def stored_key(path: Path) -> str | None:
    """The key of the embeddings in a file, or None where there is no usable file."""
    try:
        return str(read_header(path)["key"])
    except PathfmError:
        return None


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of an embeddings file, without its features."""
    try:
        with path.open("rb") as file:
            (size_bytes,) = struct.unpack("<Q", file.read(8))
            if size_bytes > _MAX_HEADER_BYTES:
                raise ValueError("no safetensors header")
            meta = json.loads(file.read(size_bytes))["__metadata__"]
        if meta["format"] != _FORMAT:
            raise ValueError(f"format {meta['format']!r}, wanted {_FORMAT!r}")
    except FileNotFoundError:
        raise PathfmError(f"no embeddings at {path}: make them with `pathfm embed`") from None
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise PathfmError(f"{path}: not an embeddings file of pathfm ({error})") from None
    return dict(meta)
