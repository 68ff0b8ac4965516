"""Slide indexes and masks -> the arrays of records.py, appended slide by slide."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from online_patching.bitmaps import PADDING_BYTES
from online_patching.corpus.records import (
    CODEC_RECORD,
    KINDS,
    LEVEL_RECORD,
    SLIDE_RECORD,
    Packed,
    first_wrong,
    mtime_of,
)
from online_patching.errors import CorpusError, PatchingError, StoreError, redact
from online_patching.mask import ForegroundMask
from online_patching.slide_index import Codec, SlideIndex
from online_patching.stores import atomic_write_text, is_remote

VERSION = 3
"""Of the packed form: what corpus.json says must be this."""

FILES = {name: f"{name}.bin" for name in KINDS}
LEFT_OUT = "left_out.json"
_KNOWN_CODECS = 2**16
_STALE_S = 24 * 3600.0


class Sink(Protocol):
    """Where bytes are appended: a file, or a buffer."""

    def write(self, data: bytes, /) -> Any:
        """Append."""
        ...


class Packer:
    """Appends slides and their masks to one sink an array; holds no more than one of them.

    `keep_secrets` keeps credentials and queries of URIs: for arrays that stay in memory only.
    """

    def __init__(self, sinks: Mapping[str, Sink], keep_secrets: bool) -> None:
        self._sinks, self._keep_secrets = sinks, keep_secrets
        self.bytes = dict.fromkeys(KINDS, 0)
        self.slides = 0
        self._content, self._names = hashlib.sha256(), hashlib.sha256()
        self._codecs: dict[bytes, int] = {}

    def add(self, index: SlideIndex, mask: ForegroundMask) -> None:
        """Append a slide. CorpusError, with nothing written, when it does not fit the layout."""
        if mask.size_px0 != index.dimensions:
            raise CorpusError(
                f"{index.slide_id}: its mask is for a slide of {mask.size_px0} px, "
                f"the slide has {index.dimensions}. Make the masks again."
            )
        texts = self._texts(index)
        record, levels = _records(index, mask, [len(text) for text in texts])
        bits = mask.row_start.astype("<i8").tobytes() + mask.packed.tobytes()
        bits += bytes(-len(bits) % 8)  # row counts are aligned 64-bit words
        levels["codec"] = [self._codec(level.codec) for level in index.levels]
        levels["first_tile"][levels["n_rows"] > 0] += self.bytes["tiles"] // 8
        record["first_level"] = self.bytes["levels"] // LEVEL_RECORD.itemsize
        record["mask_offset"], record["text_offset"] = self.bytes["masks"], self.bytes["text"]
        self._put("text", b"".join(texts))
        for level in index.levels:
            if level.rows is not None:
                self._put("tiles", level.rows.astype("<u8").tobytes())
        self._put("masks", bits)
        self._put("levels", levels.tobytes())
        self._put("slides", record.tobytes())
        line = f"{index.slide_id} {index.digest} {mask.digest}\n"
        self._content.update(line.encode(errors="surrogatepass"))
        self.slides += 1

    def finish(self) -> None:
        """Append what look-ups want behind the last mask."""
        self._put("masks", bytes(PADDING_BYTES))

    @property
    def digest(self) -> str:
        """SHA-256 of the slides and masks added, wherever they are."""
        return self._content.hexdigest()

    @property
    def generation(self) -> str:
        """A name for the arrays as they are: of the digest, of addresses and of the layout."""
        names = self._names.copy()
        names.update(f"{VERSION} {self.digest}".encode())
        return names.hexdigest()[:32]

    def _texts(self, index: SlideIndex) -> list[bytes]:
        """The strings of a slide: id, URI, token, and as JSON what no record holds."""
        rest: dict[str, Any] = {
            name: getattr(index, name)
            for name in ("container", "vendor", "mpp_source", "content_hash", "beside")
        }
        rest["levels"] = [
            {"keys": asdict(level.keys) if level.keys else None, "overflow": level.overflow}
            for level in index.levels
        ]
        rest["objects"] = [astuple(item) for item in index.objects]
        uri = index.uri if self._keep_secrets else redact(index.uri)
        strings = (index.slide_id, uri, index.token, json.dumps(rest))
        return [text.encode(errors="surrogatepass") for text in strings]

    def _codec(self, codec: Codec) -> int:
        """The number of a codec, which is written when it is met first.

        Should every slide bring its own, the oldest are forgotten and may be written once more.
        """
        text = json.dumps(codec.to_json(), sort_keys=True).encode()
        key = hashlib.sha256(text).digest()
        number = self._codecs.get(key)
        if number is None:
            number = self.bytes["codecs"] // CODEC_RECORD.itemsize
            if len(self._codecs) >= _KNOWN_CODECS:
                del self._codecs[next(iter(self._codecs))]
            self._codecs[key] = number
            self._put("codecs", np.array([(self.bytes["text"], len(text))], CODEC_RECORD).tobytes())
            self._put("text", text)
        return number

    def _put(self, name: str, data: bytes) -> None:
        self._sinks[name].write(data)
        self.bytes[name] += len(data)
        if name not in ("tiles", "masks"):  # these are in the slides' and masks' own digests
            self._names.update(data)


def _records(
    index: SlideIndex, mask: ForegroundMask, lengths: list[int]
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """A slide's record and its levels', with offsets from 0 and codec 0, as `check` passes them."""
    record, levels = np.zeros(1, SLIDE_RECORD), np.zeros(len(index.levels), LEVEL_RECORD)
    try:
        _fill_slide(record[0], index, mask, lengths)
        n_rows = _fill_levels(levels, index)
    except OverflowError as error:
        raise CorpusError(
            f"{index.slide_id}: a number of its index is too large ({error})."
        ) from None
    shape = (sum(lengths), n_rows, 8 * (mask.height + 1) + mask.packed.size + PADDING_BYTES)
    text, tiles, masks = (np.broadcast_to(np.uint8(0), size) for size in shape)
    alone = Packed(record, levels, np.zeros(1, CODEC_RECORD), text, tiles, masks)  # type: ignore[arg-type]
    wrong = first_wrong(alone, np.zeros(1, np.int64))
    if wrong:
        raise CorpusError(
            f"{index.slide_id}: its {wrong[1]} cannot be right. Index the slide and make its mask again."
        )
    return record, levels


def _fill_slide(
    record: np.void, index: SlideIndex, mask: ForegroundMask, lengths: list[int]
) -> None:
    record["width_px0"], record["height_px0"] = index.dimensions
    record["mpp_x"], record["mpp_y"] = index.mpp_x, index.mpp_y
    record["n_levels"], record["n_objects"] = len(index.levels), len(index.objects)
    record["reader"] = 2 if index.fallback else int(index.levels[0].rows is None)
    record["mask_width"], record["mask_height"] = mask.width, mask.height
    record["tissue_cells"] = mask.tissue_cells
    record["size_bytes"], record["mtime_ns"] = (
        index.size_bytes,
        (0 if is_remote(index.uri) else mtime_of(index.token, index.size_bytes)),
    )
    for name, length in zip(("slide_id", "uri", "token", "rest"), lengths, strict=True):
        record[f"{name}_bytes"] = length
    record["rich_fractions"] = mask.rich_box_fractions()


def _fill_levels(levels: NDArray[np.void], index: SlideIndex) -> int:
    """Fill in a slide's level records; returns how many tile rows they have together."""
    n_rows = 0
    for record, level in zip(levels, index.levels, strict=True):
        for name in ("width_px", "height_px", "tile_width_px", "tile_height_px", "columns", "parts",
                     "downsample_x", "downsample_y", "mpp_x", "mpp_y", "mpp"):  # fmt: skip
            record[name] = getattr(level, name)
        record["n_rows"] = 0 if level.rows is None else len(level.rows)
        record["first_tile"] = -1 if level.rows is None else n_rows
        n_rows += int(record["n_rows"])
    return n_rows


