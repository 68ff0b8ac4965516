"""Verb `export`: a run -> a folder that others can use without us, ready for a model hub.

    OUT/model.safetensors   the backbone, as timm names its tensors
        config.json         its architecture, mean, standard deviation and input size
        README.md           model card: data digest, recipe, training facts, probes (card.py)
        recipe.yaml         the run's settings, without places on anybody's machine
        eva/TASK.yaml       what `eva predict_fit --config` takes to evaluate it (eva.py)
        export.json         digests, and what this folder was made of
        pretrained_on.json  what the backbone has seen, as digests and salted ids (docs/uncertainty.md)

`timm.create_model("local-dir:OUT", pretrained=True)` loads it. Slide names, paths and the tracking
server stay behind: they may name patients and places.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, Field

from pathfm.leakage import PRETRAINED_ON, PretrainedOn
from pathfm.runtime import PathfmError, make_folder, one_line, provenance

if TYPE_CHECKING:  # torch is imported when there is work, not for --help
    from pathfm.backbone import Backbone

__all__ = ["ExportConfig", "ExportResult", "run"]

_LEFT_BEHIND = {"corpus", "out", "tracking", "loader", "device", "watch", "stop_after_steps"}
_MAX_JSON_BYTES = 64 << 20
_PLACE = re.compile(r"(/|~|\.{0,2}/|\w+:/)")  # how a value that is a path or URI begins
_WORD = re.compile(r"\S*/[^\s,]*")  # a path or URI among words


class ExportConfig(BaseModel, frozen=True, extra="forbid"):
    """Which run to export, and what its card says."""

    run: Path = Field(description="folder of a pretrain run")
    out: Path = Field(description="folder to write; it must not hold anything else yet")
    name: str = Field(
        "",
        pattern=r"^[\w.-]{0,96}$",
        description="what the card calls the model; unset: the run folder's name",
    )
    licence: str = Field(
        "",
        pattern=r"^[\w.+-]{0,64}$",
        description="identifier of the licence you release it under, such as apache-2.0; unset: the "
        "card says that the owner has not stated one",
    )
    probes: list[Path] = Field(
        [],
        description="probe.json files that measured this backbone; their tables go into the card",
    )
    unfinished: bool = Field(
        False, description="take the newest checkpoint of a run that has not come to its end"
    )


@dataclass(frozen=True)
class ExportResult:
    """Where the folder is, and whether it was there already."""

    folder: Path
    skipped: bool


@dataclass(frozen=True)
class Source:
    """What a run left: its backbone, settings and summary (empty where it has not finished)."""

    backbone: Backbone
    folder: Path
    recipe: dict[str, Any]
    summary: dict[str, Any]
    steps: int
    weights: Path  # the folder in timm's local-dir form

    def resampled(self, input_px: int) -> Backbone:
        """The backbone as `embed` loads it for inputs of another side."""
        from pathfm.backbone import load_backbone

        return load_backbone("", str(self.weights), input_px)


def run(config: ExportConfig) -> ExportResult:
    """Writes the folder whole or not at all, unless it is there already, made of the same.

    Raises PathfmError for a run that is none, has not finished or is damaged, for probes of another
    backbone, and when `out` holds anything else.
    """
    from pathfm.export.card import ProbeTable, model_card, read_probe_table
    from pathfm.export.eva import eva_configs

    source = read_run(config)
    name = config.name or config.run.resolve().name
    tables: list[ProbeTable] = [read_probe_table(path, source) for path in config.probes]
    facts = {
        "name": name,
        "licence": config.licence or None,
        "backbone": source.backbone.name,
        "backbone_digest": source.backbone.digest,
        "data_digest": source.summary.get("corpus_digest"),
        "steps": source.steps,
        "finished": bool(source.summary),
        "input_px": source.backbone.input_px,
        "probes": [table.digest for table in tables],
        "pathfm": provenance()["version.pathfm"],
    }
    seen = _pretrained_on(source.weights)
    if seen:
        facts["pretrained_on"] = hashlib.sha256(seen.encode()).hexdigest()
    key = hashlib.sha256(json.dumps([facts, source.recipe], sort_keys=True).encode()).hexdigest()
    if _holds(config.out, key):
        print(f"export: {config.out} is up to date")
        return ExportResult(config.out, skipped=True)
    texts = {
        "README.md": model_card(name, config.licence, source, tables),
        "recipe.yaml": yaml.safe_dump(source.recipe, sort_keys=False, allow_unicode=True),
        "export.json": json.dumps(facts | {"key": key}, indent=1) + "\n",
        **({PRETRAINED_ON: seen} if seen else {}),
        **{f"eva/{task}.yaml": text for task, text in eva_configs(name, source.backbone).items()},
    }
    _write(config.out, source.backbone, texts)
    print(f"export: {source.backbone.name}, {source.backbone.dim} features -> {config.out}")
    print(f'use it: timm.create_model("local-dir:{config.out}", pretrained=True)')
    if not config.licence:
        print("note: the card states no licence; give --licence before you publish it")
    return ExportResult(config.out, skipped=False)


def read_run(config: ExportConfig) -> Source:
    """The run's backbone, verified against what the run says of it; see `run` for what is raised."""
    from pathfm.backbone import load_backbone
    from pathfm.checkpoint import load_newest

    folder = config.run
    if not (folder / "config.yaml").is_file():
        raise PathfmError(f"{folder} is no run of pretrain: it has no config.yaml")
    recipe = _recipe(folder / "config.yaml")
    summary = _json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    if summary and (folder / "backbone").is_dir():
        backbone = load_backbone("", str(folder / "backbone"))
        if backbone.digest != summary.get("backbone_digest"):
            raise PathfmError(
                f"{folder}/backbone is not what the run ended with: its tensors have the digest "
                f"{backbone.digest[:12]}, summary.json says {str(summary.get('backbone_digest'))[:12]}. "
                "Run pretrain again with the same command: it writes both anew"
            )
        return Source(
            backbone, folder, recipe, summary, _steps_of(summary, folder), folder / "backbone"
        )
    checkpoint = load_newest(folder / "checkpoints")
    steps = checkpoint.step if checkpoint else 0
    if checkpoint is None or not config.unfinished:
        remedy = "give --unfinished true" if checkpoint else "there is no checkpoint to take"
        raise PathfmError(
            f"{folder} has not finished: {steps:,} of {recipe.get('steps', '?')} steps are saved. Run the "
            f"same pretrain command again to go on; to export what there is, {remedy}"
        )
    backbone = load_backbone("", str(checkpoint.path))
    return Source(backbone, folder, recipe, {}, steps, checkpoint.path / "backbone")


