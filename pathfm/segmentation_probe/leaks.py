"""Which pictures of a segmentation data set, or tiles of them, a model had seen in pretraining."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pathfm.datasets import Benchmark
from pathfm.leakage import Leaks, PretrainedOn, check_pictures
from pathfm.leakage.seen import Ids
from pathfm.segmentation_probe.pictures import Pictures


def leaks_of(
    seen: PretrainedOn | None, data: Benchmark, pictures: Pictures, ids: Ids | None = None
) -> Leaks:
    """The tiles that were seen: themselves, or as a part of a picture or patient that was.

    Rows are those of `pictures`. Without a picture's group its path is no patient's name, and not compared.
    """
    groups = ["" if g == p else g for g, p in zip(data.groups, data.paths, strict=True)]
    whole = check_pictures(seen, data.read, len(data), groups, data.paths, ids)
    names = [data.paths[i] for i in pictures.of]

    def tile(i: int) -> NDArray[np.uint8]:
        return np.asarray(pictures.pixels[i])

    tiles = check_pictures(seen, tile, len(names), (), names)
    if not tiles.known:
        return tiles
    kinds = dict.fromkeys((*whole.compared, *tiles.compared))
    rows = {kind: set(tiles.rows.get(kind, ())) for kind in kinds}
    for kind, hit in whole.rows.items():
        rows[kind] |= set(np.flatnonzero(np.isin(pictures.of, hit)).tolist())
    found = replace(
        tiles,
        compared=tuple(kinds),
        rows={kind: tuple(sorted(hits)) for kind, hits in rows.items()},
        notes=tuple(dict.fromkeys((*whole.notes, *tiles.notes))),
    )
    first = dict.fromkeys(names[i] for i in np.flatnonzero(found.mask()))
    return replace(found, examples=tuple(first)[:5])
