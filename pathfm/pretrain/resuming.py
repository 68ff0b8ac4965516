"""Going on where a run was stopped: the newest valid checkpoint, the same on every rank."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from pathfm.backbone import load_backbone
from pathfm.checkpoint import Checkpoint, Computing, load_checkpoint, load_newest
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.feed import Feed, refuse_other_classes
from pathfm.pretrain.probing import check_probe
from pathfm.pretrain.trainer import Progressed, initial_weights
from pathfm.ranks import Ranks, gather_objects, together
from pathfm.runtime import PathfmError, as_dict, make_folder, one_line

FREE_TO_CHANGE = (
    # where things are, how they are read, watched and recorded: none of it changes what is computed
    *("corpus", "out", "loader", "watch", "tracking", "checkpoint_every_steps", "keep_checkpoints"),
    *("stop_after_steps", "max_sampled_rows"),
    *("labels.table", "labels.regions", "labels.patches"),  # compared by digest: they may move
    "weights",  # read at step 0 only: compared by digest, for files move, and may be gone by now
    # round differently, but a run must outlive its machines
    *("device", "parallel", "compile", "micro_batch_size"),
)


def refuse_at_once(config: PretrainConfig, ranks: Ranks) -> None:
    """Raises PathfmError, on every rank, for a probe folder that an unfinished run cannot use.

    Called before there is a run folder, and before there is a tracked run.
    """
    with together():
        if ranks.first and not _ended_in(config.out):
            check_probe(config.watch)


def find_checkpoint(config: PretrainConfig, ranks: Ranks) -> Checkpoint | None:
    """The newest valid checkpoint of this very run, None where there is none; alike on all ranks.

    Rank 0 looks, verifies and says where a run without one begins; the others load what it found.
    Raises PathfmError for a folder that holds a run with other settings or other initial weights, with
    checkpoints or without, and where ranks do not see one folder.
    """
    found: Checkpoint | None = None
    with together():
        if ranks.first:
            root = make_folder(config.out) / "checkpoints"
            found = load_newest(root)
            if found is None:
                _look_without_checkpoint(config, n_damaged=len(list(root.glob("step_*"))))
            else:
                _refuse_another_run(config, found.state["config"])
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
        saved = _summary_of(config.out).get("corpus_digest", feed.digest)
    else:
        refuse_other_classes(checkpoint.state["loader"], feed.class_names)
        saved = checkpoint.state["loader"]["corpus"]
    if saved != feed.digest:
        raise PathfmError(
            f"{config.out} holds a run on the corpus {saved[:12]}, {feed.name} is now "
            f"{feed.digest[:12]}. Give its own corpus to go on, or another --out for a new run"
        )


def finished_words(config: PretrainConfig, checkpoint: Checkpoint | None, ranks: Ranks) -> str:
    """What to say of a run that came to its end in an earlier life, "" of others; alike on all ranks."""
    words = ""
    if ranks.first and _is_finished(config, checkpoint):
        words = f"{config.out} is up to date ({config.steps:,} steps)"
        saved = checkpoint.state["config"] if checkpoint else _config_of(config.out)
        now = as_dict(config)
        if any(
            saved.get(name) != now.get(name)
            for name in saved.keys() | now.keys()
            if name.partition(".")[0] in ("watch", "tracking")
        ):
            words += " (watch and tracking settings given now have no effect on it)"
    return str(gather_objects(words)[0])


def _is_finished(config: PretrainConfig, checkpoint: Checkpoint | None) -> bool:
    """A run that ended leaves its backbone, then its summary; its checkpoints may be gone since."""
    if checkpoint is None:
        return _ended_in(config.out)
    return checkpoint.step == config.steps and (config.out / "summary.json").exists()


def _ended_in(out: Path) -> bool:
    return (out / "summary.json").exists() or (out / "backbone").is_dir()


def _look_without_checkpoint(config: PretrainConfig, n_damaged: int) -> None:
    """Refuses another run than the folder's, and says that this one is finished or starts at step 0."""
    root, ended = config.out / "checkpoints", _ended_in(config.out)
    if ended or n_damaged:
        # nothing tells the initial weights' digest any more: they must be said the same way
        _refuse_another_run(config, _config_of(config.out), free=set(FREE_TO_CHANGE) - {"weights"})
    if n_damaged:
        then = "but the run is finished" if ended else "so the run starts at step 0"
        print(
            f"pretrain: none of the {n_damaged} checkpoint(s) in {root} is whole and there is no "
            f"earlier one, {then}",
            flush=True,
        )
    elif not ended and (config.out / "config.yaml").exists():
        print(f"pretrain: no checkpoint yet in {root}: starts at step 0", flush=True)


def _config_of(out: Path) -> dict[str, Any]:
    """The settings that a run left in its folder, in the form of `as_dict`."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    try:
        walk("", yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise PathfmError(
            f"{out} holds a run, but no whole checkpoint and no config.yaml to compare with "
            f"({one_line(error)}). Give another --out for a new run"
        ) from None
    return flat


def _summary_of(out: Path) -> dict[str, Any]:
    """summary.json of a finished run; {} where there is none that can be read."""
    try:
        found = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_another_run(
    config: PretrainConfig, saved: Mapping[str, Any], free: Collection[str] = FREE_TO_CHANGE
) -> None:
    now = as_dict(config)
    unused = {"dino", "dinov2", "simclr", "supcon", "supervised"} - {config.method}
    for name in sorted(saved.keys() | now.keys(), key=lambda name: (name != "method", name)):
        if {name, name.partition(".")[0]} & {*free, *unused}:
            continue
        if saved.get(name) != now.get(name):
            raise PathfmError(
                f"{config.out} holds a run with {name} = {saved.get(name)}, asked for is "
                f"{now.get(name)}. Give the saved value to go on, or another --out for a new run"
            )


def _refuse_other_weights(config: PretrainConfig, checkpoint: Checkpoint) -> None:
    """Compared by their tensors; where they were said the same way and are gone, taken as equal."""
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
