"""Going on where a run was stopped: the newest valid checkpoint, the same on every rank."""

from __future__ import annotations

from pathlib import Path

import torch

from pathfm.backbone import load_backbone
from pathfm.checkpoint import Checkpoint, Computing, load_checkpoint, load_newest
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.feed import Feed, refuse_other_classes
from pathfm.pretrain.trainer import Progressed, initial_weights
from pathfm.ranks import Ranks, gather_objects, together
from pathfm.runtime import PathfmError, as_dict, make_folder

FREE_TO_CHANGE = (
    # where things are, how they are read, watched and recorded: none of it changes what is computed
    *("corpus", "out", "loader", "watch", "tracking", "checkpoint_every_steps", "keep_checkpoints"),
    *("stop_after_steps", "max_sampled_rows"),
    *("labels.table", "labels.regions", "labels.patches"),  # compared by digest: they may move
    "weights",  # read at step 0 only: compared by digest, for files move, and may be gone by now
    # round differently, but a run must outlive its machines
    *("device", "parallel", "compile", "micro_batch_size"),
)


def find_checkpoint(config: PretrainConfig, ranks: Ranks) -> Checkpoint | None:
    """The newest valid checkpoint of this very run, None where there is none; alike on all ranks.

    Rank 0 looks and verifies, the others load what it found. Raises PathfmError for a folder that
    holds a run with other settings or other initial weights, and where ranks do not see one folder.
    """
    found: Checkpoint | None = None
    with together():
        if ranks.first:
            root = make_folder(config.out) / "checkpoints"
            found = load_newest(root)
            _refuse_another_run(config, found)
            _refuse_other_weights(config, found)
    name: str | None = gather_objects(found.path.name if found else None)[0]
    with together():
        if name is not None and not ranks.first:
            found = _load_seen_by_first(config.out / "checkpoints" / name, ranks)
    return found


def restore_computing(checkpoint: Checkpoint, ranks: Ranks, device: torch.device) -> str:
    """Sets threads as they were; says, or "", why later steps cannot be the same bit for bit."""
    saved = checkpoint.state.get("computing")
    if saved is None:
        return ""
    differ = Computing(**saved).restore(ranks.world, device)
    if differ:
        return f"equal to the run so far up to rounding, not bit for bit: {'; '.join(differ)}"
    if device.type == "cuda":
        return "equal to the run so far up to rounding: a GPU adds up in no fixed order"
    return ""


def refuse_other_data(config: PretrainConfig, checkpoint: Checkpoint | None, feed: Feed) -> None:
    """Raises PathfmError when the run was begun on another corpus or folder, or with other classes."""
    if checkpoint is None:
        return
    refuse_other_classes(checkpoint.state["loader"], feed.class_names)
    saved = checkpoint.state["loader"]["corpus"]
    if saved != feed.digest:
        raise PathfmError(
            f"{config.out} holds a run on the corpus {saved[:12]}, {feed.name} is now "
            f"{feed.digest[:12]}. Give its own corpus to go on, or another --out for a new run"
        )


def _refuse_another_run(config: PretrainConfig, checkpoint: Checkpoint | None) -> None:
    if checkpoint is None:
        return
    saved, now = checkpoint.state["config"], as_dict(config)
    unused = {"dino", "dinov2", "simclr", "supcon", "supervised"} - {config.method}
    for name in sorted(saved.keys() | now.keys()):
        if {name, name.partition(".")[0]} & {*FREE_TO_CHANGE, *unused}:
            continue
        if saved.get(name) != now.get(name):
            raise PathfmError(
                f"{config.out} holds a run with {name} = {saved.get(name)}, asked for is "
                f"{now.get(name)}. Give the saved value to go on, or another --out for a new run"
            )


def _refuse_other_weights(config: PretrainConfig, checkpoint: Checkpoint | None) -> None:
    """Compared by their tensors; where they were said the same way and are gone, taken as equal."""
    if checkpoint is None:
        return
    done, weights = Progressed(**checkpoint.state["done"]), initial_weights(config)
    try:
        digest = load_backbone(config.backbone, weights, config.input_px).digest
    except PathfmError:
        if weights != done.init_weights:
            raise
        return
    if digest != done.init_digest:
        raise PathfmError(
            f"{config.out} holds a run from {done.init_weights} (digest {done.init_digest[:12]}), "
            f"asked for is {weights} (digest {digest[:12]}). Give the saved weights to go on, or "
            "another --out for a new run"
        )


def _load_seen_by_first(folder: Path, ranks: Ranks) -> Checkpoint:
    if not folder.is_dir():
        raise PathfmError(
            f"rank {ranks.rank} does not see {folder}, which rank 0 resumes from: the run's folder must "
            "be on storage that all machines share"
        )
    return load_checkpoint(folder)
