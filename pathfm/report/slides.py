"""The page's part on slides: thumbnails with mask and boxes, and patches by slide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from online_patching.errors import PatchingError
from online_patching.mask import ForegroundMask
from pathfm.pictures import jpeg_data_uri, mpp_colour, outline

ColouredBox = tuple[float, float, float, float, str]  # x, y, width, height in px0; colour

OUTLINE = "#1b1b1b"  # not one of the boxes' colours
_MAX_PICTURED = 24  # slides with a thumbnail; the table lists all
_MAX_BOXES = 150  # rectangles on one thumbnail
_THUMBNAIL_PX = 640


@dataclass(frozen=True)
class SlideCard:
    """A thumbnail with its mask's outline, and the boxes sampled on it in level-0 pixels."""

    slide_id: str
    picture: str
    width_px0: int
    height_px0: int
    boxes: list[ColouredBox]
    n_sampled: int
    facts: str


def patch_mix(
    sampled: Sequence[dict[str, Any]], every_mpp: Sequence[float]
) -> list[tuple[str, list[int], int, float]]:
    """(slide, patches by resolution, patches, share of all patches) of every sampled slide."""
    counts = Counter((row["slide_id"], float(row["mpp"])) for row in sampled)
    rows = []
    for slide in sorted({slide for slide, _ in counts}):
        by_mpp = [counts[slide, mpp] for mpp in every_mpp]
        rows.append((slide, by_mpp, sum(by_mpp), sum(by_mpp) / len(sampled)))
    return rows


def slide_cards(
    corpus: Path,
    slides: Sequence[dict[str, str]],
    masks: dict[str, dict[str, str]],
    sampled: Sequence[dict[str, Any]],
    every_mpp: Sequence[float],
) -> list[SlideCard]:
    """A card for each of the first slides that has a thumbnail."""
    by_slide: dict[str, list[dict[str, Any]]] = {}
    for row in sampled:
        by_slide.setdefault(row["slide_id"], []).append(row)
    cards = []
    for slide in slides[:_MAX_PICTURED]:
        slide_id = slide["slide_id"]
        picture = _thumbnail(corpus, slide_id)
        if picture is None:
            continue
        rows = by_slide.get(slide_id, [])
        mask = masks.get(slide_id, {})
        tissue = mask.get("tissue_mm2", "")
        cards.append(
            SlideCard(
                slide_id=slide_id,
                picture=jpeg_data_uri(picture, quality=76),
                width_px0=int(slide["width_px"]),
                height_px0=int(slide["height_px"]),
                boxes=_boxes(rows, every_mpp),
                n_sampled=len(rows),
                facts=mask.get("reason", "")
                or (f"{float(tissue):.1f} mm² tissue" if tissue else ""),
            )
        )
    return cards


def _boxes(rows: Sequence[dict[str, Any]], every_mpp: Sequence[float]) -> list[ColouredBox]:
    """Evenly many of the patches; large ones first, so that they do not hide the small ones."""
    shown = rows[:: max(1, -(-len(rows) // _MAX_BOXES))]
    return [
        (
            r["x_px0"],
            r["y_px0"],
            r["width_px0"],
            r["height_px0"],
            mpp_colour(float(r["mpp"]), every_mpp),
        )
        for r in sorted(shown, key=lambda r: -float(r["mpp"]))
    ]


def _thumbnail(corpus: Path, slide_id: str) -> Image.Image | None:
    """The slide's thumbnail at page size, the mask's border drawn on it; None if there is none."""
    try:
        with Image.open(corpus / "thumbnails" / f"{slide_id}.jpg") as image:
            small = image.convert("RGB")
    except OSError:
        return None
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS)
    try:
        mask = ForegroundMask.load(corpus / "masks" / f"{slide_id}.png").bits
    except (OSError, PatchingError):
        return small
    return outline(np.asarray(small), mask, OUTLINE)
