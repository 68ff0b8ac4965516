"""What hostile files are made from: small valid TIFFs of every kind, and structures that explode."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import numpy as np

from online_patching.testing.hostile import Seed, tiff_seed
from online_patching.testing.raw_tiff import (
    RawImage,
    Value,
    ascii_text,
    build_tiff,
    longs,
    rational,
    shorts,
)
from online_patching.testing.writers import encode_jpeg, split_tables

_TILE_PX = (32, 16)
_MPP: dict[int, Value | None] = {282: rational(40_000, 1), 283: rational(40_000, 1), 296: shorts(3)}
_APERIO = "Aperio Image Library v12 \r\n70x40 JPEG/RGB|AppMag = 20|MPP = 0.4990"
_OME = (
    '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    '<Image ID="Image:0"><Pixels SizeX="70" SizeY="40" PhysicalSizeX="0.5" PhysicalSizeY="0.5" '
    'PhysicalSizeXUnit="µm" PhysicalSizeYUnit="µm"/></Image></OME>'
)


def tiff_seeds() -> list[Seed]:
    """About 25 valid files of 1 to 10 KB: byte orders, BigTIFF, codecs, containers, associated images."""
    made: list[tuple[str, bytes]] = []
    for order, big in (("<", False), (">", False), ("<", True), (">", True)):
        options = {"order": order, "big": big}
        name = f"{'big ' if big else ''}{order}"
        for kind, images in _containers():
            made.append((f"{kind} {name}", build_tiff(images, **options)))  # type: ignore[arg-type]
    return [tiff_seed(name, data) for name, data in made]


def _containers() -> Iterator[tuple[str, list[RawImage]]]:
    tile = encode_jpeg(np.full((16, 32, 3), 180, np.uint8))
    tables, body = split_tables(tile)
    blank = b""
    levels = [
        _level((70, 40), body, {347: (7, tables)}),
        _level((35, 20), body, {347: (7, tables)}),
    ]
    small = RawImage((20, 30), [bytes(1800)], None, compression=1, tags={254: longs(1)})
    macro = RawImage((30, 20), [bytes(1800)], None, compression=1, tags={254: longs(9)})
    yield "generic", [_with(levels[0], _MPP), _with(levels[1], {254: longs(1)})]
    about: dict[int, Value | None] = {270: ascii_text(_APERIO)}
    yield "aperio", [_with(levels[0], about), small, _with(levels[1], about), small, macro]
    ome = _with(levels[0], {270: ascii_text(_OME)})
    yield "ome", [RawImage(**{**ome.__dict__, "sub_images": [levels[1]]})]
    raw = RawImage((33, 17), [bytes(1536), blank, bytes(1536), bytes(1536)], _TILE_PX, compression=1,
                   tags=_MPP)  # fmt: skip
    yield "raw", [raw]
    yield (
        "strips and fluorescence",
        [_with(small, {270: ascii_text("ExcitationWaveLength=488"), 258: shorts(16, 16, 16)})],
    )


def _level(size_px: tuple[int, int], tile: bytes, tags: dict[int, Value | None]) -> RawImage:
    count = -(-size_px[0] // _TILE_PX[0]) * -(-size_px[1] // _TILE_PX[1])
    return RawImage(size_px, [tile] * count, _TILE_PX, photometric=6, tags=tags)


def _with(image: RawImage, tags: dict[int, Value | None]) -> RawImage:
    return RawImage(**{**image.__dict__, "tags": {**image.tags, **tags}})


def tiff_bombs() -> list[Seed]:
    """Structures that a naive reader follows until time or memory ends; each of at most 5 MB."""
    return [tiff_seed(make.__name__.strip("_"), make()) for make in _BOMBS]


def _chain(count: int, tags: bytes, tags_each: int) -> bytes:
    """A chain of `count` equal directories."""
    size = 2 + len(tags) + 4
    out = bytearray(struct.pack("<2sHI", b"II", 42, 8))
    for number in range(1, count + 1):
        after = 8 + number * size if number < count else 0
        out += struct.pack("<H", tags_each) + tags + struct.pack("<I", after)
    return bytes(out)


def _entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


def _tiled(*more: bytes) -> tuple[bytes, int]:
    """The tags of a tiled RGB image that is let past every first look, and how many there are."""
    tags = (_entry(256, 4, 1, 64), _entry(257, 4, 1, 64), _entry(258, 3, 1, 8), _entry(259, 3, 1, 7),
            _entry(262, 3, 1, 2), _entry(277, 3, 1, 3), _entry(322, 3, 1, 32),
            _entry(323, 3, 1, 16))  # fmt: skip
    return b"".join((*tags, *more)), len(tags) + len(more)


def _long_chain() -> bytes:
    return _chain(20_000, *_tiled())


def _chain_to_itself() -> bytes:
    return _chain(1, *_tiled())[:-4] + struct.pack("<I", 8)


def _sub_directories_of_themselves() -> bytes:
    return _chain(1, *_tiled(_entry(330, 13, 1, 8)))


def _tags_by_the_thousand() -> bytes:
    return _chain(60, *_tiled(*(_entry(700 + n, 4, 1, n) for n in range(4000))))


def _sub_directories_by_the_thousand() -> bytes:
    return build_tiff(
        [RawImage((70, 40), [b"x"] * 9, _TILE_PX, tags={**_MPP, 330: longs(*range(8, 400_008, 4))})]
    )


def _pages_that_share(kind: int, tag: int, size: int) -> bytes:
    """400 tiled directories whose tag points to the same megabytes at the end."""
    return _chain(400, *_tiled(_entry(tag, kind, size, 8 + 400 * 114))) + b" " * 4 * 2**20


def _descriptions_that_share() -> bytes:
    return _pages_that_share(2, 270, 4 * 2**20)


def _tables_that_share() -> bytes:
    return _pages_that_share(4, 324, 2**20)


def _described(text: str) -> bytes:
    return build_tiff([RawImage((70, 40), [b"x"] * 9, _TILE_PX, tags={270: ascii_text(text)})])


def _laughs() -> bytes:
    entities = "".join(
        f'<!ENTITY l{n} "{"&l" + str(n - 1) + ";" if n else "ha"}{("&l" + str(n - 1) + ";") * 9 if n else ""}">'
        for n in range(12)
    )
    return _described(f"<!DOCTYPE OME [{entities}]><OME>&l11;</OME>")


def _external_entity() -> bytes:
    return _described('<!DOCTYPE OME [<!ENTITY x SYSTEM "file:///etc/hostname">]><OME>&x;</OME>')


def _elements() -> bytes:
    return _described("<OME>" + "<a/>" * 900_000 + "</OME>")


def _nested_elements() -> bytes:
    return _described("<a>" * 600_000 + "<OME>")


def _attributes() -> bytes:
    many = " ".join(f'a{n}="1"' for n in range(300_000))
    return _described(f"<OME {many}></OME>")


def _digits() -> bytes:
    return _described("Aperio |MPP = " + "1" * 4_000_000)


def _bars() -> bytes:
    return _described("Aperio " + "| MPP  " * 500_000 + "ExcitationWaveLength=" + "9" * 500_000)


def _wide() -> bytes:
    """Four million tiles in a short file: real, and all blank, where the file is said to go on."""
    tags = (_entry(256, 4, 1, 2**22), _entry(257, 4, 1, 32), _entry(258, 3, 1, 8), _entry(259, 3, 1, 7),
            _entry(262, 3, 1, 1), _entry(282, 5, 1, 400), _entry(283, 5, 1, 400), _entry(322, 3, 1, 4),
            _entry(323, 3, 1, 8), _entry(324, 4, 2**22, 800), _entry(325, 4, 2**22, 800))  # fmt: skip
    return _chain(1, b"".join(tags), len(tags)).ljust(400, b"\0") + struct.pack("<2I", 40_000, 1)


_BOMBS: tuple[Callable[[], bytes], ...] = (
    _long_chain, _chain_to_itself, _sub_directories_of_themselves, _tags_by_the_thousand,
    _sub_directories_by_the_thousand, _descriptions_that_share, _tables_that_share, _laughs,
    _external_entity, _elements, _nested_elements, _attributes, _digits, _bars, _wide,
)  # fmt: skip
