"""What a probing needs to know; `pathfm.probe.ProbeConfig` says what each means and its default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from pathfm.probing.protocol import HeadProtocol

if TYPE_CHECKING:
    import torch

Also = Literal["eva", "few-shot"]


class ProbeOptions(Protocol):
    """The options of every protocol."""

    @property
    def seed(self) -> int:
        """Key of all splits, heads and draws."""

    @property
    def validation_share(self) -> float:
        """Share of the training half that chooses."""

    @property
    def c_values(self) -> Sequence[float]:
        """Inverse L2 strengths tried."""

    @property
    def k(self) -> int:
        """Neighbours of the kNN probe."""

    @property
    def also(self) -> Sequence[Also]:
        """Protocols besides the logistic probe and kNN."""

    @property
    def shots(self) -> Sequence[int]:
        """Samples a class of few-shot."""

    @property
    def resamples(self) -> int:
        """Draws of each number of shots."""

    def head_protocol(self) -> HeadProtocol:
        """How eva's heads are trained."""

    def eva_device(self) -> torch.device:
        """Where."""
