"""A frozen network that makes features of patches, and all one must know to feed it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathfm.embeddings.info import Pooling
from pathfm.runtime import PathfmError, Precision, autocast

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

Tokens = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
"""(normalised input (N, 3, H, W), whether patch tokens are wanted) -> summary (N, d), tokens (N, T, d)."""


class Embedder:
    """A frozen network behind one face, whatever library it comes from.

    network: what is moved to a device, in eval mode from here on. tokens: how it is asked. name,
    weights_note: for tables. digest: sha256 of what it computes. mean, std: what pixels on 0..1 are
    normalised with, one value a channel. patch_px: input sides must be its multiples, None: any side.
    """

    def __init__(
        self,
        network: nn.Module,
        tokens: Tokens,
        *,
        name: str,
        weights_note: str,
        digest: str,
        mean: Sequence[float],
        std: Sequence[float],
        patch_px: int | None = None,
    ) -> None:
        self.network, self._tokens = network.eval().requires_grad_(False), tokens
        self.name, self.weights_note, self.digest, self.patch_px = (
            name,
            weights_note,
            digest,
            patch_px,
        )
        self.mean, self.std = check_normalisation(mean, std, name)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> Embedder:
        """Itself, its network on the device."""
        self.network.to(device)
        self.device = device
        return self

    def check_input(self, size_px: int, what: str) -> None:
        """Raises PathfmError, naming the option `what`, unless inputs of this side can be fed."""
        if self.patch_px and size_px % self.patch_px:
            near = max(1, round(size_px / self.patch_px)) * self.patch_px
            raise PathfmError(
                f"{what} = {size_px} is no multiple of the {self.patch_px} px patches of "
                f"{self.name}: try {near}"
            )

    def embed(self, x: Tensor, pooling: Pooling = "cls") -> Tensor:
        """Features of normalised input (N, 3, H, W): (N, d), (N, 2 d) for "cls+mean".

        "cls" is the CLS token, or the pooling an architecture without one was made with; "mean" the
        mean over patch tokens after the last norm (no registers); "cls+mean" the two side by side, in
        this order, as Virchow and Midnight are used. PathfmError where there are no patch tokens.
        """
        summary, patches = self._tokens(x, pooling != "cls")
        if pooling == "cls":
            return self._checked(summary, x)
        if patches is None:
            raise PathfmError(f"{self.name} gives one vector a picture: set pooling to cls")
        mean = patches.mean(dim=1)
        return self._checked(mean if pooling == "mean" else torch.cat([summary, mean], dim=1), x)

    def embed_pixels(
        self, pixels: NDArray[np.uint8], pooling: Pooling = "cls", precision: Precision = "fp32"
    ) -> NDArray[np.float32]:
        """Features float32 (b, d) of patches uint8 (b, s, s, 3) that have the input's size."""
        with torch.inference_mode():
            x = self.normalised(pixels)
            with autocast(self.device, precision):
                y = self.embed(x, pooling)
            return np.asarray(y.float().cpu().numpy())

    def normalised(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Patches uint8 (b, h, w, 3) as the network takes them: float (b, 3, h, w) on its device."""
        x = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float().div_(255.0)
        mean = torch.as_tensor(self.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.as_tensor(self.std, device=self.device).view(1, 3, 1, 1)
        return (x - mean) / std

    def patch_tokens(self, x: Tensor) -> Tensor | None:
        """Patch tokens (N, T, d) of normalised input, row by row, after the last norm; None: it has none."""
        return self._tokens(x, True)[1]

    def _checked(self, features: Tensor, x: Tensor) -> Tensor:
        if features.ndim != 2 or len(features) != len(x):
            raise PathfmError(
                f"{self.name} made {tuple(features.shape)} of {len(x)} pictures; wanted one vector each"
            )
        return features


def check_normalisation(
    mean: Sequence[float], std: Sequence[float], name: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both as tuples; PathfmError unless each has three finite numbers and no sd is 0 or less."""
    found = tuple(float(v) for v in mean), tuple(float(v) for v in std)
    if not all(len(v) == 3 and all(map(math.isfinite, v)) for v in found) or min(found[1]) <= 0:
        raise PathfmError(
            f"{name}: mean {found[0]} and std {found[1]}; give three numbers each, on the scale 0 to 1"
        )
    return found


def digest_of(tensors: Mapping[str, Tensor], facts: object) -> str:
    """sha256 over all tensors (names, types, shapes, bytes) and over JSON facts about the network."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()
