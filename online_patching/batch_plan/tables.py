"""The tables of a plan, in the layout that the native decoder reads."""

from __future__ import annotations

import numpy as np

CANVAS = np.dtype(
    [
        ("key", "<u8"), ("first_tile", "<i4"), ("n_tiles", "<i4"), ("first_output", "<i4"),
        ("n_outputs", "<i4"), ("width", "<i4"), ("height", "<i4"), ("tile_width", "<i4"),
        ("tile_height", "<i4"), ("scale", "<i4"), ("codec", "<i4"), ("packing", "<i4"),
        ("colour", "<i4"), ("tables", "<i4"), ("fill", "<i4"), ("status", "<i4"), ("tile", "<i4"),
        ("read_bytes", "<i8"), ("absent", "<i4"), ("pad", "<i4"), ("message", "S120"),
    ],
    align=True,
)  # fmt: skip
"""A box of one level's decoded pixels. `key` names the slide within the process, for what is remembered of
its tiles (0: nothing is); `codec` counts the plan's codecs and `tables` its tables (-1 where its streams
are complete); `packing` is one of JPEG, HEADLESS, PIXELS, CHUNK; `colour` counts COLOURS. From `status` on,
the decoder fills in (tile: of the plan; read_bytes: of chunks and whole files; absent: how many files do not exist)."""

TILE = np.dtype(
    [
        ("start", "<i8"), ("length", "<i8"), ("file", "<i4"), ("body", "<i4"), ("left", "<i4"),
        ("top", "<i4"), ("width", "<i4"), ("height", "<i4"), ("x", "<i4"), ("y", "<i4"),
        ("channel", "<i4"), ("pad", "<i4"),
    ],
    align=True,
)  # fmt: skip
"""The part of a stored piece of a tile that a canvas sees: its byte range (length 0: not stored; WHOLE: all
there is) in which of the files, or which of the bodies it is (where WHOLE is read natively, the body is
the path of the file); where the part lies in the tile and where it
goes on the canvas (decoded pixels), from which channel on. `file` -1: it is handed over."""

OUTPUT = np.dtype(
    [
        ("left", "<f8"), ("top", "<f8"), ("right", "<f8"), ("bottom", "<f8"), ("target", "<i8"),
        ("width", "<i4"), ("height", "<i4"), ("x", "<i4"), ("y", "<i4"),
        ("box_width", "<i4"), ("box_height", "<i4"), ("exact", "<i4"), ("pad", "<i4"),
    ],
    align=True,
)  # fmt: skip
"""A patch: its window within its box, its byte offset in the batch, its size, its box on the canvas.
`exact`: the patch is the box. Nothing outside the box is looked at, so that a patch has the same pixels on
a canvas of its own and on a shared one."""

FILE = np.dtype(
    [("size_bytes", "<i8"), ("mtime_ns", "<i8"), ("base", "<i8"), ("fd", "<i4"), ("pad", "<i4")],
    align=True,
)
"""One of the objects that a plan's pieces lie in, as indexed (0: not known); the address in its slide of its
first byte (a number of its own for a chunk); a local one's descriptor."""

WHOLE = -1
"""The length of a piece that is a whole object, of whatever size: a Zarr chunk."""

JPEG, HEADLESS, PIXELS, CHUNK = range(4)
"""How the native decoder finds tiles: JPEG streams, restart intervals without their stream's head, pixels
that something else has decoded, or Zarr chunks as chunk_spec.py describes them."""

COLOURS = ("rgb", "ycbcr", "gray")
