"""The segmentation losses once more, as loops over pixels in Python's floats: the tests' oracle.

Written from the formulas of the papers, one pixel, one class, one picture at a time.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

Counts = dict[str, float]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def softmax(z: Sequence[float]) -> list[float]:
    top = max(z)
    parts = [math.exp(v - top) for v in z]
    return [part / sum(parts) for part in parts]


def pixels(logits: Tensor, target: Tensor, ignore: Tensor | None):
    """For every picture a list of (p of each class, y of each class) of the pixels that count."""
    binary = logits.ndim == target.ndim
    pictures = []
    for b in range(len(target)):
        found = []
        flat_y = target[b].flatten().tolist()
        left_out = [False] * len(flat_y) if ignore is None else ignore[b].flatten().tolist()
        flat_z = [logits[b].flatten().tolist()] if binary else logits[b].flatten(1).tolist()
        for i, (y, skip) in enumerate(zip(flat_y, left_out, strict=True)):
            if skip:
                continue
            if binary:
                found.append(([sigmoid(flat_z[0][i])], [float(y)]))
            else:
                p = softmax([z[i] for z in flat_z])
                found.append((p, [float(c == y) for c in range(len(p))]))
        pictures.append(found)
    return pictures


def counts(found, c: int) -> Counts:
    n = dict.fromkeys(("tp", "fp", "fn", "tn", "p", "y", "pp", "yy"), 0.0)
    for p_all, y_all in found:
        p, y = p_all[c], y_all[c]
        n["tp"] += p * y
        n["fp"] += p * (1 - y)
        n["fn"] += (1 - p) * y
        n["tn"] += (1 - p) * (1 - y)
        n["p"] += p
        n["y"] += y
        n["pp"] += p * p
        n["yy"] += y * y
    return n


def dice(s: float = 1.0) -> Callable[[Counts], float]:
    return lambda n: 1 - (2 * n["tp"] + s) / (n["p"] + n["y"] + s)


def vnet(s: float = 1.0) -> Callable[[Counts], float]:
    return lambda n: 1 - (2 * n["tp"] + s) / (n["pp"] + n["yy"] + s)


def f_beta(b: float, s: float = 1.0) -> Callable[[Counts], float]:
    def formula(n: Counts) -> float:
        top = (1 + b * b) * n["tp"] + s
        return 1 - top / ((1 + b * b) * n["tp"] + b * b * n["fn"] + n["fp"] + s)

    return formula


def jaccard(s: float = 1.0) -> Callable[[Counts], float]:
    return lambda n: 1 - (n["tp"] + s) / (n["tp"] + n["fp"] + n["fn"] + s)


def tversky(a: float, b: float, s: float = 1.0, gamma: float = 1.0) -> Callable[[Counts], float]:
    def formula(n: Counts) -> float:
        index = (n["tp"] + s) / (n["tp"] + a * n["fp"] + b * n["fn"] + s)
        return (1 - index) ** (1 / gamma)

    return formula


def mcc() -> Callable[[Counts], float]:
    def formula(n: Counts) -> float:
        tp, fp, fn, tn = n["tp"], n["fp"], n["fn"], n["tn"]
        root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return 1 - (tp * tn - fp * fn) / root

    return formula


def summed(
    formula,
    logits,
    target,
    ignore=None,
    reduction="image",
    empty="count",
    weights=None,
    classes=None,
) -> float:
    """A loss of counts: per picture (or batch) the weighted mean over classes, then the mean."""
    pictures = pixels(logits, target, ignore)
    if reduction == "batch":
        pictures = [[one for found in pictures for one in found]]
    n_classes = 1 if logits.ndim == target.ndim else logits.shape[1]
    values = []
    for found in pictures:
        if not found:
            continue
        top = bottom = 0.0
        for c in range(n_classes) if classes is None else classes:
            n = counts(found, c)
            if empty == "skip" and n["y"] == 0:
                continue
            weight = 1.0 if weights is None else weights[c]
            top += weight * formula(n)
            bottom += weight
        if bottom > 0:
            values.append(top / bottom)
    return sum(values) / len(values) if values else 0.0


def pixelwise(
    logits,
    target,
    ignore=None,
    reduction="batch",
    weights=None,
    classes=None,
    smoothing=0.0,
    gamma=0.0,
) -> float:
    """Cross-entropy (gamma = 0) or focal loss; weights of (background, foreground) when binary."""
    pictures = []
    for found in pixels(logits, target, ignore):
        values = []
        for p_all, y_all in found:
            p = p_all if len(p_all) > 1 else [1 - p_all[0], p_all[0]]
            y = y_all if len(y_all) > 1 else [1 - y_all[0], y_all[0]]
            if classes is not None and y.index(1.0) not in classes:
                continue
            value = 0.0
            for c in range(len(p)):
                soft = y[c] * (1 - smoothing) + smoothing / len(p)
                weight = 1.0 if weights is None else weights[c]
                value -= weight * soft * (1 - p[c]) ** gamma * math.log(p[c])
            values.append(value)
        pictures.append(values)
    if reduction == "batch":
        pictures = [[v for values in pictures for v in values]]
    means = [sum(values) / len(values) for values in pictures if values]
    return sum(means) / len(means) if means else 0.0
