"""Writes groups.csv for labelled pictures without slide ids: clusters of their features.

    cp -r ../shared/data/patches/colorectal5 colorectal5
    pathfm embed --data colorectal5 --weights imagenet --name imagenet
    python tools/cluster_groups.py --embeddings embeddings/imagenet.safetensors --data colorectal5

Pictures that look alike then stay on one side of a split. A stand-in, no substitute for slides: a slide is
still torn where its patches differ, and the backbone whose features were clustered is at a disadvantage,
for what is tested is far from what was learnt in its own eyes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from pathfm.cohorts import write_csv
from pathfm.datasets.folder import CLUSTERED, LabelledFolder, scan_folder
from pathfm.embeddings import Embeddings
from pathfm.leakage import digest_picture, distances
from pathfm.leakage.digests import MOST_BITS
from pathfm.runtime import PathfmError


def clusters(features: NDArray[np.float32], n_clusters: int, seed: int) -> NDArray[np.int64]:
    """The k-means cluster of each row, (n,): of features less their mean, scaled to length 1."""
    centred = features - features.mean(axis=0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    found = KMeans(n_clusters, n_init=3, random_state=seed).fit(centred)
    return np.asarray(found.labels_, np.int64)


def twins(pictures: LabelledFolder) -> list[tuple[int, int]]:
    """Pairs of rows (first < second) that are copies by digest, mirrored and turned ones too."""
    digests = np.stack([digest_picture(pictures.read(i)) for i in range(len(pictures))])
    pairs = []
    for row in range(1, len(digests)):
        apart, which = distances(digests[row : row + 1], digests[:row])
        if apart[0] <= MOST_BITS:
            pairs.append((int(which[0]), row))
    return pairs


def kept_together(groups: NDArray[np.int64], pairs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The groups with the second of each pair in the group of its first."""
    joined = groups.copy()
    for first, second in pairs:
        joined[second] = joined[first]
    return joined


def write_groups(embeddings: Path, data: Path, n_clusters: int, seed: int) -> str:
    """Writes `<data>/groups.csv`; a line about it. `PathfmError` for features of other pictures."""
    pictures, features = scan_folder(data), Embeddings.load(embeddings)
    if features.paths != pictures.paths:
        raise PathfmError(f"{embeddings} has {len(features.paths):,} pictures, not those of {data}")
    if not 2 <= n_clusters <= len(pictures):
        raise PathfmError(
            f"{n_clusters:,} clusters of {len(pictures):,} pictures; wanted 2 or more"
        )
    groups, pairs = clusters(features.features, n_clusters, seed), twins(pictures)
    torn = sum(bool(groups[a] != groups[b]) for a, b in pairs)
    groups = kept_together(groups, pairs)
    rows = [
        (path, f"{CLUSTERED}{group:03d}")
        for path, group in zip(pictures.paths, groups, strict=True)
    ]
    write_csv(data / "groups.csv", ("path", "group"), rows)
    sizes = np.bincount(groups)
    return (
        f"{len(rows):,} pictures in {np.count_nonzero(sizes)} groups of {sizes[sizes > 0].min()} to "
        f"{sizes.max()}; {len(pairs)} pairs of copies, {torn} of them brought together"
    )


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embeddings", type=Path, required=True, help="what is clustered")
    parser.add_argument("--data", type=Path, required=True, help="folder that gets groups.csv")
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        print(write_groups(given.embeddings, given.data, given.clusters, given.seed))
    except PathfmError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
