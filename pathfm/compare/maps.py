"""Maps of embeddings: rows as points in two dimensions, coloured by class, slide and µm/px.

PCA is exact and has axes that mean something (shares of variance). UMAP (McInnes et al.,
arXiv 1802.03426) shows neighbourhoods; its distances and empty spaces mean nothing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from online_patching.philox import fine_uniform, words
from pathfm.compare.drawing import plain_words, save, sheet
from pathfm.embeddings import Embeddings, read_header
from pathfm.pictures import COLOURS
from pathfm.runtime import PathfmError

Floats = NDArray[np.float64]
_STREAM = 461  # of the words that draw rows
_MOST_FILES = 100
_COLOURS = (*COLOURS[:6], "#8b5a2b", "#5b2a86", "#111111", "#b8c200")
"""As many names are told apart; the rest is grey."""
_TOLD = {"slide": "slide, or what else the groups are"}


@dataclass(frozen=True)
class EmbeddingMap:
    """Points (n, 2) of one model, what each is by aspect ("class", "slide", "µm/px"), and what axes are."""

    model: str
    data: str
    n: int  # rows in all, of which the points were drawn
    points: Floats
    aspects: Mapping[str, tuple[str, ...]]
    axes: tuple[str, str]


def embedding_files(given: Sequence[Path]) -> list[Path]:
    """The files meant: as given, or all below a folder."""
    files = [
        f
        for path in given
        for f in (sorted(path.rglob("*.safetensors")) if path.is_dir() else [path])
    ]
    if given and not files:
        raise PathfmError(
            f"maps: no *.safetensors in {given[0]} or below; `pathfm embed` makes them"
        )
    if len(files) > _MOST_FILES:
        raise PathfmError(f"maps: {len(files):,} files, at most {_MOST_FILES}: name those you mean")
    return files


def still_there(probed: Sequence[tuple[str, str]]) -> list[Path]:
    """Files that results name, each once, as long as they lie there and hold that backbone's features."""
    return [
        path
        for path, digest in dict.fromkeys((Path(name), digest) for name, digest in probed)
        if path.suffix == ".safetensors" and path.is_file() and _backbone_of(path) == digest
    ][:_MOST_FILES]


def _backbone_of(path: Path) -> str | None:
    try:
        info: dict[str, str] = json.loads(read_header(path)["info"])
        return info["backbone_digest"]
    except (PathfmError, ValueError, KeyError, TypeError):
        return None


def embedding_maps(
    files: Sequence[Path], method: Literal["pca", "umap"], most_points: int, seed: int
) -> list[EmbeddingMap]:
    """A map a model: files of one model and pooling (of several µm/px, or data sets) lie in one map.

    At most `most_points` rows of each map are drawn, the same for the same seed and files. Raises
    `PathfmError` without umap-learn, and for fewer than three rows.
    """
    if method == "umap":
        _umap()  # before anything is read
    models: dict[tuple[str, str, int], list[Embeddings]] = {}
    for file in files:
        one = Embeddings.load(file, mmap=True)
        key = (one.info.backbone_digest, one.info.pooling, one.features.shape[1])
        models.setdefault(key, []).append(one)
    return [_mapped(parts, method, most_points, seed) for parts in models.values()]


def _mapped(
    parts: Sequence[Embeddings], method: Literal["pca", "umap"], most_points: int, seed: int
) -> EmbeddingMap:
    total = sum(len(part.labels) for part in parts)
    name = parts[0].info.name
    if total < 3:
        raise PathfmError(f"a map of {name} needs three rows or more, it has {total}")
    rows = draw_rows(total, most_points, seed)
    starts = np.cumsum([0, *(len(part.labels) for part in parts)])
    features: list[Floats] = []
    aspects: dict[str, list[str]] = {"class": [], "slide": [], "µm/px": []}
    for part, start, stop in zip(parts, starts, starts[1:], strict=False):
        mine = rows[(rows >= start) & (rows < stop)] - start
        features.append(np.asarray(part.features[mine], np.float64))
        aspects["class"] += [part.classes[label] for label in part.labels[mine]]
        aspects["slide"] += [part.groups[row] if part.groups else "" for row in mine]
        aspects["µm/px"] += [f"{part.info.mpp:g}" if part.info.mpp else ""] * len(mine)
    x = np.concatenate(features)
    points, axes = pca(x) if method == "pca" else (umap(x, seed), ("UMAP 1", "UMAP 2"))
    kept = {
        aspect: tuple(told)
        for aspect, told in aspects.items()
        if aspect == "class" or len({word for word in told if word}) > 1
    }
    data = ", ".join(dict.fromkeys(part.info.data for part in parts))
    return EmbeddingMap(name, data, total, points, kept, axes)


