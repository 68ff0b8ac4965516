"""The model card: what the model is, how it was made and measured, and how to load it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pathfm.export import Source, last_part, without_places
from pathfm.probing.result import ProbeResult
from pathfm.probing.scoring import Scores
from pathfm.runtime import PathfmError

_EVALUATE = """## Evaluate it with kaiko-eva

```
pip install 'kaiko-eva[vision]'
cd THIS_FOLDER && DOWNLOAD_DATA=true eva predict_fit --config eva/bach.yaml
```
"""


@dataclass(frozen=True)
class ProbeTable:
    """One probe.json: its digest and its rows, this model's marked."""

    digest: str
    probe: ProbeResult
    ours: str  # backbone_digest of the row that is this model


def read_probe_table(path: Path, source: Source) -> ProbeTable:
    """A probe.json in which this backbone was measured.

    The digest compared is that at the probe's input size, to which `embed` resamples the position
    embedding. Raises PathfmError when the file is damaged or measures only others.
    """
    try:
        content = path.read_bytes()
        probe = TypeAdapter(ProbeResult).validate_json(content)
    except OSError as error:
        raise PathfmError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError:
        raise PathfmError(
            f"{path}: no probe.json of pathfm, or damaged, or of an earlier version: probe again"
        ) from None
    ours = source.backbone.digest
    if probe.input_px != source.backbone.input_px and source.backbone.is_transformer:
        ours = source.resampled(probe.input_px).digest
    if ours not in {row.backbone_digest for row in probe.backbones}:
        names = ", ".join(row.name for row in probe.backbones)
        raise PathfmError(
            f"{path} measures other backbones than this run's ({names}). Run `pathfm embed --weights "
            f"{source.folder}` and `pathfm probe` on it first"
        )
    return ProbeTable(hashlib.sha256(content).hexdigest(), probe, ours)


def model_card(name: str, licence: str, source: Source, tables: Sequence[ProbeTable]) -> str:
    """README.md: YAML front matter as model hubs read it, then Markdown."""
    head = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "pathology", "histology", "self-supervised"],
        "license": licence or "unknown",
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name}\n",
        _what(source),
        _licence(licence),
        f"## Use\n\n{_usage(source)}",
        f"## Training\n\n{_table(('fact', 'value'), training_facts(source))}",
        "All settings are in `recipe.yaml`.\n",
        f"## Probes\n\n{_probes(tables)}",
        _EVALUATE,
    ]
    return "\n".join(parts)


def _what(source: Source) -> str:
    backbone = source.backbone
    return (
        f"{_words(backbone.name)} pretrained on patches of whole-slide images with pathfm; it turns an "
        f"image into {backbone.dim} features.\n"
    )


def training_facts(source: Source) -> list[tuple[str, str]]:
    """(fact, value) of what was trained on what; only what the run recorded."""
    recipe, summary, backbone = source.recipe, source.summary, source.backbone
    method = str(recipe.get("method", "?"))
    rows: list[tuple[str, object]] = [
        ("method", method),
        ("architecture", backbone.name),
        ("initial weights", _init(summary)),
        ("optimizer steps", _steps(source)),
        ("patches in a step", recipe.get("batch_size")),
        ("patches seen", summary.get("patches_seen")),
        ("distinct patches", summary.get("distinct_patches")),
        ("slides seen", summary.get("slides_seen")),
        ("patch side, px", recipe.get("patch_px")),
        ("µm/px drawn from", _joined(recipe.get("mpp"))),
        ("data digest", summary.get("corpus_digest")),
        ("backbone digest", backbone.digest),
        ("seed", recipe.get("seed")),
        ("precision", summary.get("precision")),
        ("device", summary.get("device")),
        ("loss, first and last", _pair(summary, "loss_first", "loss_last")),
        ("RankMe, start and end", _pair(summary, "rankme_start", "rankme_end")),
    ]
    return [(fact, _number(value)) for fact, value in rows if value not in (None, "")]


def _init(summary: Mapping[str, Any]) -> str:
    """What a run says of its initial weights; a run's folder is told by its name."""
    note = str(summary.get("init") or "")
    found = re.fullmatch(r"weights from (.+), (\d+ of \d+ .*)", note)
    if found is None:
        return str(without_places(note))
    return f"weights from {last_part(found[1].removesuffix('/backbone'))}, {found[2]}"


