"""Slides and masks as a few flat arrays: records of fixed size, tile rows, bitmaps, text.

    slides   one SLIDE_RECORD a slide           tiles   packed tile rows (slide_index.pack_rows)
    levels   one LEVEL_RECORD a level           masks   row counts and packed rows of bitmaps
    codecs   one CODEC_RECORD a distinct codec  text    ids, URIs, tokens, JSON of the rest

Read in place, from memory or a mapped file (packing.py writes them). Nothing read is trusted:
`check` looks at a slide's records before they are followed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from online_patching.bitmaps import PADDING_BYTES
from online_patching.errors import CorpusError, PatchingError
from online_patching.mask import QUANTILE_SIDES_UM
from online_patching.slide_index import (
    MPP_SANE_RANGE,
    ChunkKeys,
    Codec,
    Level,
    SlideIndex,
    SlideObject,
)

SLIDE_RECORD = np.dtype(
    [
        ("width_px0", "<i8"), ("height_px0", "<i8"), ("mpp_x", "<f8"), ("mpp_y", "<f8"),
        ("first_level", "<i8"), ("n_levels", "<i4"), ("reader", "<i4"),
        ("mask_offset", "<i8"), ("mask_width", "<i4"), ("mask_height", "<i4"), ("tissue_cells", "<i8"),
        ("size_bytes", "<i8"), ("mtime_ns", "<i8"),
        ("text_offset", "<i8"), ("slide_id_bytes", "<i4"), ("uri_bytes", "<i4"),
        ("token_bytes", "<i4"), ("rest_bytes", "<i4"), ("n_objects", "<i4"), ("pad", "<i4"),
        ("rich_fractions", "<f4", (len(QUANTILE_SIDES_UM),)),
    ]
)  # fmt: skip
"""One slide, 208 bytes: what a draw needs, and where the rest lies.

`size_bytes` and `mtime_ns` are those of a local file when it was indexed (mtime 0: not known).
`n_objects` is 0 where the slide lies in one object, its URI.
"""

LEVEL_RECORD = np.dtype(
    [
        ("width_px", "<i8"), ("height_px", "<i8"), ("tile_width_px", "<i4"), ("tile_height_px", "<i4"),
        ("columns", "<i8"), ("downsample_x", "<f8"), ("downsample_y", "<f8"),
        ("mpp_x", "<f8"), ("mpp_y", "<f8"), ("mpp", "<f8"),
        ("codec", "<i4"), ("parts", "<i4"), ("first_tile", "<i8"), ("n_rows", "<i8"),
    ]
)  # fmt: skip
"""One level, 104 bytes; a slide's levels in its index's order. `first_tile` is its first row of
`tiles`, of `n_rows`: one a piece, row-major; -1 where tiles have names instead of byte ranges."""

CODEC_RECORD = np.dtype([("text_offset", "<i8"), ("text_bytes", "<i8")])
"""Where a codec's JSON lies in the text."""

READERS = ("ranges", "chunks", "fallback")
"""What a record's `reader` counts: byte ranges of objects, Zarr chunks of a name each, another library."""

KINDS: dict[str, np.dtype[Any]] = {
    "slides": SLIDE_RECORD,
    "levels": LEVEL_RECORD,
    "codecs": CODEC_RECORD,
    "text": np.dtype("u1"),
    "tiles": np.dtype("<u8"),
    "masks": np.dtype("u1"),
}
MAX_LEVELS = 1024
_AGAIN = "Run `pathfm foreground` again."


class Packed(NamedTuple):
    """The arrays, by the names of KINDS."""

    slides: NDArray[np.void]
    levels: NDArray[np.void]
    codecs: NDArray[np.void]
    text: NDArray[np.uint8]
    tiles: NDArray[np.uint64]
    masks: NDArray[np.uint8]


def mtime_of(token: str, size_bytes: int) -> int:
    """When a local file was last written, ns, as its version token says; 0 for any other token."""
    size, _, mtime_ns = token.partition("-")
    known = size == str(size_bytes) and mtime_ns.isdecimal() and len(mtime_ns) <= 19
    return int(mtime_ns) if known and int(mtime_ns) < 2**63 else 0


