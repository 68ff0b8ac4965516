"""Seeds of hostile files beyond JPEG: TIFFs of every codec and vendor, and single tiles of each codec."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from online_patching.slide_index import Codec
from online_patching.testing.drawing import SyntheticSlide
from online_patching.testing.hostile import Field, Seed, tiff_seed
from online_patching.testing.raw_tiff import RawImage, ascii_text, build_tiff
from online_patching.testing.tiff_codecs import Coding, Layout, coded_image, resolution
from online_patching.testing.vendor_tiffs import leica_images, philips_images, ventana_images
from online_patching.testing.writers import Picture, shrink

TILE_PX = (64, 32)
_APERIO = "Aperio Image Library\r\n70x40|AppMag = 20|MPP = 0.4990"
_CODINGS = {
    "raw planes": Coding(1, planar=True),
    "raw alpha": Coding(1, samples=4),
    "lzw": Coding(5, predictor=2),
    "deflate": Coding(8, predictor=2),
    "packbits": Coding(32773),
    "zstd planes": Coding(50000, predictor=2, planar=True),
    "webp": Coding(50001),
    "webp lossless": Coding(50001, level=0),
    "jpeg gray": Coding(7, 1, 1),
    "jpeg2000": Coding(34712, level=0),
    "jpeg2000 boxed": Coding(34712, level=40, boxed=True),
    "jpeg2000 gray": Coding(34712, 1, 1, level=0),
    "aperio 33003": Coding(33003, subsampling="4:2:2"),
    "aperio 33005": Coding(33005, level=40),
}


def coded_seeds() -> list[Seed]:
    """Valid TIFFs of 2 to 30 KB, one a codec and vendor, byte orders and sizes of offset taking turns."""
    layouts = [(order, big) for order in ("<", ">") for big in (False, True)]
    made = []
    for number, (name, images) in enumerate(_files()):
        order, big = layouts[number % 4]
        made.append(tiff_seed(name, build_tiff(images, order=order, big=big)))  # type: ignore[arg-type]
    return made


def _files() -> Iterator[tuple[str, list[RawImage]]]:
    picture = _picture(70, 40)
    for name, coding in _CODINGS.items():
        about = {270: ascii_text(_APERIO)} if "aperio" in name else resolution(0.5)
        pixels = _with_alpha(picture) if coding.samples == 4 else picture
        yield name, [coded_image(pixels, coding, Layout(TILE_PX), about)]
    large = _picture(128, 64)
    levels = [large, shrink(large, 2), shrink(large, 4)]
    yield "philips", philips_images(levels)
    yield "leica", leica_images(levels[:2], shrink(large, 8))
    yield "ventana", ventana_images(levels[:2])


def _picture(width: int, height: int) -> Picture:
    return SyntheticSlide(3, 400, 300).render(100, 80, width, height)


def _with_alpha(picture: Picture) -> Picture:
    return np.concatenate([picture, picture[:, :, :1]], axis=2)


def tile_seeds() -> list[tuple[Seed, Codec]]:
    """One stored tile of every codec, its numbers where it has any, and what decodes it."""
    tile = _picture(*TILE_PX)
    kinds = {
        1: "raw", 5: "lzw", 7: "jpeg", 8: "deflate", 32773: "packbits", 50000: "zstd", 50001: "webp",
        34712: "jpeg2000", 33003: "jpeg2000", 33005: "jpeg2000",
    }  # fmt: skip
    out = []
    for name, coding in _CODINGS.items():
        pixels = _with_alpha(tile) if coding.samples == 4 else tile
        data = coding.encode(pixels[:, :, :1] if coding.planar or coding.samples == 1 else pixels)
        colour = (
            "ycbcr" if coding.compression == 33003 else "gray" if coding.samples == 1 else "rgb"
        )
        codec = Codec(
            kinds[coding.compression], colour, b"", coding.predictor,
            1 if coding.planar else coding.samples, coding.planar, reductions=2,
        )  # fmt: skip
        out.append((Seed(name, data, ">", _numbers(data)), codec))
    return out


def _numbers(data: bytes) -> tuple[Field, ...]:
    """The numbers of a JPEG 2000 stream's SIZ, COD, QCD and SOT segments; of other streams none."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0:
        return ()
    siz = start + 4
    found = [Field(siz, 2, "count"), Field(siz + 2, 2, "value")]
    found += [Field(siz + 4 + 4 * n, 4, "value") for n in range(8)]
    components = int.from_bytes(data[siz + 36 : siz + 38], "big")
    found += [Field(siz + 36, 2, "value")]
    found += [Field(siz + 38 + n, 1, "value") for n in range(3 * components)]
    for marker, widths in (
        (0x52, (2, 1, 1, 2, 1, 1, 1, 1, 1, 1)),
        (0x5C, (2, 1, 1, 1)),
        (0x90, (2, 2, 4, 1, 1)),
    ):
        at = data.find(bytes((0xFF, marker)), start)
        if at < 0:
            continue
        at += 2
        for width in widths:
            found.append(Field(at, width, "value"))
            at += width
    return tuple(found)
