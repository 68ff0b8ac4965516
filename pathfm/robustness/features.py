"""Features of pictures as they are and of the same pictures corrupted, each written once.

One file a model and case under `<out>/features/<model>/`. Every picture is corrupted once for all
models; what is on disk already with the same key is not made again, so a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pathfm.corruptions import CORRUPTIONS, corrupt, picture_numbers
from pathfm.datasets import Benchmark
from pathfm.datasets.preparing import fit, in_batches
from pathfm.embeddings import Embeddings, EmbeddingsInfo, stored_key
from pathfm.embeddings.info import describe_transform
from pathfm.robustness.settings import RobustnessConfig
from pathfm.runtime import pick_device, plan_precision, progress

if TYPE_CHECKING:
    from pathfm.models import Embedder

Features = NDArray[np.float32]
CLEAN = "clean"
_GEOMETRY = "shorter side resized (bilinear, antialiased), centre cropped"


def make_features(
    models: Mapping[str, Embedder],
    samples: Benchmark,
    tested: NDArray[np.int64],
    config: RobustnessConfig,
) -> dict[str, list[Path]]:
    """The files of each model: features of all pictures, then of the tested rows in every case.

    tested: row numbers, ascending. Cases come in the order of `config.cases()`.
    """
    pictures = _Pictures(samples, config)
    files: dict[str, list[Path]] = {name: [] for name in models}
    cases = config.cases()
    total = len(samples) + len(tested) * len(cases)
    with progress(total, "pictures", "robustness") as bar:
        for case in (None, *cases):
            rows = np.arange(len(samples)) if case is None else tested
            wanted = {
                name: _place(name, model, pictures, rows, case) for name, model in models.items()
            }
            for name, (path, _) in wanted.items():
                files[name].append(path)
            lacking = {n: w for n, w in wanted.items() if stored_key(w[0]) != w[1].key}
            if lacking:
                made = pictures.embed({name: models[name] for name in lacking}, rows, case)
                for name, (path, info) in lacking.items():
                    _save(made[name], samples, rows, info, path)
            bar.advance(len(rows))
    return files


def clean_place(
    name: str, model: Embedder, samples: Benchmark, config: RobustnessConfig
) -> tuple[Path, str]:
    """Where a model's features of the pictures as they are lie, and their key; makes none."""
    path, info = _place(name, model, _Pictures(samples, config), np.arange(len(samples)), None)
    return path, info.key


class _Pictures:
    """A data set's pictures as batches, corrupted or not, and what features of them depend on."""

    def __init__(self, samples: Benchmark, config: RobustnessConfig) -> None:
        self.samples, self.config, self.digest = samples, config, samples.digest
        self.numbers = picture_numbers(samples.paths)
        self.precision = plan_precision(config.precision, pick_device(config.device))

    def embed(
        self, models: Mapping[str, Embedder], rows: NDArray[np.int64], case: tuple[str, int] | None
    ) -> dict[str, Features]:
        """Features (len(rows), d) by model; each picture read, and corrupted, once."""
        parts: dict[str, list[Features]] = {name: [] for name in models}
        size, threads = self.config.batch_size, self.config.threads
        chunks = [rows[at : at + size].tolist() for at in range(0, len(rows), size)]
        for batch in in_batches(lambda row: self._one(row, case), chunks, threads):
            for name, model in models.items():
                parts[name].append(model.embed_pixels(batch, precision=self.precision))
        return {name: np.concatenate(found) for name, found in parts.items()}

    def _one(self, row: int, case: tuple[str, int] | None) -> NDArray[np.uint8]:
        path = self.samples.paths[row]
        pixels = fit(self.samples.read(row), self.config.input_px, path)[None]
        if case is not None:
            pixels = corrupt(pixels, *case, self.numbers[row : row + 1], self.config.seed)
        one: NDArray[np.uint8] = pixels[0]
        return one

    def transform(self, model: Embedder, case: tuple[str, int] | None) -> str:
        """How pictures become input, in words that are part of the key."""
        px = self.config.input_px
        told = describe_transform(_GEOMETRY, px, model.mean, model.std)
        if case is None:
            return told
        kind = CORRUPTIONS[case[0]]
        facts = [kind.name, case[1], kind.levels[case[1] - 1], kind.stream, self.config.seed]
        return f"{told} {json.dumps(facts)}"


def _place(
    name: str,
    model: Embedder,
    pictures: _Pictures,
    rows: NDArray[np.int64],
    case: tuple[str, int] | None,
) -> tuple[Path, EmbeddingsInfo]:
    """Where features lie, and what they are made of."""
    config, what = pictures.config, CLEAN if case is None else f"{case[0]}-{case[1]}"
    data = hashlib.sha256(f"{pictures.digest}\0".encode() + rows.astype("<i8").tobytes())
    info = EmbeddingsInfo(
        name=name,
        backbone=model.name,
        backbone_digest=model.digest,
        weights_note=model.weights_note,
        data=f"{pictures.samples.name}, {what}",
        data_digest=data.hexdigest(),
        input_px=config.input_px,
    )
    info = replace(info, precision=pictures.precision, transform=pictures.transform(model, case))
    return config.out / "features" / name / f"{what}.safetensors", info


def _save(
    features: Features,
    samples: Benchmark,
    rows: NDArray[np.int64],
    info: EmbeddingsInfo,
    path: Path,
) -> None:
    def of(texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(texts[row] for row in rows) if texts else ()

    labels = samples.labels[rows]
    Embeddings(features, labels, samples.classes, of(samples.paths), of(samples.groups), info).save(
        path
    )
