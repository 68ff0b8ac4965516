"""A timm network without classifier behind one face, be it a vision transformer or a ConvNet."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pathfm.backbone.keyed import KeyedDropPath, SampleKeys, set_factors
from pathfm.backbone.layers import layer_table
from pathfm.runtime import PathfmError, torch_generator

INIT_STREAM = 1 << 17
"""Philox stream of random initial weights (the views' streams start at 1 << 16)."""
MASK_TOKEN_DRAW = 2
"""Draw number of the mask token's initial value under the run's seed."""


@contextmanager
def seeded_init(seed: int, draw: int = 0) -> Iterator[None]:
    """A context in which torch's CPU generator is a function of (seed, draw); restored after it.

    For initial weights only: libraries draw them from the global generator and take no other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_generator(seed, draw, INIT_STREAM).initial_seed())
        yield


class Backbone(nn.Module):
    """A timm network without its classifier, and what one must know to feed it.

    network: the timm model. name: its timm name. mean, std: what inputs on 0..1 are normalised
    with, one value a channel. input_px: the side its weights were made for; other sides work too
    (the position embedding of a transformer is resampled in the forward pass). patch_size: pixels
    between the cells of its map of tokens. dim: width of `embed`; token_dim: of patch tokens, which
    differs from dim in few ConvNets only.
    """

    def __init__(
        self, network: nn.Module, name: str, weights_note: str, input_px: int | None = None
    ) -> None:
        super().__init__()
        config, timm_model = cast(Any, network).pretrained_cfg, cast(Any, network)
        self.network, self.name, self.weights_note = network, name, weights_note
        self.mask_token: nn.Parameter | None = None
        self._masks: Tensor | None = None
        self.eval()
        self.mean: tuple[float, ...] = tuple(map(float, config["mean"]))
        self.std: tuple[float, ...] = tuple(map(float, config["std"]))
        self.is_transformer = hasattr(network, "patch_embed")
        self.token_dim = int(timm_model.num_features)
        self.dim = int(getattr(timm_model, "head_hidden_size", None) or self.token_dim)
        self._layers, self.n_layers = layer_table(network)
        self._drops = [m for m in network.modules() if isinstance(m, KeyedDropPath)]
        if self.is_transformer:
            self.patch_size = int(timm_model.patch_embed.patch_size[0])
            self.input_px = int(timm_model.patch_embed.img_size[0])
            timm_model.patch_embed.register_forward_hook(self._mask_patches)
        else:
            self.patch_size = int(timm_model.feature_info[-1]["reduction"])
            self.input_px = input_px or int(config["input_size"][-1])

    def forward(self, x: Tensor) -> Tensor:
        """All tokens (N, T', token_dim) after the last norm, prefix tokens (CLS, registers) first.

        x: normalised float (N, 3, H, W); H and W multiples of `patch_size` for a transformer. A
        ConvNet's tokens are the cells of its last map, row by row.
        """
        found = self._features(x, None, None)
        return found if self.is_transformer else found.flatten(2).transpose(1, 2)

    def embed(self, x: Tensor, keys: SampleKeys | None = None) -> Tensor:
        """One feature vector an image, (N, dim): CLS, or the pooling the architecture was made with.

        keys: who the rows are, for stochastic depth in training mode; without them nothing is
        dropped, nor in eval mode.
        """
        set_factors(self._drops, keys if self.training else None, x)
        return cast(Tensor, self.network(x))

    def tokens(
        self, x: Tensor, keys: SampleKeys | None = None, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(what `embed` gives (N, dim), patch tokens (N, T, token_dim) row by row), after the last norm.

        masks: (N, T) bool; where True the patch's embedding is the mask token, before the position
        embedding is added. Raises PathfmError for masks without `add_mask_token`, or of another shape.
        """
        found, timm_model = self._features(x, keys, masks), cast(Any, self.network)
        pooled = timm_model.forward_head(found)
        if self.is_transformer:
            return pooled, found[:, timm_model.num_prefix_tokens :]
        return pooled, found.flatten(2).transpose(1, 2)

    def add_mask_token(self, seed: int) -> None:
        """Gives a transformer a learnt mask token, normal with sd 0.02 from `seed`, for `masks`.

        It lies outside `network`: no export and no digest knows it. In training its gradient is zero,
        not absent, when nothing is masked. Raises PathfmError for a ConvNet.
        """
        if not self.is_transformer:
            raise PathfmError(
                f"{self.name} has no patch embeddings to mask: masked image modelling needs a vision "
                "transformer such as vit_small_patch16_224"
            )
        drawn = torch.randn(
            self.token_dim, generator=torch_generator(seed, MASK_TOKEN_DRAW, INIT_STREAM)
        )
        device = next(self.network.parameters()).device
        self.mask_token = nn.Parameter((0.02 * drawn).to(device))

    @property
    def stem(self) -> nn.Module:
        """What turns pixels into the first features: the patch projection, or the first convolution."""
        if self.is_transformer:
            return cast(nn.Module, self.network.patch_embed)
        first = cast(Any, self.network).pretrained_cfg["first_conv"]
        return self.network.get_submodule(first if isinstance(first, str) else first[0])

    @property
    def blocks(self) -> list[nn.Module]:
        """The network's pieces from input to output, for compiling or sharding each by itself.

        A transformer's blocks, a ConvNet's stages; the whole network where it names neither.
        """
        for attribute in ("blocks", "stages"):
            if hasattr(self.network, attribute):
                return list(cast(nn.ModuleList, getattr(self.network, attribute)))
        named = self.network.named_children()
        return [module for name, module in named if re.fullmatch(r"layer\d+", name)] or [
            self.network
        ]

    def grid(self, size_px: int) -> tuple[int, int]:
        """(rows, columns) of patch tokens of an input of this side; raises as `check_input` does."""
        self.check_input(size_px, "size_px")
        if self.is_transformer:
            return size_px // self.patch_size, size_px // self.patch_size
        set_factors(self._drops, None, torch.empty(0))
        rows, columns = _meta_features(self.network, size_px).shape[-2:]
        return rows, columns

    def layer_of(self, parameter_name: str) -> int:
        """A parameter's layer, 0 (embeddings) to n_layers + 1 (last norm): see `layers.py`.

        parameter_name: as `named_parameters` of this module says. Raises PathfmError for others.
        """
        if parameter_name == "mask_token":
            return 0
        name = parameter_name.removeprefix("network.")
        if name not in self._layers:
            raise PathfmError(f"{self.name} has no parameter {parameter_name!r}")
        return self._layers[name]

    def check_input(self, size_px: int, what: str) -> None:
        """Raises PathfmError, naming the option `what`, unless inputs of this side can be fed."""
        if not self.is_transformer:
            if size_px < self.patch_size:
                raise PathfmError(
                    f"{what} = {size_px} leaves {self.name} no map: give {self.patch_size} or more"
                )
        elif size_px % self.patch_size:
            near = max(1, round(size_px / self.patch_size)) * self.patch_size
            raise PathfmError(
                f"{what} = {size_px} is no multiple of the {self.patch_size} px patches of "
                f"{self.name}: try {near}"
            )

    def plain_attention(self) -> None:
        """Attention as two matrix products instead of torch's fused kernel; same numbers.

        For training on a CPU: the backward pass of the fused kernel took 37 % of a DINO step on
        10 and 50 tokens in bf16; without it a step is 1.8 times as fast (torch 2.14, Zen 5, 2026).
        """
        for module in self.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]

    @property
    def digest(self) -> str:
        """sha256 over names, types, shapes and bytes of all tensors, in the order of the names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(flat.numpy().tobytes())
        return digest.hexdigest()

    def _features(self, x: Tensor, keys: SampleKeys | None, masks: Tensor | None) -> Tensor:
        set_factors(self._drops, keys if self.training else None, x)
        if masks is not None and self.mask_token is None:
            raise PathfmError(f"{self.name} has no mask token: call add_mask_token(seed) first")
        self._masks = masks
        try:
            return cast(Tensor, cast(Any, self.network).forward_features(x))
        finally:
            self._masks = None

    def _mask_patches(self, module: nn.Module, args: Any, patches: Tensor) -> Tensor | None:
        """Hook after the patch embedding: (N, h, w, D) or (N, T, D), masked ones replaced."""
        if self.mask_token is None:
            return None
        token, masks = self.mask_token.to(patches.dtype), self._masks
        if masks is None:
            # DDP waits for a gradient of every parameter: give it zeros
            return patches + 0 * token if self.training else None
        shape = patches.shape[:-1]
        if masks.dtype != torch.bool or masks.numel() != shape.numel() or len(masks) != shape[0]:
            raise PathfmError(
                f"masks {masks.dtype} {tuple(masks.shape)} for patches {tuple(shape)}: give bool "
                f"({shape[0]}, {shape[1:].numel()})"
            )
        return torch.where(masks.reshape(*shape, 1), token, patches)


def _meta_features(network: nn.Module, size_px: int) -> Tensor:
    """A ConvNet's last map for two inputs of this side, (2, C, h, w), on the meta device: a shape only."""
    tensors = {
        name: tensor.detach().to("meta")
        for name, tensor in chain(network.named_parameters(), network.named_buffers())
    }
    given = {f"network.{name}": tensor for name, tensor in tensors.items()}
    x = torch.empty(2, 3, size_px, size_px, device="meta")  # BatchNorm in training wants two
    return cast(Tensor, functional_call(_Features(network), given, (x,)))


class _Features(nn.Module):
    """`forward_features` as a forward, for `functional_call`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.network).forward_features(x))
