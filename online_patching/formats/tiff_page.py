"""One image of a TIFF as its tags describe it, and how its tiles are stored."""

from __future__ import annotations

from dataclasses import dataclass

from online_patching.errors import UnsupportedSlideError
from online_patching.formats.tiff_tags import Directory
from online_patching.slide_index import Codec

MACRO_FLAG, REDUCED_FLAG = 8, 1
_MAX_TABLES_BYTES = 64 * 2**10
_JPEG_TABLES = 347
_KINDS = {
    1: "raw", 5: "lzw", 7: "jpeg", 8: "deflate", 32946: "deflate", 32773: "packbits",
    50000: "zstd", 34926: "zstd", 50001: "webp", 34927: "webp",
    33003: "jpeg2000", 33005: "jpeg2000", 34712: "jpeg2000",
}  # fmt: skip
"""TIFF's Compression, and what became of it (34926 and 34927: libtiff's first numbers for 50000 and 50001)."""
_STREAMS = frozenset({"jpeg", "jpeg2000", "webp"})
"""What holds pictures with colours of their own."""
_PREDICTED = frozenset({"lzw", "deflate", "zstd"})
"""What libtiff applies a predictor to."""
_APERIO_YCBCR, _APERIO_RGB = 33003, 33005
_GRAY, _RGB, _YCBCR = 1, 2, 6
_SAMPLES = {_GRAY: (1,), _RGB: (3, 4), _YCBCR: (3,)}
_COLOURS = {
    0: "gray that is inverted (min-is-white)", 3: "colours of a palette, as label and annotation images have",
    4: "a mask", 5: "CMYK", 8: "CIE L*a*b*", 9: "ICC L*a*b*", 10: "ITU L*a*b*",
    32803: "a colour filter array", 32844: "LogL", 32845: "LogLuv",
}  # fmt: skip
_ALPHA = (1, 2)
"""TIFF's ExtraSamples: associated and unassociated alpha."""


@dataclass(frozen=True)
class Page:
    """What one directory says about its image, as far as the pyramid needs it."""

    tags: Directory
    width: int
    height: int
    tile_width: int
    tile_height: int
    samples: int
    bits: tuple[int, ...]
    sample_format: int

    @classmethod
    def of(cls, tags: Directory) -> Page:
        """The page of a directory."""
        width, height, tile_width, tile_height = (
            tags.number(code) for code in (256, 257, 322, 323)
        )
        return cls(
            tags, width, height, tile_width, tile_height,
            tags.number(277, 1), tags.numbers(258, 4) or (1,), tags.number(339, 1),
        )  # fmt: skip

    @property
    def is_tiled(self) -> bool:
        """Whether it is a picture in tiles."""
        return min(self.width, self.height, self.tile_width, self.tile_height) > 0

    @property
    def planes(self) -> int:
        """How many pieces a tile is stored in: 1, or one a sample."""
        return self.samples if self.samples > 1 and self.tags.number(284, 1) == 2 else 1

    @property
    def pixel(self) -> str:
        """The type of a sample, as numpy would name it."""
        kind = {1: "uint", 2: "int", 3: "float"}.get(self.sample_format, "sample")
        return f"{kind}{'/'.join(str(b) for b in dict.fromkeys(self.bits))}"


def refuse_pixels(name: str, page: Page) -> None:
    """Refuse what is not 8-bit gray, RGB or YCbCr, in words; before any compression is looked at."""
    if set(page.bits) != {8} or page.sample_format != 1 or page.samples not in (1, 3, 4):
        if page.samples == 3:
            raise UnsupportedSlideError(name, f"3 samples of {page.pixel}: not 8-bit RGB.")
        raise UnsupportedSlideError(
            name,
            f"{page.samples} channel(s) of {page.pixel}: not 8-bit RGB; fluorescence or multiplex.",
            "multiplex",
        )
    photometric = page.tags.number(262)
    if photometric not in _SAMPLES:
        what = _COLOURS.get(photometric, f"photometric {photometric}")
        raise UnsupportedSlideError(name, f"{what}: not RGB, YCbCr or gray.")
    if page.samples not in _SAMPLES[photometric]:
        raise UnsupportedSlideError(
            name,
            f"{page.samples} samples a pixel and photometric {photometric} contradict each other.",
        )
    if page.samples == 4 and page.tags.number(338) not in _ALPHA:
        raise UnsupportedSlideError(name, "a fourth sample that is not said to be alpha.")


def codec_of(name: str, page: Page) -> Codec | None:
    """How the page's tiles are stored; None when only a fallback reader can tell.

    Of a page that `refuse_pixels` let pass. Refuses in words what no reader would get right.
    """
    tags, compression = page.tags, page.tags.number(259, 1)
    photometric, predictor = tags.number(262), tags.number(317, 1)
    kind = _KINDS.get(compression)
    if kind is None or (kind not in _STREAMS and photometric == _YCBCR):
        return None
    if tags.number(32997, 1) != 1:
        raise UnsupportedSlideError(name, "a volume of several planes in depth.")
    if page.planes > 1 and kind in _STREAMS:
        raise UnsupportedSlideError(name, f"{kind} of each channel apart (planar configuration 2).")
    if predictor != 1 and kind not in _STREAMS and (predictor, kind in _PREDICTED) != (2, True):
        raise UnsupportedSlideError(name, f"predictor {predictor} over {kind}.")
    if kind in ("jpeg", "jpeg2000") and page.samples == 4 and kind == "jpeg":
        raise UnsupportedSlideError(name, "JPEG of 4 components.")
    colour = {_RGB: "rgb", _YCBCR: "ycbcr", _GRAY: "gray"}[photometric]
    if page.samples > 1 and compression in (_APERIO_YCBCR, _APERIO_RGB):
        colour = "ycbcr" if compression == _APERIO_YCBCR else "rgb"
    planar = page.planes > 1
    return Codec(
        kind,
        "rgb" if kind == "webp" else colour,
        tags.blob(_JPEG_TABLES, _MAX_TABLES_BYTES) if kind == "jpeg" else b"",
        predictor if kind in _PREDICTED else 1,
        1 if planar else page.samples,
        planar,
    )
