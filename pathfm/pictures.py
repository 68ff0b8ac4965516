"""Pictures a person looks at: mosaics, mask outlines on thumbnails, line plots as SVG.

Arrays are uint8 (h, w, 3).
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

RgbArray = NDArray[np.uint8]

# Okabe and Ito's colours: told apart by people with any of the common colour blindnesses.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")

# Boxes on tissue: apart from each other in lightness too, and from H&E's pink and purple.
MPP_COLOURS = ("#ffe14d", "#00b7ff", "#008f4c", "#2a2ad1", "#ff7a00", "#ffffff")


def mpp_colour(mpp: float, all_mpp: Sequence[float]) -> str:
    """The colour that stands for a magnification: by rank among all that occur, finest first."""
    return MPP_COLOURS[sorted(set(all_mpp)).index(mpp) % len(MPP_COLOURS)]


def told_mpps(mpps: Sequence[float], most: int = 8) -> list[float]:
    """Each µm/px as tables and pictures tell it: itself, or, where there are more than `most` different ones
    (a law draws any), the nearest of ..., 0.25, 0.354, 0.5, 0.707, 1, ...: steps of half a doubling."""
    if len(set(mpps)) <= most:
        return [float(mpp) for mpp in mpps]
    return [
        float(f"{2 ** (round(2 * math.log2(mpp)) / 2):.3g}") if mpp > 0 else 0.0 for mpp in mpps
    ]


def mosaic(
    images: Sequence[RgbArray],
    captions: Sequence[str] = (),
    columns: int = 8,
    tile_px: int = 128,
    title: str = "",
) -> Image.Image:
    """A grid of pictures, row by row, each scaled to `tile_px`, with text below each, a title above.

    Captions may have lines, each cut in its middle to the tile's width. No images give one empty
    white tile.
    """
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    gap_px, text_px, top_px = 4, 2 + 12 * lines if lines else 0, 16 if title else 0
    columns = max(1, min(columns, len(images)))
    rows = max(1, -(-len(images) // columns))
    step_x, step_y = tile_px + gap_px, tile_px + gap_px + text_px
    sheet = Image.new("RGB", (columns * step_x + gap_px, rows * step_y + gap_px + top_px), "white")
    draw, font = ImageDraw.Draw(sheet), _font(10)
    if title:
        draw.text((gap_px, 2), _fit(title, sheet.width - 2 * gap_px, font), "#444444", font)
    for i, image in enumerate(images):
        x, y = gap_px + i % columns * step_x, top_px + gap_px + i // columns * step_y
        size = (tile_px, tile_px)
        sheet.paste(
            ImageOps.contain(Image.fromarray(image), size, Image.Resampling.LANCZOS), (x, y)
        )
        if i < len(captions):
            for row, line in enumerate(captions[i].split("\n")):
                at = (x, y + tile_px + 1 + 12 * row)
                draw.text(at, _fit(line, tile_px, font), "#444444", font)
    return sheet


def outline(
    thumbnail: RgbArray,
    mask: NDArray[np.bool_],
    colour: str = "#00c853",
    width_px: int = 2,
) -> Image.Image:
    """The thumbnail with the mask's border drawn just inside it.

    The mask covers the same area as the thumbnail, whatever its own resolution (its cells are
    shown as they are, without smoothing). The picture's edge counts as border.
    """
    height, width = thumbnail.shape[:2]
    scaled = np.asarray(
        Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    ).astype(bool)
    inner = scaled
    for _ in range(width_px):
        inner = _eroded(inner)
    out = np.array(thumbnail)
    out[scaled & ~inner] = _rgb(colour)
    return Image.fromarray(out)


def jpeg_data_uri(picture: RgbArray | Image.Image, quality: int = 80, max_px: int = 0) -> str:
    """A `data:image/jpeg;base64,` URI of the picture, its longer side at most `max_px` (0: as is).

    Only pixels travel: no EXIF, no comment, no file name.
    """
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))  # leaves comments and EXIF behind
    image = Image.fromarray(picture)
    if max_px:
        image.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg_bytes(image, quality)).decode()


def jpeg_bytes(picture: Image.Image, quality: int = 88) -> bytes:
    """The picture as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