def pack_folder(root: Path) -> None:
    """Pack slides/ and masks/ of a corpus folder, and make it the current generation.

    See `Corpus.build`. Files are complete and on disk before corpus.json names them.
    """
    names = sorted(path.name for path in (root / "slides").glob("*.index"))
    try:
        (root / "packed").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=root / "packed") as scratch:
            packer, left_out = _write_arrays(root, names, Path(scratch))
            _publish(root, Path(scratch), packer, left_out)
    except OSError as error:
        raise StoreError(
            str(root / "packed"),
            f"cannot be written: {error.strerror}. Free space, or choose another folder.",
        ) from None


def _write_arrays(
    root: Path, names: list[str], scratch: Path
) -> tuple[Packer, list[tuple[str, str]]]:
    """One file an array, on disk; also the slides left out, with reasons."""
    left_out = []
    with ExitStack() as stack:
        sinks = {name: stack.enter_context(open(scratch / FILES[name], "wb")) for name in KINDS}
        packer = Packer(sinks, keep_secrets=False)
        for name in names:
            slide_id = name.removesuffix(".index")
            try:
                index = SlideIndex.load(root / "slides" / name)
                mask = ForegroundMask.load(root / "masks" / f"{slide_id}.png")
                reason = _unusable(index, mask)
                if not reason:
                    packer.add(index, mask)
            except PatchingError as error:
                reason = str(error)
            if reason:
                left_out.append((slide_id, reason))
        packer.finish()
        for sink in sinks.values():
            sink.flush()
            os.fsync(sink.fileno())
    if not packer.slides:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out[:3])
        raise CorpusError(
            f"{root}: no slide can be used ({reasons or 'there are no slide indexes'})."
        )
    return packer, left_out