def draw_rows(n: int, most: int, seed: int) -> NDArray[np.int64]:
    """Row numbers, ascending: all, or `most` of them, every set of that size equally likely."""
    if n <= most:
        return np.arange(n)
    drawn = words(seed, np.arange(n), 0, _STREAM, 2)
    order = np.argsort(fine_uniform(drawn[:, 0], drawn[:, 1]), kind="stable")
    return np.sort(order[:most])


def pca(x: Floats) -> tuple[Floats, tuple[str, str]]:
    """Scores of the two leading principal components (n, 2) and their names with shares of variance.

    x: (n, d). Each component's sign is such that its largest loading is positive.
    """
    centred = x - x.mean(axis=0)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    axes = np.zeros((2, x.shape[1]))
    axes[: min(2, len(vt))] = vt[:2]
    largest = np.abs(axes).argmax(axis=1)
    axes *= np.where(axes[np.arange(2), largest] < 0, -1.0, 1.0)[:, None]
    variance = np.zeros(2)
    variance[: min(2, len(s))] = s[:2] ** 2
    told = 100 * variance / max(float((s**2).sum()), 1e-300)
    return centred @ axes.T, (f"PC 1 ({told[0]:.0f} %)", f"PC 2 ({told[1]:.0f} %)")


def umap(x: Floats, seed: int) -> Floats:
    """UMAP's two coordinates (n, 2), 15 neighbours, cosine distance, one thread so that a seed repeats."""
    model = _umap()(n_neighbors=min(15, len(x) - 1), metric="cosine", random_state=seed, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its spectral start falls back aloud on small data
        found: Floats = np.asarray(model.fit_transform(x), np.float64)
    return found


def _umap() -> type:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells that Tensorflow is not there
            from umap import UMAP
    except ImportError:
        raise PathfmError(
            "map_method umap: umap-learn is not installed: `pip install -c constraints.txt umap-learn`, or take pca"
        ) from None
    found: type = UMAP
    return found


def draw_map(one: EmbeddingMap) -> bytes:
    """A panel an aspect; the most frequent names in colours, others grey, in the same order everywhere."""
    figure, panels = sheet(len(one.aspects), 1, 4.6 * len(one.aspects), 5.2)
    figure.suptitle(plain_words(one.model), fontsize=11)
    for panel, (aspect, told) in zip(panels[0], one.aspects.items(), strict=True):
        names, counts = np.unique(told, return_counts=True)
        ranked = [str(names[i]) for i in np.lexsort((names, -counts)) if names[i]]
        shown, which = ranked[: len(_COLOURS)], np.asarray(told)
        rest = ~np.isin(which, shown)
        size = 10 if len(which) <= 1500 else 5
        style = {"s": size, "linewidths": 0, "alpha": 0.7}
        if rest.any():
            others = (
                f"{len(ranked) - len(shown)} others" if len(ranked) > len(shown) else "not known"
            )
            panel.scatter(*one.points[rest].T, color="#c8c8c8", label=others, **style)
        for n, name in enumerate(sorted(shown, key=_natural)):
            mine = which == name
            panel.scatter(
                *one.points[mine].T,
                color=_COLOURS[n],
                label=plain_words(name),
                **style,
            )
        panel.set_title(_TOLD.get(aspect, aspect), fontsize=9)
        panel.set_xlabel(one.axes[0], fontsize=8)
        panel.set_ylabel(one.axes[1], fontsize=8)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.08),
            ncols=3,
            fontsize=7,
            markerscale=2,
            frameon=False,
        )
    return save(figure)


def _natural(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return float("inf"), name
