"""What kaiko-eva 0.4.5 sets for each of its patch tasks, and how its heads are trained.

Read from its shipped `configs/vision/pathology/offline/classification/*.yaml` and the classes they
name, not from its documentation: weight decay is torch's default 0.01 where the documentation says
0, and lightning's default scheduler (ConstantLR) divides the learning rate by 3 for five epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

from pathfm.runtime import PathfmError

EVA_STEPS = 12_500
EVA_RUNS = 5
EVA_BATCH = 256
EVA_LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class Task:
    """One of eva's patch tasks: its dataset class, and what its own config sets for it."""

    dataset: str
    n_classes: int
    patience: int  # epochs without a better validation score
    splits: tuple[str, ...]  # what train, val and test are made of
    downloads: bool


TASKS = {
    "bach": Task("BACH", 4, 1250, ("train", "val"), True),
    "bracs": Task("BRACS", 7, 167, ("train", "val", "test"), False),
    "breakhis": Task("BreaKHis", 4, 500, ("train", "val"), True),
    "crc": Task("CRC", 9, 7, ("train", "val"), True),
    "gleason_arvaniti": Task("GleasonArvaniti", 4, 42, ("train", "val"), False),
    "mhist": Task("MHIST", 2, 278, ("train", "test"), False),
    "patch_camelyon": Task("PatchCamelyon", 2, 3, ("train", "val", "test"), True),
    "unitopatho": Task("UniToPatho", 6, 100, ("train", "val"), False),
}
"""Without "test" the second split selects and reports."""


@dataclass(frozen=True)
class HeadProtocol:
    """How linear heads are trained; the defaults are eva's."""

    learning_rates: tuple[float, ...] = (EVA_LEARNING_RATE,)
    n_runs: int = EVA_RUNS
    n_steps: int = EVA_STEPS
    batch_size: int = EVA_BATCH
    weight_decay: float = 0.01  # torch's default for AdamW; of the bias too
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warm_epochs: int = 5  # ConstantLR: so many epochs at `warm_factor` x the learning rate
    warm_factor: float = 1 / 3
    patience: int | None = (
        None  # validations without a better score; None: eva's rule, `patience_for`
    )
    min_delta: float = 0.0  # a score must be better by more than this to reset the patience
    validate_every: int = 1  # epochs
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.n_runs, self.n_steps, self.batch_size, self.validate_every)
        if min(counts) < 1 or (self.patience is not None and self.patience < 1):
            raise PathfmError(f"runs, steps, batch, patience must be at least 1: {counts}")
        rates = self.learning_rates
        if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
            raise PathfmError(f"learning rates {rates}: some, positive, each once")

    def steps_per_epoch(self, n_train: int) -> int:
        """Batches an epoch; the last may be smaller."""
        return -(-n_train // self.batch_size)

    def patience_for(self, n_train: int) -> int:
        """Validations to wait: as told, else a fifth of all steps in epochs, rounded up.

        That is the rule behind eva's table: 2,500 of 12,500 steps give each of its tasks' figures.
        """
        if self.patience is not None:
            return self.patience
        epochs = -(-self.n_steps // (5 * self.steps_per_epoch(n_train)))
        return max(1, -(-epochs // self.validate_every))


def ten_shot(n_steps: int = EVA_STEPS) -> HeadProtocol:
    """eva's `patch_camelyon_10shot`: 50 runs, each with 10 new samples a class, seen in one order.

    Validated every 10th epoch (of one batch), patience 125 validations, better by more than 0.0001.
    """
    return HeadProtocol(n_runs=50, n_steps=n_steps, patience=125, min_delta=1e-4, validate_every=10)
