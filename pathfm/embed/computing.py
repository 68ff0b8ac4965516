"""Features of a data set, in parts that survive whatever happens to the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pathfm.datasets.preparing import Pixels, in_batches
from pathfm.embed.parts import Parts
from pathfm.embed.settings import EmbedConfig
from pathfm.embeddings.table import check_finite
from pathfm.models import Embedder
from pathfm.ranks import Ranks, gather_objects
from pathfm.runtime import progress

# Measured on a Xeon with avx512_bf16, ViT-Ti at 224 px, two threads: 114 pictures/s in bf16, 45 in
# fp32, lowest cosine between the two 0.9998 over 128 patches.
MIN_COSINE = 0.999

Plan = Literal["bf16", "fp32"]


def choose_precision(
    config: EmbedConfig, model: Embedder, plan: Plan, first: Callable[[], Pixels]
) -> Plan:
    """The precision to compute in: as planned, or fp32 where "auto" planned bf16 that turns features.

    first: gives the first batch, which is done both ways and decides; the same again on a rerun.
    """
    if plan != "bf16" or config.precision != "auto":
        return plan
    pixels = first()
    rough, exact = (model.embed_pixels(pixels, config.pooling, p) for p in (plan, "fp32"))
    cosine = lowest_cosine(rough, exact)
    if cosine >= MIN_COSINE:
        return plan
    print(f"embed {config.name}: fp32, for bf16 agrees to cosine {cosine:.4f} only")  # also NaN
    return "fp32"


def compute_parts(
    config: EmbedConfig,
    model: Embedder,
    make: Callable[[int], Pixels],
    parts: Parts,
    precision: Plan,
    ranks: Ranks,
) -> int:
    """Makes this rank's share of the missing parts; returns the rows made.

    Which parts are missing is what rank 0 sees, so that every one is somebody's.
    """
    missing: list[int] = gather_objects(parts.missing() if ranks.first else None)[0]
    own = missing[ranks.rank :: ranks.world]
    batches = [
        (number, parts.rows(number)[at : at + config.batch_size])
        for number in own
        for at in range(0, len(parts.rows(number)), config.batch_size)
    ]
    total = sum(len(rows) for _, rows in batches)
    done = 0 if ranks.world > 1 else parts.n - total
    made: list[NDArray[np.float32]] = []
    inputs = in_batches(make, [rows for _, rows in batches], config.threads)
    with progress(done + total, "pictures", f"embed {config.name}", done) as bar:
        for pixels, (number, rows) in zip(inputs, batches, strict=True):
            features = model.embed_pixels(pixels, config.pooling, precision)
            check_finite(features, config.name, rows.start)
            made.append(features)
            if rows.stop == parts.rows(number).stop:
                parts.write(number, np.concatenate(made))
                made.clear()
            bar.advance(len(pixels))
    return total


def lowest_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The lowest cosine between equal rows of two feature matrices (n, d)."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(norms, 1e-12)).min())
