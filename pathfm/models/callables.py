"""Models that only Python knows how to make: a function of yours, or kaiko-eva's registry.

The function takes nothing and returns a torch module that maps normalised pictures, float
(N, 3, H, W), to features (N, d), or to tokens (N, 1 + T, d) with CLS first. `mean` and `std`
attributes say its normalisation, `num_prefix_tokens` how many tokens come before the patches (1).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathfm.models.embedder import Embedder, digest_of
from pathfm.runtime import PathfmError, one_line


def from_python(
    spec: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Embedder:
    """What the function `MODULE:FUNCTION` returns, modules of the working folder included.

    It runs your code. Its digest covers the tensors and the file the function stands in, not what
    that imports. Raises PathfmError where it cannot be found, fails, or returns something else.
    """
    module_name, _, attribute = spec.rpartition(":")
    if not module_name or not attribute:
        raise PathfmError(f"weights 'python:{spec}': wants python:MODULE:FUNCTION")
    with _working_folder():
        try:
            make = getattr(importlib.import_module(module_name), attribute)
        except Exception as error:  # whatever an import of foreign code raises
            raise PathfmError(
                f"weights 'python:{spec}': {type(error).__name__}: {one_line(error)[:200]}"
            ) from None
        network = _made(make, f"python:{spec}")
    return _wrap(network, f"python:{spec}", spec, _source_digest(make), mean, std)


def from_eva(
    name: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Embedder:
    """A model of kaiko-eva's registry of vision backbones, such as ``pathology/kaiko_vits16``.

    eva is installed by you (`pip install "kaiko-eva[vision]"`), and loads models in its own way:
    by download or from its cache. Its registry does not know their normalisation: mean and std
    must be given. Raises PathfmError.
    """
    try:
        from eva.vision.models.networks.backbones import (  # type: ignore[import-not-found,unused-ignore]
            backbone_registry,
        )
    except ImportError as error:
        raise PathfmError(
            f"weights 'eva:{name}' need kaiko-eva: pip install \"kaiko-eva[vision]\" "
            f"({one_line(error)[:120]})"
        ) from None
    known = sorted(backbone_registry.entries())
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise PathfmError(f"weights 'eva:{name}': eva has no such backbone. Try {', '.join(near)}")
    if mean is None or std is None:
        raise PathfmError(
            f"weights 'eva:{name}': eva's registry does not say what the input is normalised with. Set "
            "mean and std (eva's own configs: 0.485 0.456 0.406 and 0.229 0.224 0.225 unless told)"
        )
    network = _made(backbone_registry.get(name), f"eva:{name}")
    return _wrap(network, f"eva:{name}", name, "", mean, std)


def _made(make: Callable[[], Any], spec: str) -> nn.Module:
    """The module that a call gives; PathfmError for its failures."""
    if not callable(make):
        raise PathfmError(f"weights {spec!r}: a {type(make).__name__} cannot be called")
    try:
        found = make()
    except PathfmError:
        raise
    except Exception as error:  # whatever foreign code raises
        raise PathfmError(
            f"weights {spec!r}: {type(error).__name__}: {one_line(error)[:200]}"
        ) from None
    if not isinstance(found, nn.Module):
        raise PathfmError(f"weights {spec!r}: gave a {type(found).__name__}, wanted a torch module")
    return found


def _wrap(
    network: nn.Module,
    spec: str,
    name: str,
    source: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Embedder:
    mean = getattr(network, "mean", None) if mean is None else mean
    std = getattr(network, "std", None) if std is None else std
    if mean is None or std is None:
        raise PathfmError(
            f"weights {spec!r}: the module says no `mean` and `std` of its input. Give it these "
            "attributes, three numbers each, or set mean and std"
        )
    prefix = int(getattr(network, "num_prefix_tokens", 1))

    def tokens(x: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        found = network(x)
        if not isinstance(found, Tensor) or found.ndim not in (2, 3):
            shape = getattr(found, "shape", type(found).__name__)
            raise PathfmError(f"weights {spec!r} made {shape}; wanted a tensor (N, d) or (N, T, d)")
        return (found, None) if found.ndim == 2 else (found[:, 0], found[:, prefix:])

    facts = [spec, source, type(network).__name__, str(network)]
    return Embedder(
        network,
        tokens,
        name=name,
        weights_note=f"weights as {spec} loads them",
        digest=digest_of(network.state_dict(), facts),
        mean=mean.tolist() if isinstance(mean, torch.Tensor) else mean,
        std=std.tolist() if isinstance(std, torch.Tensor) else std,
    )


def _source_digest(make: Any) -> str:
    """sha256 of the file a function stands in; "" where there is none (typed in, compiled)."""
    try:
        file = inspect.getsourcefile(make)
        return hashlib.sha256(Path(file or "").read_bytes()).hexdigest()
    except (TypeError, OSError):
        return ""


@contextmanager
def _working_folder() -> Iterator[None]:
    """Modules of the working folder can be imported meanwhile, as under ``python -m``."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