def _steps(source: Source) -> str:
    planned = source.recipe.get("steps", "?")
    return f"{source.steps:,}" + (
        "" if source.summary else f" of {planned}: the run had not finished"
    )


def _pair(summary: Mapping[str, Any], first: str, last: str) -> str:
    if not all(isinstance(summary.get(key), (int, float)) for key in (first, last)):
        return ""
    return f"{summary[first]:.3g} → {summary[last]:.3g}"


def _joined(values: object) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) else str(values or "")


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _licence(licence: str) -> str:
    if licence:
        return f"Licence: {licence}\n"
    return (
        "Licence: **not stated by the owner yet.** Until it is, there is no permission to use this "
        "model. It also depends on the initial weights' and the slides' terms.\n"
    )


def _usage(source: Source) -> str:
    backbone = source.backbone
    fits = "sides that are multiples of " + str(backbone.patch_size) + " px"
    sizes = fits if backbone.is_transformer else f"sides of {backbone.patch_size} px or more"
    return (
        "```python\nimport timm, torch\n\n"
        'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()\n'
        "# or hf-hub:OWNER/NAME once it is there\n"
        "config = timm.data.resolve_model_data_config(model)\n"
        "transform = timm.data.create_transform(**config, is_training=False)\n"
        f"features = model(transform(image)[None])  # (1, {backbone.dim})\n```\n\n"
        f"Inputs: RGB on 0..1, normalised with mean {_three(backbone.mean)} and standard deviation "
        f"{_three(backbone.std)} (both in `config.json`); {_trained_at(source.recipe)}takes "
        f"{backbone.input_px} px, or {sizes}.\n"
    )


def _trained_at(recipe: Mapping[str, Any]) -> str:
    """The side of the views that whole patches were cut to, where the recipe tells."""
    views = recipe.get("views")
    first = views.get("global_1") if isinstance(views, Mapping) else None
    side_px = first.get("size_px") if isinstance(first, Mapping) else None
    return f"trained on global views of {side_px} px, " if side_px else ""


def _three(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _probes(tables: Sequence[ProbeTable]) -> str:
    if not tables:
        return "No probe was run on it, or none was given to `pathfm export`.\n"
    return "\n".join(_probe(table) for table in tables)


def _probe(table: ProbeTable) -> str:
    probe = table.probe
    about = (
        f"{_words(probe.data)} (digest {probe.data_digest[:12]}): {probe.n:,} pictures, "
        f"{len(probe.classes)} classes, input {probe.input_px} px, {_split(probe)}\n"
    )
    kinds = list(dict.fromkeys(kind for row in probe.backbones for kind in row.probes))
    named = {"knn": f"kNN, k = {probe.k}", "eva": "kaiko-eva's head"}
    rows = []
    for row in probe.backbones:
        ours = row.backbone_digest == table.ours
        rows.append(
            (
                f"**{row.name}** (this model)" if ours else row.name,
                *(_score(row.probes.get(kind)) for kind in kinds),
                f"{row.rankme:.1f}",
            )
        )
    header = ("features", *(named.get(kind, kind) for kind in kinds), "RankMe")
    caveats = "".join(f"- {_words(without_places(caveat))}\n" for caveat in probe.caveats)
    return f"{about}\n{_table(header, rows)}\n{caveats}"


def _split(probe: ProbeResult) -> str:
    """Which pictures are reported, and what the spread is over."""
    sizes = f"{probe.n_train:,} train / {probe.n_test:,} test, {probe.n_seeds} splits"
    if probe.own_splits:
        tested = f" / {probe.n_test:,} test" if probe.reported_on == "test" else ""
        sizes = (
            f"{probe.n_train:,} train / {probe.n_val:,} val{tested}, {probe.reported_on} reported"
        )
    runs = "runs" if probe.own_splits else "splits"
    between = any(s.interval for row in probe.backbones for s in row.probes.values())
    told = " [95 % interval]" if between else ""
    return f"{sizes}. Balanced accuracy, %, mean ± sd over {runs}{told}."


def _score(scores: Scores | None) -> str:
    if scores is None:
        return "–"
    told = f"{100 * scores.mean:.1f}"
    if len(scores.values) > 1:
        told += f" ± {100 * scores.sd:.1f}"
    if not scores.interval:
        return told
    low, high = (100 * value for value in scores.interval)
    return f"{told} [{low:.1f}, {high:.1f}]"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(_words, line))} |\n" for line in lines)


def _words(text: str) -> str:
    """Text that cannot end a table's cell or begin HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
