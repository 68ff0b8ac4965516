"""Any model that makes features of patches, behind one face.

naming.py         how models are named
embedder.py       Embedder: uint8 pixels -> features, pooled from CLS or patch tokens
loading.py        a text that names a model -> Embedder: our backbones, or one of these
maps.py           patch tokens as maps, for heads that answer pixel by pixel
hugging_face.py   a folder that transformers wrote, safetensors only
callables.py      a Python function of yours, or a name of kaiko-eva's registry
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pathfm.models.naming import WEIGHTS_HELP

if TYPE_CHECKING:
    from pathfm.models.embedder import POOLINGS, Embedder
    from pathfm.models.loading import load_model

__all__ = ["POOLINGS", "WEIGHTS_HELP", "Embedder", "load_model"]


_LATE = {"POOLINGS": "embedder", "Embedder": "embedder", "load_model": "loading"}


def __getattr__(name: str) -> Any:
    """What brings torch along is imported when it is asked for: help texts are not to wait for it."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
