"""Numbers that judge features: balanced accuracy, RankMe, kNN and the linear probe's solver.

Labels are int64 (n,), classes counted from 0; features are float (n, d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.philox import uniform, words

Labels = NDArray[np.int64]
Features = NDArray[np.floating]

_STREAM_HEAD = 403
RANKME_EPS = 1e-7  # the paper's value, for float32 features
RANKED_ROWS = 16_384
_BLOCK_COSINES = 1 << 23


def confusion_matrix(truth: ArrayLike, predicted: ArrayLike, n_classes: int) -> NDArray[np.int64]:
    """Counts (n_classes, n_classes): row = true class, column = predicted class."""
    t, p = np.asarray(truth, np.int64), np.asarray(predicted, np.int64)
    counts = np.bincount(t * n_classes + p, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64)


def recall_per_class(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of each class found, (n_classes,); NaN for a class that does not occur."""
    total = confusion.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall: NDArray[np.float64] = np.diag(confusion) / total
    return recall


def balanced_accuracy(truth: ArrayLike, predicted: ArrayLike, n_classes: int) -> float:
    """Mean recall over the classes that occur in `truth`, as scikit-learn defines it."""
    return float(np.nanmean(recall_per_class(confusion_matrix(truth, predicted, n_classes))))


def rankme(features: Features, eps: float = RANKME_EPS) -> float:
    """Effective rank of a feature matrix (n, d), between 1 and min(n, d); low means collapse.

    exp(-sum_k p_k log p_k) with p_k = sigma_k / sum(sigma) + eps over the singular values sigma
    (Garrido et al. 2023, "RankMe", eq. 1). Features are not centred, as in the paper. Computed in
    float64. Compare only between equal n and d. All-zero features give 1.
    """
    sigma = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
    total = sigma.sum()
    if total == 0:
        return 1.0
    p = sigma / total + eps
    return float(np.exp(-(p * np.log(p)).sum()))


def rankme_of_some(features: Features) -> float:
    """RankMe of at most RANKED_ROWS evenly spaced rows: of a million the SVD takes minutes and 3 GB."""
    if len(features) > RANKED_ROWS:
        features = features[np.linspace(0, len(features) - 1, RANKED_ROWS).astype(np.int64)]
    return rankme(features)


def knn_predict(
    train: Features,
    train_labels: Labels,
    test: Features,
    k: int = 20,
    n_classes: int | None = None,
) -> Labels:
    """The class most of the `k` nearest neighbours have, (n_test,), as `knn_shares` says.

    A tie goes to the lowest class number, as in scikit-learn.
    """
    classes = n_classes or int(train_labels.max()) + 1
    shares = knn_shares(train, train_labels, test, k, classes)
    return np.asarray(shares.argmax(axis=1), np.int64)


def knn_shares(
    train: Features, train_labels: Labels, test: Features, k: int, n_classes: int
) -> NDArray[np.float64]:
    """The share of each class among the `k` nearest neighbours, cosine distance, equal votes: (n_test, classes).

    Cosines in float32; of samples equally near the first count, whatever else is in a block. `k` is capped at
    the number of training samples. A zero vector is equally far from everything. Beside the features a
    block takes some 200 MB at most, or 20 bytes a training sample.
    """
    k, step = min(k, len(train)), max(1, _BLOCK_COSINES // len(train))
    a, b = (_unit(features).astype(np.float32) for features in (train, test))
    member = np.eye(n_classes, dtype=np.float32)[train_labels]
    out = np.empty((len(b), n_classes))
    for at in range(0, len(b), step):
        similarity = b[at : at + step] @ a.T
        out[at : at + step] = (nearest(similarity, k).astype(np.float32) @ member) / k
    return out


def nearest(similarity: NDArray[np.float32], k: int) -> NDArray[np.bool_]:
    """Which k columns of each row are largest, (n, m); of equals at the boundary the first."""
    at = similarity.shape[1] - k
    last = np.partition(similarity, at, axis=1)[:, at, None]  # the k-th largest
    nearer, level = similarity > last, similarity == last
    free = k - nearer.sum(axis=1, keepdims=True)
    return np.asarray(nearer | (level & (np.cumsum(level, axis=1, dtype=np.int32) <= free)))


@dataclass(frozen=True)
class Standardiser:
    """Shifts and scales features to mean 0 and sd 1 of the rows it was made from."""

    mean: NDArray[np.float64]
    sd: NDArray[np.float64]

    @staticmethod
    def of(features: NDArray[Any]) -> Standardiser:
        """From (n, d) features; a constant feature keeps its scale."""
        f = features.astype(np.float64)
        sd = f.std(axis=0)
        return Standardiser(f.mean(axis=0), np.where(sd > 1e-12, sd, 1.0))

    def __call__(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """(n, d) float64."""
        scaled: NDArray[np.float64] = (features - self.mean) / self.sd
        return scaled


def initial_head(dim: int, n_classes: int, seed: int, repeat: int) -> NDArray[np.float64]:
    """A small random head (dim + 1, n_classes), uniform in ±0.01; the last row is the bias."""
    drawn = uniform(words(seed, np.arange(dim + 1), repeat, _STREAM_HEAD, n_classes))
    head: NDArray[np.float64] = 0.02 * drawn - 0.01
    return head


def fit_logistic(
    x: NDArray[np.float64],
    labels: NDArray[np.int64],
    c: float,
    start: NDArray[np.float64],
    tolerance: float = 1e-5,
) -> NDArray[np.float64]:
    """The minimiser of  C * sum_i CE(x_i W + b, y_i) + ||W||^2 / 2  as (d + 1, classes).

    scikit-learn's objective, bias not penalised. L-BFGS with a strong Wolfe line search in float64,
    until no gradient component of the mean loss exceeds `tolerance`; at most 1,000 iterations.
    """
    import torch

    n = len(x)
    features, target = torch.from_numpy(x), torch.from_numpy(labels)
    head = torch.from_numpy(start.copy()).requires_grad_()
    solver = torch.optim.LBFGS(
        [head],
        max_iter=1000,
        max_eval=1500,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Any:
        solver.zero_grad()
        logits = features @ head[:-1] + head[-1]
        loss = torch.nn.functional.cross_entropy(logits, target)
        loss = loss + head[:-1].square().sum() / (2 * c * n)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return np.asarray(head.detach().numpy())


def decide(x: NDArray[np.float64], head: NDArray[np.float64]) -> NDArray[np.int64]:
    """The class with the highest logit for each row."""
    return np.asarray((x @ head[:-1] + head[-1]).argmax(axis=1), np.int64)


def _unit(features: Features) -> NDArray[np.float64]:
    f = np.asarray(features, np.float64)
    norms = np.linalg.norm(f, axis=1, keepdims=True)
    unit: NDArray[np.float64] = f / np.where(norms == 0, 1.0, norms)
    return unit
