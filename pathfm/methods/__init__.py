"""Methods of pretraining behind one protocol, by name.

Cheap to import: a method's own module (torch, lightly) comes in when it is built. The settings of
every method are in `pathfm.methods.settings`, the protocol is in `pathfm.methods.protocol`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pathfm.methods.protocol import Method, MicroBatch
from pathfm.runtime import PathfmError

if TYPE_CHECKING:
    from pathfm.backbone import Backbone

__all__ = ["METHODS", "Method", "MicroBatch", "build_method"]

METHODS = {
    "dino": "pathfm.methods.dino",
    "dinov2": "pathfm.methods.dinov2",
    "simclr": "pathfm.methods.simclr",
    "supcon": "pathfm.methods.supcon",
    "supervised": "pathfm.methods.supervised",
}
"""Module of each method; the module has `build(backbone, settings, steps, seed)`."""


def build_method(name: str, backbone: Backbone, settings: Any, steps: int, seed: int) -> Method:
    """The method called `name` around a backbone, for a run of `steps` optimizer steps.

    Weights a method adds (heads) are drawn from `seed`. Raises PathfmError for an unknown name.
    """
    if name not in METHODS:
        raise PathfmError(f"method {name!r} is unknown: choose {', '.join(sorted(METHODS))}")
    build: Callable[..., Method] = importlib.import_module(METHODS[name]).build
    return build(backbone, settings, steps=steps, seed=seed)