def _publish(root: Path, scratch: Path, packer: Packer, left_out: list[tuple[str, str]]) -> None:
    """Move the files to their generation's folder, and name it in corpus.json."""
    generation = packer.generation
    folder = root / "packed" / generation
    keep = {generation, _current_generation(root)}  # somebody may be opening the current one
    folder.mkdir(exist_ok=True)
    for name in FILES.values():
        os.replace(scratch / name, folder / name)
    atomic_write_text(folder / LEFT_OUT, json.dumps(left_out, indent=1))
    about = {
        "version": VERSION,
        "digest": packer.digest,
        "generation": generation,
        "slides": packer.slides,
        "bytes": packer.bytes,
    }
    atomic_write_text(root / "corpus.json", json.dumps(about, indent=1))
    _remove_old(root / "packed", keep)


def _remove_old(packed: Path, keep: set[str]) -> None:
    """Delete other generations, and what builds that were killed a day ago have left."""
    for old in packed.iterdir():
        with suppress(FileNotFoundError):  # another build tidies up too
            fresh = old.name.startswith(".") and time.time() - old.stat().st_mtime < _STALE_S
            if old.name not in keep and not fresh:
                shutil.rmtree(old, ignore_errors=True)


def _current_generation(root: Path) -> str:
    try:
        return str(json.loads((root / "corpus.json").read_text())["generation"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _unusable(index: SlideIndex, mask: ForegroundMask) -> str:
    if mask.size_px0 != index.dimensions:
        return f"its mask is for a slide of {mask.size_px0} px, not {index.dimensions}"
    same_mpp = np.allclose(mask.mpp_px0, (index.mpp_x, index.mpp_y))
    if not same_mpp:
        return (
            f"its mask was made at {mask.mpp_px0} µm/px, the slide has {(index.mpp_x, index.mpp_y)}"
        )
    return "" if mask.tissue_cells else "its mask is empty: no tissue was found"
