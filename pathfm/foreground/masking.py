"""One slide after the other: thumbnail, masks by both methods, and the files of a corpus folder."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, replace
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
from pathfm.pictures import outline
from pathfm.runtime import PathfmError, one_line

if TYPE_CHECKING:
    from pathfm.segmentation.unet import ThumbnailUNet

_RULES = 1  # raised when the way from thumbnail to mask changes: older masks are made anew


class Worker:
    """Masks one slide after the other; the network is loaded when the first slide needs it."""

    def __init__(self, config: ForegroundConfig) -> None:
        from pathfm.segmentation.unet import SHIPPED_WEIGHTS

        self.config = config
        self.weights = config.weights or SHIPPED_WEIGHTS
        try:
            self.weights_digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        except OSError as error:
            raise PathfmError(f"weights {self.weights}: {error.strerror}") from None
        self._model: ThumbnailUNet | None = None

    def one(self, index: SlideIndex) -> SlideForeground:
        """The slide's outcome, from an earlier run where that is still true."""
        made_from = self._made_from(index)
        earlier = _read_earlier(self.config.corpus, index, made_from)
        if earlier is not None:
            return earlier
        # From here on nothing old may be taken for this slide's mask, also after a kill -9.
        for path in paths_of(self.config.corpus, index.slide_id).values():
            path.unlink(missing_ok=True)
        try:
            return self._make(index, made_from)
        except PatchingError as error:
            reason = one_line(error).removeprefix(f"{index.uri}: ")
            return SlideForeground(index.slide_id, 0.0, 0.0, 0.0, self.config.mpp, reason)

    def _made_from(self, index: SlideIndex) -> str:
        """SHA-256 of everything that decides the mask: slide, settings, weights, rules."""
        c = self.config
        parts = (
            index.digest, index.token, c.method, c.mpp, c.max_side_px, c.threshold,
            c.smallest_mm2, c.smallest_share, self.weights_digest, _RULES,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _make(self, index: SlideIndex, made_from: str) -> SlideForeground:
        from online_patching import open_slide
        from pathfm.segmentation.tidy import mask_iou

        mpp = mask_mpp(index, self.config)
        with open_slide(index) as slide:
            thumbnail = slide.thumbnail(mpp=mpp)
        masks = self._masks(thumbnail, mpp)
        tissue = masks[self.config.method]
        size_mpp = (index.mpp_x, index.mpp_y)
        mask = ForegroundMask.from_array(tissue, index.dimensions, size_mpp)
        row = SlideForeground(
            slide_id=index.slide_id,
            tissue_mm2=mask.tissue_area_um2 / 1e6,
            tissue_fraction=mask.tissue_fraction,
            baseline_iou=mask_iou(masks["unet"], masks["otsu"]),
            mask_mpp=mpp,
            reason="" if tissue.any() else self._why_empty(masks),
            made_from=made_from,
            mask_digest=mask.digest,
        )
        paths = paths_of(self.config.corpus, index.slide_id)
        atomic_write_bytes(paths["thumbnail"], _jpeg(Image.fromarray(thumbnail)))
        line_px = max(2, max(thumbnail.shape) // 400)  # seen when the page shrinks the picture
        overlay = outline(thumbnail, tissue, width_px=line_px)
        atomic_write_bytes(paths["overlay"], _jpeg(overlay))
        mask.save(paths["mask"])
        atomic_write_text(
            paths["facts"], json.dumps(asdict(row), indent=1) + "\n"
        )  # last: it vouches
        return row

    def _masks(self, thumbnail: NDArray[np.uint8], mpp: float) -> dict[str, NDArray[np.bool_]]:
        """Both methods' tidied masks, of the thumbnail's shape."""
        from pathfm.segmentation.otsu import otsu_mask
        from pathfm.segmentation.tidy import tidy
        from pathfm.segmentation.unet import tissue_probability

        smallest_px = self.config.smallest_mm2 * 1e6 / mpp**2
        probability = tissue_probability(self._network(), thumbnail, self._device())
        raw = {"unet": probability > self.config.threshold, "otsu": otsu_mask(thumbnail)}
        return {
            name: tidy(mask, smallest_px, self.config.smallest_share) for name, mask in raw.items()
        }

    def _why_empty(self, masks: dict[str, NDArray[np.bool_]]) -> str:
        other = "otsu" if self.config.method == "unet" else "unet"
        share = float(masks[other].mean())
        return f"no tissue found by {self.config.method} ({other} finds {share:.1%})"

    def _network(self) -> ThumbnailUNet:
        from pathfm.segmentation.unet import load_unet

        if self._model is None:
            try:
                self._model = load_unet(self.weights)
            except ValueError as error:
                raise PathfmError(f"weights {one_line(error)}") from None
        return self._model

    def _device(self) -> str:
        from pathfm.runtime import pick_device

        return str(pick_device(self.config.device))


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


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
