"""Pictures in, a score for each method and picture out."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pathfm.foreground_evaluate import ForegroundEvaluateConfig
from pathfm.runtime import PathfmError
from pathfm.segmentation.scores import MaskScores, score_mask
from pathfm.segmentation.truth import INSIDE, OUTSIDE, Truth, read_pictures

if TYPE_CHECKING:
    from torch import nn

Rgb = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Subject:
    """A picture to mask, (h, w, 3) uint8, with its truth."""

    name: str
    rgb: Rgb
    truth: Truth
    group: str
    """H&E, IHC or special; of synthetic thumbnails "synthetic"."""
    source: str
    """Slide or case: pictures of one source are resampled together."""
    drawn: bool = True
    again: Truth | None = None


@dataclass(frozen=True)
class Subjects:
    """What every method is judged on."""

    drawn: tuple[Subject, ...]
    synthetic: tuple[Subject, ...]

    @property
    def all(self) -> tuple[Subject, ...]:
        """Drawn pictures, then synthetic ones."""
        return self.drawn + self.synthetic

    @property
    def digest(self) -> str:
        """SHA-256 over the drawn pictures and all that is drawn on them."""
        sha = hashlib.sha256()
        for subject in self.drawn:
            sha.update(f"{subject.name} {subject.rgb.shape}".encode())
            kinds = [mask for _, mask in sorted(subject.truth.kinds.items())]
            for array in (subject.rgb, subject.truth.tissue, subject.truth.ignore, *kinds):
                sha.update(array.tobytes())
        return sha.hexdigest()


@dataclass(frozen=True)
class Method:
    """A way from a picture to a tidied mask."""

    name: str
    mask: Callable[[Rgb], Mask]
    is_model: bool


@dataclass(frozen=True)
class Row:
    """How one method did on one picture."""

    method: str
    picture: str
    group: str
    source: str
    drawn: bool
    scores: MaskScores = field(repr=False)
    seconds: float = math.nan

    def inside(self, kind: str) -> float:
        """Share of a kind's pixels inside the mask; NaN where none are drawn."""
        pixels = self.scores.kind_px.get(kind, 0)
        return self.scores.kind_inside_px[kind] / pixels if pixels else math.nan


def subjects(config: ForegroundEvaluateConfig) -> Subjects:
    """The drawn pictures of the split, by name, and the synthetic thumbnails."""
    from pathfm.segmentation.truth import DRAWN

    drawn: list[Subject] = []
    if config.pictures:
        folder = config.drawn or DRAWN
        drawn = [
            Subject(p.name, p.rgb, p.truth, p.stain_group, p.case, again=p.again)
            for p in read_pictures(config.pictures, config.split, folder)
        ]
        if not drawn:
            raise PathfmError(f"{folder / 'pictures.csv'}: no picture has split={config.split}")
    synthetic = [_synthetic(config, number) for number in range(config.synthetic)]
    return Subjects(tuple(drawn), tuple(synthetic))


HELD_OUT_FROM = 2_000_000
"""Draw numbers from here on; training and its validation use lower ones."""


def _synthetic(config: ForegroundEvaluateConfig, number: int) -> Subject:
    from pathfm.segmentation.synthetic import Kind, draw_thumbnail

    made = draw_thumbnail(config.seed, HELD_OUT_FROM + number, config.synthetic_px)
    kinds = {name: made.kinds == Kind[name.upper()] for name in (*INSIDE, *OUTSIDE)}
    truth = Truth(np.asarray(made.tissue), np.zeros(made.tissue.shape, np.bool_), kinds)
    name = f"synthetic_{number:04d}"
    return Subject(name, made.rgb, truth, "synthetic", name, drawn=False)


def load_methods(config: ForegroundEvaluateConfig) -> list[Method]:
    """The models, then the thresholds. Models are named after their files."""
    from pathfm.segmentation.thresholds import THRESHOLDS
    from pathfm.segmentation.unet import SHIPPED_WEIGHTS

    paths = config.weights or [SHIPPED_WEIGHTS]
    methods = [
        Method(name, _tidied(_probable(config, path), config), True)
        for name, path in _named(paths).items()
    ]
    return methods + [
        Method(name, _tidied(THRESHOLDS[name], config), False)
        for name in dict.fromkeys(config.methods)
    ]


def _named(paths: list[Path]) -> Mapping[str, Path]:
    """A name for each file: its stem, else its folder's name with it, where stems are the same."""
    from pathfm.segmentation.thresholds import THRESHOLDS

    stems = [path.stem for path in paths]
    named: dict[str, Path] = {}
    for path in paths:
        clash = stems.count(path.stem) > 1 or path.stem in THRESHOLDS
        name = f"{path.resolve().parent.name}_{path.stem}" if clash else path.stem
        name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)[:80]
        if name in named:
            raise PathfmError(f"{path} and {named[name]} would both be called {name!r}: rename one")
        named[name] = path
    return named


def _probable(config: ForegroundEvaluateConfig, path: Path) -> Callable[[Rgb], Mask]:
    import torch

    from pathfm.runtime import pick_device
    from pathfm.segmentation.models import load_model
    from pathfm.segmentation.predict import tissue_probability

    device = pick_device(config.device)
    torch.set_num_threads(config.threads)
    model: nn.Module = load_model(path)[0]
    if getattr(model, "classes", 1) != 1:
        raise PathfmError(f"{path}: has several classes; a mask model has one")
    return lambda rgb: np.asarray(tissue_probability(model, rgb, device) > config.threshold)


def _tidied(mask: Callable[[Rgb], Mask], config: ForegroundEvaluateConfig) -> Callable[[Rgb], Mask]:
    from pathfm.segmentation.tidy import tidy

    return lambda rgb: tidy(mask(rgb), config.smallest_px, config.smallest_share)


def measure(method: Method, subject: Subject) -> tuple[Row, Mask]:
    """The row of a method and a picture, and the mask."""
    began_s = time.perf_counter()
    mask = method.mask(subject.rgb)
    seconds = time.perf_counter() - began_s
    truth = subject.truth
    scores = score_mask(mask, truth.tissue, truth.ignore, truth.kinds)
    row = Row(
        method.name, subject.name, subject.group, subject.source, subject.drawn, scores, seconds
    )
    return row, mask
