"""What hostile NDPI files are made from: small valid ones of every kind, and a few that explode."""

from __future__ import annotations

import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from online_patching.testing.hostile import Field, Seed, tiff_seed
from online_patching.testing.ndpi import (
    NdpiImage,
    encode,
    interval_starts,
    write_images,
    write_ndpi,
)

_MANY = 2**20


def ndpi_seeds() -> list[Seed]:
    """Ten valid files of 2 to 20 KB: tables right, missing, short and wrong, planes, plain levels, chroma."""
    draw = np.random.default_rng(5).integers(0, 256, (6, 16, 3), np.uint8)
    level0 = np.repeat(np.repeat(draw, 8, axis=0), 8, axis=1)
    levels = [level0, level0[::2, ::2]]
    ways: dict[str, dict[str, object]] = {
        "listed": {},
        "absent": {"markers": "absent"},
        "shifted": {"markers": "shifted"},
        "few": {"markers": "few"},
        "high halves": {"with_high": True},
        "halved chroma": {"subsampling": "4:2:2"},
        "quartered chroma": {"subsampling": "4:2:0"},
        "zero frame": {"zero_frame": True},
        "plain level": {"plain_below_px": 100},
        "planes": {"planes_nm": (-500, 0)},
    }
    return [_seed(name, _written(levels, **options)) for name, options in ways.items()]


def _written(levels: list[np.ndarray], **options: object) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = write_ndpi(Path(folder) / "a.ndpi", levels, interval_mcus=4, **options)  # type: ignore[arg-type]
        return path.read_bytes()


def _seed(name: str, data: bytes) -> Seed:
    """The seed with the high halves of its offsets, and what its first stream says, among its numbers."""
    seed = tiff_seed(name, data)
    more = [Field(8, 4, "value")]
    for place in seed.directories:
        count = int.from_bytes(data[place : place + 2], "little")
        after = place + 2 + 12 * count
        more += [Field(after + 4 + 4 * k, 4, "value") for k in range(count + 1)]
    frame, interval = data.find(b"\xff\xc0"), data.find(b"\xff\xdd")
    more += [
        Field(frame + 5, 2, "count"),
        Field(frame + 7, 2, "count"),
        Field(frame + 11, 1, "count"),
    ]
    more += [Field(interval + 4, 2, "count"), Field(interval + 5, 1, "count")] * 3
    return replace(
        seed, fields=(*seed.fields, *(f for f in more if f.start + f.width <= len(data)))
    )


def ndpi_bombs() -> list[Seed]:
    """Files whose tables or markers are many: real ones, and ones that only say so."""
    flat = np.full((8, 8, 3), 180, np.uint8)
    stream = encode(flat, None)
    first = interval_starts(stream)[0]
    scan = stream.index(b"\xff\xda")
    head = stream[:scan] + struct.pack(">HHH", 0xFFDD, 4, 1) + stream[scan:first]
    at = head.index(b"\xff\xc0") + 5
    head = head[:at] + bytes(4) + head[at + 4 :]
    codes = stream[first:-2]
    marked = b"".join(codes + bytes((0xFF, 0xD0 + k)) for k in range(8)) * (_MANY // 8)
    many = head + marked[:-2] + b"\xff\xd9"
    size = (8 * 1024, 8 * (_MANY // 1024))
    wide = (2 * size[0], size[1])
    starts = [len(head) + k * (len(codes) + 2) for k in range(_MANY)]
    said = [len(head) + 3 * k for k in range(2 * _MANY)]
    return [
        _bomb("a million markers, none listed", [NdpiImage(size, many, 40.0)]),
        _bomb("a million markers, listed", [NdpiImage(size, many, 40.0, starts, with_high=True)]),
        _bomb("two million markers, only said", [NdpiImage(wide, head + bytes(6 * _MANY), 40.0, said)]),
        _bomb("no end of levels", [NdpiImage((64, 64), head, 40.0)] * 600),
    ]  # fmt: skip


def _bomb(name: str, images: list[NdpiImage]) -> Seed:
    with tempfile.TemporaryDirectory() as folder:
        data = write_images(Path(folder) / "a.ndpi", images, 0.25).read_bytes()
    return Seed(name, data, "<", (Field(4, 4, "next"),), ())
