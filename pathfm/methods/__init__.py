"""Self-supervised methods behind one protocol, by name.

Cheap to import: a method's own module (torch, lightly) comes in when it is built. The settings of
every method are in `pathfm.methods.settings`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pathfm.runtime import PathfmError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pathfm.backbone import Backbone

METHODS = {"dino": "pathfm.methods.dino"}
"""Module of each method; the module has `build(backbone, settings, steps, seed)`."""


class Method(Protocol):
    """What the training loop asks of a method; methods are torch modules.

    One optimizer step is: `loss`, backward, `before_update`, the optimizer, `after_update`. All
    that must survive a restart is in the module's `state_dict` or a function of the step.
    """

    @property
    def exported(self) -> Backbone:
        """The backbone to keep and to measure (DINO: the teacher's)."""

    def loss(self, views: Sequence[Tensor], n_global: int, step: int) -> Tensor:
        """Scalar fp32 loss of views (B, 3, s, s), the first `n_global` of them global crops."""

    def before_update(self, step: int) -> None:
        """Change gradients between backward and the optimizer's step."""

    def after_update(self, step: int) -> None:
        """Change weights that the optimizer does not own (DINO: the teacher)."""

    def diagnostics(self) -> Mapping[str, Tensor]:
        """Scalars about the last `loss` call, to be logged beside it."""

    def trained(self) -> nn.Module:
        """The module whose parameters the optimizer owns."""

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor a restart needs, the loss's buffers among them."""

    def to(self, device: torch.device) -> Any:
        """Move to a device, in place."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any:
        """Take over what `state_dict` gave."""


def build_method(name: str, backbone: Backbone, settings: Any, steps: int, seed: int) -> Method:
    """The method called `name` around a backbone, for a run of `steps` optimizer steps.

    Weights a method adds (heads) are drawn from `seed`. Raises PathfmError for an unknown name.
    """
    if name not in METHODS:
        raise PathfmError(f"method {name!r} is unknown: choose {', '.join(sorted(METHODS))}")
    build: Callable[..., Method] = importlib.import_module(METHODS[name]).build
    return build(backbone, settings, steps=steps, seed=seed)