def read_codec(packed: Packed, number: int) -> Codec:
    """The codec of a number that `check` has seen."""
    start, length = packed.codecs[number].tolist()
    if not 0 <= start <= start + length <= len(packed.text):
        raise CorpusError(f"codec {number} of the corpus lies outside its text. {_AGAIN}")
    try:
        return Codec.from_json(json.loads(packed.text[start : start + length].tobytes()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorpusError(f"codec {number} of the corpus is damaged ({error}). {_AGAIN}") from None


def read_text(packed: Packed, row: int, which: int) -> str:
    """String number `which` (id, URI, token, JSON) of a slide that `check` has seen."""
    record = packed.slides[row]
    lengths = [int(record[f"{name}_bytes"]) for name in ("slide_id", "uri", "token", "rest")]
    start = int(record["text_offset"]) + sum(lengths[:which])
    try:
        return packed.text[start : start + lengths[which]].tobytes().decode(errors="surrogatepass")
    except UnicodeDecodeError as error:
        raise CorpusError(f"slide {row} of the corpus: damaged text ({error}). {_AGAIN}") from None


def read_index(packed: Packed, codecs: Sequence[Codec], row: int) -> SlideIndex:
    """The SlideIndex of a row that `check` has seen; its tile rows are views of `tiles`."""
    record = packed.slides[row]
    first = int(record["first_level"])
    names = [name for name in LEVEL_RECORD.names or () if name not in ("columns", "mpp")]
    try:
        rest = json.loads(read_text(packed, row, 3))
        levels = []
        for k, extra in zip(range(int(record["n_levels"])), rest.pop("levels"), strict=True):
            fields = {name: packed.levels[first + k][name].item() for name in names}
            start, n_rows = fields.pop("first_tile"), fields.pop("n_rows")
            fields["codec"] = codecs[fields["codec"]]
            fields["rows"] = packed.tiles[start : start + n_rows] if n_rows else None
            fields["overflow"] = tuple((int(a), int(b)) for a, b in extra["overflow"])
            fields["keys"] = ChunkKeys(**extra["keys"]) if extra["keys"] else None
            levels.append(Level(**fields))
        rest["objects"] = tuple(SlideObject(*item) for item in rest["objects"])
        slide_id, uri, token = (read_text(packed, row, which) for which in range(3))
        return SlideIndex(
            slide_id, uri, levels=tuple(levels), token=token, size_bytes=int(record["size_bytes"]),
            mpp_x=float(record["mpp_x"]), mpp_y=float(record["mpp_y"]), **rest,
        )  # fmt: skip
    except CorpusError:
        raise
    except (
        PatchingError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise CorpusError(f"slide {row} of the corpus is damaged ({error}). {_AGAIN}") from None


def check(packed: Packed, rows: NDArray[np.int64]) -> None:
    """CorpusError unless every number of these slides' records can be followed safely.

    Looks at records only: what tile rows, bits and text hold is judged where it is used.
    """
    wrong = first_wrong(packed, rows)
    if wrong:
        raise CorpusError(
            f"slide {wrong[0]} of the corpus: its {wrong[1]} cannot be right. {_AGAIN}"
        )


def first_wrong(packed: Packed, rows: NDArray[np.int64]) -> tuple[int, str] | None:
    """The first of some rows that `check` refuses, and what of it; None when all are right."""
    found = packed.slides[rows]
    for what, ok in _slide_tests(packed, found).items():
        if not ok.all():
            return int(rows[~ok][0]), what
    count = found["n_levels"].astype(np.int64)
    owner = np.repeat(np.arange(len(rows)), count)
    within = np.arange(len(owner)) - (np.cumsum(count) - count)[owner]
    levels = packed.levels[found["first_level"][owner] + within]
    for what, ok in _level_tests(packed, found[owner], within == 0, levels).items():
        if not ok.all():
            return int(rows[owner[~ok][0]]), what
    return None


def _slide_tests(packed: Packed, found: NDArray[np.void]) -> dict[str, NDArray[np.bool_]]:
    width, height = (found[name].astype(np.int64) for name in ("mask_width", "mask_height"))
    low, high = MPP_SANE_RANGE
    x_ok, y_ok = ((found[name] >= low) & (found[name] <= high) for name in ("mpp_x", "mpp_y"))
    lengths = np.stack([found[f"{name}_bytes"] for name in ("slide_id", "uri", "token", "rest")])
    mask_bytes = 8 * (height + 1) + height * ((width + 7) >> 3) + PADDING_BYTES
    return {
        "µm/px": x_ok & y_ok,
        "reader": (found["reader"] >= 0) & (found["reader"] < len(READERS)),
        "levels": (found["n_levels"] > 0) & (found["n_levels"] <= MAX_LEVELS)
        & _inside(found["first_level"], found["n_levels"], len(packed.levels)),
        "text": (lengths >= 0).all(axis=0)
        & _inside(found["text_offset"], lengths.sum(axis=0, dtype=np.int64), len(packed.text)),
        "mask": (width > 0) & (height > 0) & (found["mask_offset"] % 8 == 0)
        & _inside(found["mask_offset"], mask_bytes, len(packed.masks))
        & (found["tissue_cells"] >= 0) & (found["tissue_cells"] <= width * height),
    }  # fmt: skip


def _level_tests(
    packed: Packed, slide: NDArray[np.void], first: NDArray[np.bool_], levels: NDArray[np.void]
) -> dict[str, NDArray[np.bool_]]:
    """Of levels, each with its slide's record and whether it is its first level."""
    sizes_ok, scales_ok = np.ones((2, len(levels)), bool)
    for name, most in (("width_px", 2**31), ("height_px", 2**31), ("tile_width_px", 2**24),
                       ("tile_height_px", 2**24), ("parts", 2**16)):  # fmt: skip
        sizes_ok &= (levels[name] > 0) & (levels[name] < most)
    for name in ("downsample_x", "downsample_y", "mpp_x", "mpp_y", "mpp"):
        scales_ok &= (levels[name] > 0) & (levels[name] < np.inf)
    across, down = (np.maximum(levels[f"tile_{side}_px"], 1) for side in ("width", "height"))
    columns = -(-levels["width_px"] // across)
    # As floats: a product that wraps round must not come out right.
    n_rows = 1.0 * columns * -(-levels["height_px"] // down) * levels["parts"]
    rows_ok = (levels["n_rows"] == n_rows) & _inside(
        levels["first_tile"], levels["n_rows"], len(packed.tiles)
    )
    no_rows = (levels["first_tile"] == -1) & (levels["n_rows"] == 0)
    same_size = (levels["width_px"] == slide["width_px0"]) & (
        levels["height_px"] == slide["height_px0"]
    )
    return {
        "level sizes": sizes_ok & (levels["columns"] == columns) & (same_size | ~first),
        "level scales": scales_ok,
        "codecs": (levels["codec"] >= 0) & (levels["codec"] < len(packed.codecs)),
        "tiles": np.where(slide["reader"] == 0, rows_ok, no_rows),
    }


def _inside(start: NDArray[Any], length: NDArray[Any], limit: int) -> NDArray[np.bool_]:
    """Whether start..start+length lies in 0..limit, without a sum that may wrap round."""
    ok = (start >= 0) & (start <= limit)
    return np.asarray(ok & (length <= limit - np.where(ok, start, 0)))