def _pretrained_on(weights: Path) -> str:
    """The list of what the backbone has seen, checked; "" where a run has none. PathfmError if damaged."""
    if PretrainedOn.load(weights) is None:
        return ""
    return (weights / PRETRAINED_ON).read_text(encoding="utf-8")


def _steps_of(summary: dict[str, Any], folder: Path) -> int:
    steps = summary.get("steps")
    if not isinstance(steps, int):
        raise PathfmError(f"{folder}/summary.json: damaged (it tells no steps)")
    return steps


def _recipe(path: Path) -> dict[str, Any]:
    """A run's settings without places: those keys left out, other paths cut to their last part."""
    from pathfm.methods import METHODS

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PathfmError(f"{path}: damaged ({one_line(error)})") from None
    if not isinstance(settings, dict):
        raise PathfmError(f"{path}: damaged (no settings in it)")
    others = METHODS.keys() - {settings.get("method")}  # their settings did nothing
    found = {k: v for k, v in settings.items() if k not in _LEFT_BEHIND | others}
    without: dict[str, Any] = without_places(found)
    return without


def without_places(value: Any) -> Any:
    """A value of a config with every path and URI in it cut to its last part."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return last_part(value) if _PLACE.match(value) else _WORD.sub(lambda m: last_part(m[0]), value)


def last_part(place: str) -> str:
    """The name at the end of a path or URI."""
    return place.rstrip("/").rpartition("/")[2]


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of a run or probe; PathfmError where it is none."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"more than {_MAX_JSON_BYTES >> 20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except OSError as error:
        raise PathfmError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise PathfmError(f"{path}: damaged ({error})") from None
    return found


def _holds(out: Path, key: str) -> bool:
    """Whether the folder is this export already; PathfmError when it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if (out / "export.json").is_file() and _json(out / "export.json").get("key") == key:
        return True
    raise PathfmError(
        f"{out} exists and is not this export. Give another --out, or remove it first"
    )


def _write(out: Path, backbone: Backbone, texts: dict[str, str]) -> None:
    """All files in a folder beside `out`, read back, synced and renamed."""
    from pathfm.backbone import export_backbone, load_backbone

    out = out.absolute()
    parent = make_folder(out.parent)
    work = parent / f".unfinished-{out.name}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        export_backbone(backbone, work)
        for name, text in texts.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text(text, encoding="utf-8")
        written = load_backbone("", str(work)).digest
        if written != backbone.digest:
            raise PathfmError(f"{out}: reading it back gave other tensors. Try again")
        for path in [*work.rglob("*"), work]:
            _sync(path)
        work.rename(out)  # over an empty folder too
        _sync(parent)
    except OSError as error:
        raise PathfmError(
            f"{out} cannot be written ({error.strerror or error}). Free space or give another --out"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