@dataclass(frozen=True)
class Series:
    """One line of a plot: a name and equally many x and y. Points not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_plot_svg(
    series: Sequence[Series],
    x_label: str = "",
    y_label: str = "",
    width_px: int = 640,
    height_px: int = 260,
    smooth: int = 0,
) -> str:
    """An inline `<svg>` with axes, ticks and a legend; text in `currentColor` suits any page.

    `smooth` > 1 draws each line faintly and its centred mean over so many points strongly.
    Names and labels are escaped. Long lines are thinned to 600 points.
    """
    points = [_finite(item) for item in series]
    filled = [p for p in points if len(p)]
    if not filled:
        nothing = '<text x="8" y="34" fill="currentColor">no values</text>'
        return f'<svg viewBox="0 0 640 60">{nothing}</svg>'
    every = np.concatenate(filled)
    x_ticks = nice_ticks(every[:, 0].min(), every[:, 0].max())
    y_ticks = nice_ticks(every[:, 1].min(), every[:, 1].max())
    frame = _Frame(width_px, height_px, _span(every[:, 0], ()), _span(every[:, 1], y_ticks))
    body = frame.axes(x_ticks, y_ticks, x_label, y_label)
    for i, line in enumerate(points):
        colour = COLOURS[i % len(COLOURS)]
        if smooth > 1 and len(line) > smooth:
            body.append(frame.path(line, colour, opacity=0.28))
            kernel = np.ones(smooth) / smooth
            mean = np.convolve(line[:, 1], kernel, "valid")
            body.append(
                frame.path(np.column_stack([line[smooth // 2 :, 0][: len(mean)], mean]), colour)
            )
        else:
            body.append(frame.path(line, colour))
        if len(series) > 1:
            before = sum(_LEGEND_MARK_PX + _LETTER_PX * len(s.name) for s in series[:i])
            body.append(frame.legend(before, series[i].name, colour))
    label = html.escape(f"{y_label or 'value'} over {x_label or 'x'}", quote=True)
    return (
        f'<svg viewBox="0 0 {width_px} {height_px}" role="img" aria-label="{label}" '
        f'xmlns="http://www.w3.org/2000/svg" font-size="13">{"".join(body)}</svg>'
    )


_LEGEND_MARK_PX, _LETTER_PX = 40, 7
"""Room of a legend's entry: its mark with gaps, and a letter at the plots' font size."""


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that reach around [low, high]."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Frame:
    """Maps data to SVG pixels and writes the parts of a plot."""

    width_px: int
    height_px: int
    x_span: tuple[float, float]
    y_span: tuple[float, float]
    left_px: int = 60
    right_px: int = 10
    top_px: int = 26
    bottom_px: int = 38

    def x(self, value: float) -> float:
        low, high = self.x_span
        inner = self.width_px - self.left_px - self.right_px
        return self.left_px + inner * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_span
        inner = self.height_px - self.top_px - self.bottom_px
        return self.height_px - self.bottom_px - inner * (value - low) / (high - low)

    def path(self, points: NDArray[np.float64], colour: str, opacity: float = 1.0) -> str:
        if not len(points):
            return ""
        every = max(1, len(points) // 600)
        kept = np.concatenate([points[::every], points[-1:]]) if every > 1 else points
        coords = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in kept)
        if len(points) == 1:
            x, y = coords.split(",")
            return f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>'
        return (
            f'<polyline points="{coords}" fill="none" stroke="{colour}" stroke-width="1.8" '
            f'stroke-linejoin="round" opacity="{opacity}"/>'
        )

    def legend(self, offset_px: int, name: str, colour: str) -> str:
        x = self.left_px + 4 + offset_px
        return (
            f'<rect x="{x}" y="8" width="14" height="4" rx="2" fill="{colour}"/>'
            f'<text x="{x + 20}" y="14" fill="currentColor">{html.escape(name)}</text>'
        )

    def axes(
        self, x_ticks: list[float], y_ticks: list[float], x_label: str, y_label: str
    ) -> list[str]:
        base, end = self.height_px - self.bottom_px, self.width_px - self.right_px
        text = 'fill="currentColor" opacity=".75"'
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(
                f'<line x1="{self.left_px}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="currentColor" opacity=".12"/>'
                f'<text x="{self.left_px - 6}" y="{y + 4:.1f}" text-anchor="end" {text}>'
                f"{_tick_text(tick)}</text>"
            )
        low, high = self.x_span
        parts.extend(
            f'<text x="{self.x(tick):.1f}" y="{base + 16}" text-anchor="middle" {text}>'
            f"{tick:g}</text>"
            for tick in x_ticks
            if low <= tick <= high
        )
        middle = (self.left_px + end) / 2
        parts.append(
            f'<text x="{middle}" y="{self.height_px - 4}" text-anchor="middle" {text}>'
            f"{html.escape(x_label)}</text>"
            f'<text transform="translate(12 {(self.top_px + base) / 2}) rotate(-90)" '
            f'text-anchor="middle" {text}>{html.escape(y_label)}</text>'
        )
        return parts


@cache
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans from matplotlib's files, unimported: Pillow's own font has no µ."""
    found = importlib.util.find_spec("matplotlib")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.exists():
            return ImageFont.truetype(str(path), size_px)
    return ImageFont.load_default(size_px)


def _tick_text(tick: float) -> str:
    """Short enough for the margin: 0.5, 20, 5e-4."""
    if tick and abs(tick) < 1e-3:
        return f"{tick:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{tick:g}"


def _finite(series: Series) -> NDArray[np.float64]:
    points = np.column_stack([np.asarray(series.x, float), np.asarray(series.y, float)])
    kept: NDArray[np.float64] = points[np.isfinite(points).all(axis=1)]
    return kept


def _span(values: NDArray[np.float64], ticks: Sequence[float]) -> tuple[float, float]:
    low, high = min([values.min(), *ticks]), max([values.max(), *ticks])
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(high) + 0.5)


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The cells whose four neighbours are set; outside counts as unset."""
    p = np.pad(mask, 1)
    inner: NDArray[np.bool_] = (
        p[1:-1, 1:-1] & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    )
    return inner


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _fit(text: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, its middle left out where it is too wide: names differ at their ends."""
    kept, short = len(text), text
    while kept and font.getlength(short) > width_px:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return short


def told_apart(names: Sequence[str], width_px: int = 128) -> dict[str, str]:
    """Each name as a caption of that width shows it; those that would look alike get a number."""
    every, font = list(dict.fromkeys(names)), _font(10)
    short = {name: _fit(name, width_px, font) for name in every}
    alike = [name for name in every if list(short.values()).count(short[name]) > 1]
    for number, name in enumerate(alike, 1):
        short[name] = _fit(f"{number}: {name}", width_px, font)
    return short
