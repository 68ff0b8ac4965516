"""How deep a parameter lies, for learning rates that fall towards the input.

Layer-wise decay as in BEiT (Bao et al. 2021, arXiv 2106.08254, appendix) and DINOv2 (`param_groups`
of its reference code): the rate of a parameter is the base rate times decay ** (n + 1 - layer).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_AFTER = ("norm.", "fc_norm.", "attn_pool.", "head.", "head_drop.")


def layer_table(network: nn.Module) -> tuple[dict[str, int], int]:
    """(layer of each parameter name, n): 0 the embeddings, 1..n blocks or stages, n + 1 the rest.

    A transformer's embeddings are the patch projection, position embedding, CLS and registers, and
    what comes before the first block; the rest is the last norm and what pools. The stages of a
    ConvNet are timm's own (`group_matcher(coarse=True)`).
    """
    names = [name for name, _ in network.named_parameters()]
    if hasattr(network, "patch_embed"):
        n = 1 + max(int(m[1]) for name in names if (m := _BLOCK.match(name)))
        return {name: _layer_in_transformer(name, n) for name in names}, n
    return _stages(network, names)


def _layer_in_transformer(name: str, n: int) -> int:
    found = _BLOCK.match(name)
    if found:
        return int(found[1]) + 1
    return n + 1 if name.startswith(_AFTER) else 0


def _stages(network: Any, names: list[str]) -> tuple[dict[str, int], int]:
    matcher = network.group_matcher(coarse=True)
    stem, blocks = matcher["stem"], matcher["blocks"]
    patterns = [(blocks, None)] if isinstance(blocks, str) else list(blocks)
    found: dict[str, int] = {}
    for name in names:
        if re.match(stem, name):
            found[name] = -1
            continue
        for pattern, _ in patterns:
            match = re.match(pattern, name)
            if match and match.groups():
                found[name] = int(match[1])
                break
    numbers = sorted({stage for stage in found.values() if stage >= 0})
    place = {stage: number for number, stage in enumerate(numbers, 1)} | {-1: 0}
    n = len(numbers)
    return {name: place[found[name]] if name in found else n + 1 for name in names}, n
