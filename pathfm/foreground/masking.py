"""One slide: its thumbnail, masks by both methods, and the files of a corpus folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from online_patching.errors import PatchingError
from online_patching.mask import ForegroundMask
from online_patching.slide_index import SlideIndex
from online_patching.stores.local import atomic_write_bytes, atomic_write_text
from pathfm.foreground import ForegroundConfig, SlideForeground
from pathfm.foreground.drawings import Drawings
from pathfm.geojson import contours, write_geojson
from pathfm.pictures import jpeg_bytes, outline
from pathfm.runtime import PathfmError, one_line

if TYPE_CHECKING:
    from torch import nn

_RULES = 2  # raised when the way from thumbnail to mask changes: older masks are made anew
FOLDERS = ("masks", "contours", "thumbnails", "overlays")
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Seen:
    """A slide whose thumbnail has been read and whose mask is to be made."""

    index: SlideIndex
    made_from: str
    mpp: float
    thumbnail: NDArray[np.uint8]
    drawn: Mask | None


class Worker:
    """The steps of one slide: `see` and `write` for any thread, `probabilities` for one of them.

    The weights are read when the first slide needs them; a file that is none fails at once.
    """

    def __init__(self, config: ForegroundConfig, drawings: Drawings) -> None:
        from pathfm.runtime import pick_device
        from pathfm.segmentation.unet import SHIPPED_WEIGHTS

        self.config, self.drawings = config, drawings
        self.device = str(pick_device(config.device))
        self.weights = config.weights or SHIPPED_WEIGHTS
        try:
            self.weights_digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        except OSError as error:
            raise PathfmError(f"weights {self.weights}: {error.strerror}") from None
        self._model: nn.Module | None = None

    def see(self, path: Path) -> Seen | SlideForeground:
        """The slide of an index file with its thumbnail; its outcome if that is known already.

        It is when an earlier run's is still true, and when the slide cannot be read: with the
        reason.
        """
        slide_id, uri, mpp = path.stem, str(path), self.config.mpp
        try:
            index = SlideIndex.load(path)  # when it is needed: a large slide's has megabytes
            slide_id, uri, mpp = index.slide_id, index.uri, mask_mpp(index, self.config)
            made_from = self._made_from(index)
            earlier = _read_earlier(self.config.corpus, index, made_from)
            if earlier is not None:
                return earlier
            # From here on nothing old may be taken for this slide's mask, also after a kill -9.
            self._forget(slide_id)
            return self._seen(index, made_from, mpp)
        except (PatchingError, PathfmError, OSError, MemoryError) as error:
            self._forget(slide_id)
            reason = one_line(error).removeprefix(f"{uri}: ")
            return SlideForeground(slide_id, 0.0, 0.0, 0.0, mpp, reason=reason)

    def _forget(self, slide_id: str) -> None:
        for path in paths_of(self.config.corpus, slide_id).values():
            path.unlink(missing_ok=True)

    def _seen(self, index: SlideIndex, made_from: str, mpp: float) -> Seen:
        from online_patching import open_slide

        with open_slide(index) as slide:
            thumbnail = slide.thumbnail(mpp=mpp)
        height, width = thumbnail.shape[:2]
        drawn = self.drawings.mask(index, (height, width))
        return Seen(index, made_from, mpp, thumbnail, drawn)

    def _made_from(self, index: SlideIndex) -> str:
        """SHA-256 of everything that decides the mask: slide, settings, weights, drawing, rules."""
        c = self.config
        parts = (
            index.digest, index.token, c.method, c.mpp, c.max_side_px, c.threshold,
            c.smallest_mm2, c.smallest_share, c.contour_tolerance_px, c.precision,
            self.weights_digest, self.drawings.digest(index.slide_id), _RULES,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def probabilities(self, seen: Sequence[Seen]) -> list[NDArray[np.float32] | None]:
        """The model's probability of tissue for each; None where a drawing makes it needless."""
        from pathfm.segmentation.predict import tissue_probabilities

        asked = [s.thumbnail for s in seen if s.drawn is None]
        got = iter(tissue_probabilities(self._network(), asked, self.device) if asked else ())
        return [None if s.drawn is not None else next(got) for s in seen]

    def write(self, seen: Seen, probability: NDArray[np.float32] | None) -> SlideForeground:
        """Makes the slide's mask and writes all its files, the facts that vouch for them last."""
        from pathfm.segmentation.tidy import mask_iou

        index = seen.index
        source, tissue, other = self._masks(seen, probability)
        mask = ForegroundMask.from_array(tissue, index.dimensions, (index.mpp_x, index.mpp_y))
        row = SlideForeground(
            slide_id=index.slide_id,
            tissue_mm2=mask.tissue_area_um2 / 1e6,
            tissue_fraction=mask.tissue_fraction,
            baseline_iou=mask_iou(tissue, other),
            mask_mpp=seen.mpp,
            source=source,
            reason="" if tissue.any() else self._why_empty(source, other),
            made_from=seen.made_from,
            mask_digest=mask.digest,
        )
        paths = paths_of(self.config.corpus, index.slide_id)
        atomic_write_bytes(paths["thumbnail"], jpeg_bytes(Image.fromarray(seen.thumbnail)))
        line_px = max(2, max(seen.thumbnail.shape) // 400)  # seen when the page shrinks the picture
        atomic_write_bytes(
            paths["overlay"], jpeg_bytes(outline(seen.thumbnail, tissue, width_px=line_px))
        )
        (width_px0, height_px0), (height, width) = index.dimensions, tissue.shape
        scale = (width_px0 / width, height_px0 / height)
        write_geojson(paths["contours"], contours(tissue, scale, self.config.contour_tolerance_px))
        mask.save(paths["mask"])
        atomic_write_text(paths["facts"], json.dumps(asdict(row), indent=1) + "\n")
        return row

    def _masks(self, seen: Seen, probability: NDArray[np.float32] | None) -> tuple[str, Mask, Mask]:
        """What made the mask, the mask, and the mask it is compared with."""
        from pathfm.segmentation.thresholds import otsu_mask

        by_otsu = self._tidy(otsu_mask(seen.thumbnail), seen.mpp)
        if seen.drawn is not None:
            return "drawn", seen.drawn, by_otsu
        assert probability is not None
        by_model = self._tidy(probability > self.config.threshold, seen.mpp)
        if self.config.method == "otsu":
            return "otsu", by_otsu, by_model
        return "model", by_model, by_otsu

    def _tidy(self, mask: Mask, mpp: float) -> Mask:
        from pathfm.segmentation.tidy import tidy

        return tidy(mask, self.config.smallest_mm2 * 1e6 / mpp**2, self.config.smallest_share)

    def _why_empty(self, source: str, other: Mask) -> str:
        if source == "drawn":
            return "no tissue drawn inside the slide"
        beside = "the model" if source == "otsu" else "otsu"
        return f"no tissue found by {source.replace('model', 'the model')} ({beside} finds {float(other.mean()):.1%})"

    def _network(self) -> nn.Module:
        from pathfm.segmentation.models import load_model
        from pathfm.segmentation.predict import ready

        if self._model is None:
            model, _ = load_model(self.weights)
            self._model = ready(model, self.device, self.config.precision)
        return self._model


def mask_mpp(index: SlideIndex, config: ForegroundConfig) -> float:
    """µm/px of a slide's thumbnail and mask: as asked, never finer than level 0, and coarser where
    the longer side would pass ``max_side_px``."""
    width_px0, height_px0 = index.dimensions
    longer_um = max(width_px0 * index.mpp_x, height_px0 * index.mpp_y)
    return max(config.mpp, index.mpp, longer_um / config.max_side_px)


def paths_of(corpus: Path, slide_id: str) -> dict[str, Path]:
    """Where a slide's files are; the facts come first, so that they are deleted first."""
    return {
        "facts": corpus / "masks" / f"{slide_id}.json",
        "mask": corpus / "masks" / f"{slide_id}.png",
        "contours": corpus / "contours" / f"{slide_id}.geojson",
        "thumbnail": corpus / "thumbnails" / f"{slide_id}.jpg",
        "overlay": corpus / "overlays" / f"{slide_id}.jpg",
    }


def _read_earlier(corpus: Path, index: SlideIndex, made_from: str) -> SlideForeground | None:
    """What an earlier run made of the very same things, if all of it is still there and whole."""
    paths = paths_of(corpus, index.slide_id)
    try:
        facts = SlideForeground(**json.loads(paths["facts"].read_text()))
        mask = ForegroundMask.load(paths["mask"])
    except (OSError, ValueError, TypeError, PatchingError):
        return None
    whole = facts.made_from == made_from and facts.mask_digest == mask.digest
    if not whole or not all(path.exists() for path in paths.values()):
        return None
    return replace(facts, reused=True)
