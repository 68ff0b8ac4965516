"""What a run does once, after its last step: export the backbone, and sum itself up."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from typing import Any

from online_patching.stores.local import atomic_write_text
from pathfm.backbone import export_backbone
from pathfm.pretrain.feed import Feed
from pathfm.pretrain.records import FAILURES, SAMPLED, Records, print_shares, sampling_facts
from pathfm.pretrain.rows_log import read_rows
from pathfm.pretrain.trainer import Trainer, whole_backbone
from pathfm.pretrain.watching import Watch
from pathfm.ranks import together


def finish(trainer: Trainer, records: Records, watch: Watch, feed: Feed) -> None:
    """The backbone exported, summary.json written (last: it says that all else is there).

    Every rank calls it; rank 0 writes.
    """
    watched = watch.end(trainer)
    backbone = whole_backbone(trainer)
    with together():
        if backbone is not None:
            folder = trainer.config.out / "backbone"
            export_backbone(backbone, folder)
            records.save_seen(folder, trainer.done.step * trainer.config.batch_size)
            _sum_up(trainer, records, watched, feed, backbone.digest)


def _sum_up(
    trainer: Trainer, records: Records, watched: Mapping[str, Any], feed: Feed, digest: str
) -> None:
    config, done = trainer.config, trainer.done
    rows = read_rows(config.out / SAMPLED)
    failed = read_rows(config.out / FAILURES)
    shares = sampling_facts(rows, feed.group_of)
    seen = done.step * config.batch_size
    numbers = {
        "steps": done.step,
        "patches_seen": seen,
        "distinct_patches": shares["distinct_patches"],
        "replaced_draws": len(failed),
        "slides_seen": len({row["slide_id"] for row in rows}),
        "patches_per_s": seen / done.train_s if done.train_s else math.nan,
        "patches_per_s_wall": seen / done.wall_s if done.wall_s else math.nan,
        "wait_share": done.wait_s / done.train_s if done.train_s else math.nan,
        "loss_first": done.loss_first,
        "loss_highest": done.loss_highest,
        "loss_highest_step": done.loss_highest_step,
        "loss_last": done.loss_last,
    }
    if math.isfinite(done.teacher_entropy):
        numbers["teacher_entropy"] = done.teacher_entropy
        numbers["log_k"] = math.log(getattr(config, config.method).out_dim)
    known = {key: value for key, value in watched.items() if value is not None}
    words = {
        "init": done.init_note,
        "device": str(trainer.device),
        "precision": trainer.precision,
        "ranks": trainer.ranks.world,
        "backbone_digest": digest,
        "corpus_digest": feed.digest,
    }
    if feed.class_names:
        words["class_names"] = list(feed.class_names)
    if feed.quarantined:
        words["quarantined"] = dict(feed.quarantined)
    if seen > len(rows):
        words["note"] = f"distinct patches and shares are of the first {len(rows):,} draws"
    path = config.out / "summary.json"
    facts = _without_nan(numbers | dict(watched) | words | shares)
    atomic_write_text(path, json.dumps(facts, indent=1, allow_nan=False) + "\n")
    if records.run is not None:
        records.run.summary(**numbers, **known)
        records.run.artifact(path)
    print_shares(shares, feed.groups, _mpps(trainer))
    records.say(*_last_words(trainer, numbers, watched))


def _without_nan(value: Any) -> Any:
    """The same structure with None for what is not finite: JSON has no word for that."""
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mpps(trainer: Trainer) -> tuple[float, ...]:
    """The magnifications asked for; a folder's pictures have what they have."""
    config = trainer.config
    return config.mpp if config.labels.patches is None else ()


def _last_words(
    trainer: Trainer, numbers: Mapping[str, float], watched: Mapping[str, Any]
) -> list[str]:
    """What a person wants to know at the end, a line each."""
    entropy = ""
    if "log_k" in numbers:
        entropy = (
            f"; teacher entropy {numbers['teacher_entropy']:.2f} of log K {numbers['log_k']:.2f}"
        )
    probe = [
        f"{name} {100 * watched[f'probe_{key}_start']:.1f} -> {100 * watched[f'probe_{key}_end']:.1f} %"
        for key, name in (("knn", "kNN"), ("logistic", "logistic"))
        if {f"probe_{key}_start", f"probe_{key}_end"} <= watched.keys()
    ]
    rankme = ""
    if "rankme_start" in watched and "rankme_end" in watched:
        rankme = f"; RankMe {watched['rankme_start']:.1f} -> {watched['rankme_end']:.1f}"
    return [
        (
            f"{numbers['patches_seen']:,} patches, {numbers['distinct_patches']:,} distinct, "
            f"{numbers['patches_per_s']:.1f} patches/s in steps, {numbers['patches_per_s_wall']:.1f} with "
            f"watching and checkpoints, {100 * numbers['wait_share']:.1f} % waiting "
            "for data"
        ),
        (
            f"loss {numbers['loss_first']:.3f} at first, {numbers['loss_highest']:.3f} at most (step "
            f"{numbers['loss_highest_step']:,}), {numbers['loss_last']:.3f} at last{entropy}{rankme}"
        ),
        *(
            [f"probe, balanced accuracy on the validation part: {', '.join(probe)}"]
            if probe
            else []
        ),
        (
            f"next: pathfm embed --backbone {trainer.method.exported.name} --weights "
            f"{shlex.quote(str(trainer.config.out))} --data LABELLED_PATCHES --name mine"
        ),
    ]
