"""Features with their labels, in one safetensors file that says what they were made of.

`features` float32 or bfloat16 (n, d), `labels` int64 (n,), paths, groups and splits as packed text;
the info and the key are JSON in the header, so that a stale file is recognised without reading more.
Files of the first form, whose header also held the paths, are read as well.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pathfm.embeddings.container import (
    Column,
    Place,
    pack_text,
    read_places,
    read_tensor,
    to_bf16,
    unpack_text,
    write_container,
)
from pathfm.embeddings.info import FORMAT, EmbeddingsInfo
from pathfm.runtime import PathfmError

_FIRST_FORM = "pathfm.embeddings.1"
_TEXTS = ("paths", "groups", "splits")
_BLOCK_ROWS = 1 << 16
_SPLITS = {"", "train", "val", "test"}
_INFO = TypeAdapter(EmbeddingsInfo)


@dataclass(frozen=True)
class Embeddings:
    """Features (n, d) float32 with labels (n,), class names, paths and, if known, groups and splits.

    splits: "train", "val", "test" or "" of each row, as the data set has them; () where it has none.
    mpp: µm/px of each row's input, (n,) float32, NaN unknown; None where rows do not differ in it
    (then `info.mpp` says it).
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    groups: tuple[str, ...]
    info: EmbeddingsInfo
    splits: tuple[str, ...] = ()
    mpp: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        n, who = len(self.features), f"embeddings {self.info.name!r}"
        if self.features.ndim != 2 or len(self.labels) != n or len(self.paths) != n:
            raise PathfmError(
                f"{who}: features {self.features.shape}, "
                f"{len(self.labels)} labels and {len(self.paths)} paths do not belong together"
            )
        for what, told in (("groups", self.groups), ("splits", self.splits)):
            if told and len(told) != n:
                raise PathfmError(f"{who}: {len(told):,} {what} for {n:,} rows")
        if self.mpp is not None and self.mpp.shape != (n,):
            raise PathfmError(f"{who}: µm/px {self.mpp.shape} for {n:,} rows")
        if n and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise PathfmError(f"{who}: a label outside the classes")
        if unknown := set(self.splits) - _SPLITS:
            raise PathfmError(f"{who}: split {min(unknown)!r} is none of train, val and test")
        check_finite(self.features, self.info.name)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        features = self.features
        blocks = (features[at : at + _BLOCK_ROWS] for at in range(0, len(features), _BLOCK_ROWS))
        shape = (len(features), features.shape[1])
        save_streamed(path, self, self.info, shape, blocks)

    @staticmethod
    def load(path: Path, mmap: bool = False) -> Embeddings:
        """Reads a file that `save` wrote; `PathfmError` for anything else.

        With `mmap` the features stay on disk and are read where they are looked at (float32; those
        kept as bfloat16 are widened in memory). A file without a name is called as its file is.
        """
        meta = read_header(path)
        try:
            _, places = read_places(path)
            info = _INFO.validate_json(meta["info"])
            texts = {name: _texts(path, meta, places, name) for name in _TEXTS}
            return Embeddings(
                features=_floats(path, places["features"], mmap),
                labels=_whole(path, places["labels"]),
                classes=tuple(json.loads(meta["classes"])),
                info=info if info.name else replace(info, name=path.stem),
                mpp=_floats(path, places["mpp"], mmap) if "mpp" in places else None,
                **texts,
            )
        except (OSError, KeyError, ValueError, TypeError, RecursionError, struct.error) as error:
            raise PathfmError(
                f"{path}: damaged embeddings ({_why(error)}); delete the file"
            ) from None


def save_streamed(
    path: Path,
    samples: Any,
    info: EmbeddingsInfo,
    shape: tuple[int, int],
    blocks: Iterable[NDArray[Any]],
) -> None:
    """Writes features that come block by block, and what `samples` says of the rows.

    samples: anything with labels, classes, paths, groups, splits and, if known, mpp. blocks: float32, or uint16 that
    are bfloat16 already, (b, d), n rows in all, finite (`check_finite`); only one is in memory.
    """
    meta = {
        "format": FORMAT,
        "key": info.key,
        "info": json.dumps(vars(info)),
        "classes": json.dumps(samples.classes),
    }
    half = info.storage == "bf16"
    stored = (_as_stored(block, half) for block in blocks)
    columns = {
        "features": Column("BF16" if half else "F32", shape, stored),
        "labels": Column.of(np.asarray(samples.labels, np.int64)),
    }
    if (mpp := getattr(samples, "mpp", None)) is not None:
        columns["mpp"] = Column.of(np.asarray(mpp, np.float32))
    for name in _TEXTS:
        packed, ends = pack_text(getattr(samples, name))
        columns |= {name: Column.of(packed), f"{name}_ends": Column.of(ends)}
    write_container(path, meta, columns)


def _as_stored(block: NDArray[Any], half: bool) -> NDArray[Any]:
    if half and block.dtype != np.uint16:
        return to_bf16(block)
    return block if half else np.asarray(block, np.float32)


def check_finite(features: NDArray[np.float32], name: str, first_row: int = 0) -> None:
    """PathfmError that counts the rows with a number that is not finite."""
    bad, first = 0, -1
    for at in range(0, len(features), _BLOCK_ROWS):
        wrong = np.flatnonzero(~np.isfinite(features[at : at + _BLOCK_ROWS]).all(axis=1))
        if len(wrong) and first < 0:
            first = first_row + at + int(wrong[0])
        bad += len(wrong)
    if bad:
        raise PathfmError(
            f"embeddings {name!r}: {bad:,} of {len(features):,} rows are not finite (first: row "
            f"{first:,}); the backbone has diverged: embed with an earlier checkpoint, or in fp32"
        )


def stored_key(path: Path) -> str | None:
    """The key of the embeddings in a file, or None where there is no usable file."""
    try:
        key = str(read_header(path)["key"])
        read_places(path)
        return key
    except (PathfmError, OSError, ValueError, KeyError, TypeError, struct.error):
        return None


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of an embeddings file, without its features."""
    try:
        meta, _ = read_places(path)
        if meta["format"] not in (FORMAT, _FIRST_FORM):
            raise ValueError(f"format {meta['format']!r}, wanted {FORMAT!r}")
    except FileNotFoundError:
        raise PathfmError(f"no embeddings at {path}: make them with `pathfm embed`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise PathfmError(f"{path}: not an embeddings file of pathfm ({_why(error)})") from None
    return meta


def _floats(path: Path, place: Place, mmap: bool) -> NDArray[np.float32]:
    if place.kind not in ("F32", "BF16"):
        raise ValueError(f"features of kind {place.kind}")
    return read_tensor(path, place, mmap)


def _whole(path: Path, place: Place) -> NDArray[np.int64]:
    if place.kind != "I64" or len(place.shape) != 1:
        raise ValueError(f"labels {place.shape} of kind {place.kind}, wanted (n,) of I64")
    return read_tensor(path, place)


def _texts(
    path: Path, meta: dict[str, Any], places: dict[str, Place], name: str
) -> tuple[str, ...]:
    if meta["format"] == _FIRST_FORM:
        first: Sequence[str] = json.loads(meta.get(name, "[]"))
        return tuple(first)
    packed, ends = (read_tensor(path, places[key]) for key in (name, f"{name}_ends"))
    return unpack_text(packed, ends)


def _why(error: Exception) -> str:
    """The first words of an error."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return " ".join(str(error).split())[:200] or type(error).__name__
