"""Verb `probe`: frozen features -> a linear probe and kNN, several seeds, backbones paired.

How a probe is fitted and scored is in `probing`. Every backbone sees the same splits, so their
difference is taken seed by seed. What is measured goes to `<out>/probe.json` and to MLflow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from online_patching.stores.local import atomic_write_text
from pathfm.datasets import Split, stratified_split
from pathfm.embeddings import Embeddings
from pathfm.probing.linear import (
    PROBES,
    BackboneResult,
    Paired,
    Scores,
    compare_paired,
    probe_backbone,
)
from pathfm.runtime import (
    PathfmError,
    as_dict,
    console,
    make_folder,
    progress,
    provenance,
    save_config,
)
from pathfm.tracking import Run, TrackingConfig, open_run

__all__ = [
    "PROBES",
    "RESULT",
    "BackboneResult",
    "Paired",
    "ProbeConfig",
    "ProbeResult",
    "Scores",
    "check_comparable",
    "compare_paired",
    "find_embeddings",
    "load_result",
    "probe_backbone",
    "result_key",
    "run",
    "show",
]

RESULT = "probe.json"
_FORMAT = "pathfm.probe.1"  # raised when the same options give other figures


class ProbeConfig(BaseModel, frozen=True, extra="forbid"):
    """Which features to probe, and how often."""

    embeddings: list[Path] = Field(
        min_length=1,
        description="files written by embed, or folders of them; the first is the "
        "baseline the others are compared with (in a folder: `init`, else the first by name)",
    )
    out: Path = Field(Path("probe"), description="folder for probe.json")
    n_seeds: int = Field(5, ge=1, le=1000, description="repeats, each with its own split and head")
    seed: int = Field(0, ge=0, description="key of all splits and heads")
    test_share: float = Field(0.3, gt=0, lt=1, description="share of each class tested on")
    validation_share: float = Field(
        0.2, gt=0, lt=1, description="share of the training half that chooses C"
    )
    c_values: tuple[float, ...] = Field(
        (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0),
        min_length=1,
        description="inverse L2 strengths tried (scikit-learn's C)",
    )
    k: int = Field(20, ge=1, le=10_000, description="neighbours of the kNN probe")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")


COLLAPSE_BELOW = 0.7
"""Share of the baseline's RankMe below which the features are said to collapse."""


@dataclass(frozen=True)
class ProbeResult:
    """What `probe.json` holds."""

    key: str  # digest of the features and the options: a rerun with the same key is skipped
    data: str
    data_digest: str
    input_px: int
    classes: list[str]
    n: int
    n_per_class: list[int]
    n_train: int
    n_test: int
    n_seeds: int
    seed: int
    test_share: float
    k: int
    backbones: list[BackboneResult]
    paired: list[Paired]
    caveats: list[str]

    @property
    def verdict(self) -> str:
        """One line a backbone: is it no worse than the baseline minus one sd?"""
        lines = [
            f"{p.other} no worse than {p.baseline} minus one sd ({p.probe}): "
            f"{'yes' if p.no_worse else 'NO'} "
            f"({100 * p.mean:+.1f} ± {100 * p.sd:.1f} points, paired over {self.n_seeds} seeds)"
            for p in self.paired
        ]
        return "\n".join(lines)


def run(config: ProbeConfig) -> ProbeResult:
    """Probes every file, writes `<out>/probe.json`, prints the table and the verdict.

    A rerun with the same features and options prints what is there.
    """
    parts = [Embeddings.load(path) for path in find_embeddings(config.embeddings)]
    check_comparable(parts)
    path, key = config.out / RESULT, result_key(parts, config)
    earlier = load_result(path)
    if earlier is not None and earlier.key == key:
        print(f"probe: {path} is up to date")
        show(earlier)
        return earlier
    save_config(config, make_folder(config.out), "probe.yaml")
    tracking = config.tracking.model_copy(
        update={
            "uri": config.tracking.store(config.out),
            "run_name": config.tracking.run_name or "probe",
        }
    )
    params = as_dict(config)
    with open_run(tracking, config.out, params, provenance() | {"stage": "probe"}) as tracked:
        first = parts[0]
        tracked.cohort(first.info.data, first.info.data_digest, "evaluation")
        splits = [_split(first, config, repeat) for repeat in range(config.n_seeds)]
        with progress(len(parts) * len(splits), "probes", "probe") as bar:
            backbones = [probe_backbone(part, splits, config, bar.advance) for part in parts]
        result = _result(key, config, first, splits, backbones)
        atomic_write_text(path, json.dumps(asdict(result), indent=1) + "\n")
        _record(tracked, backbones)
        tracked.artifact(path)
    show(result)
    print(f"written: {path}")
    return result


def _record(tracked: Run, backbones: Sequence[BackboneResult]) -> None:
    """Tells MLflow every score: mean and sd as a summary, the seeds as steps."""
    for backbone in backbones:
        for probe, scores in backbone.probes.items():
            at = f"{backbone.name}/{probe}"
            tracked.summary(**{f"{at}.mean": scores.mean, f"{at}.sd": scores.sd})
            for repeat, value in enumerate(scores.values):
                tracked.log(repeat, **{f"{at}.by_seed": value})
        tracked.summary(**{f"{backbone.name}/rankme": backbone.rankme})


def result_key(parts: Sequence[Embeddings], config: ProbeConfig) -> str:
    """A digest of everything the result depends on."""
    options = config.model_dump(mode="json", exclude={"embeddings", "out", "tracking"})
    facts = [_FORMAT, options, [[part.info.name, part.info.key] for part in parts]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def load_result(path: Path) -> ProbeResult | None:
    """The result in a `probe.json`, or None where there is none that can be read."""
    try:
        return TypeAdapter(ProbeResult).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def find_embeddings(given: Sequence[Path]) -> list[Path]:
    """The files meant, baseline first; `PathfmError` for a folder without any."""
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(path.glob("*.safetensors"), key=lambda p: (p.stem != "init", p.stem))
            if not inside:
                raise PathfmError(f"{path}: no *.safetensors here; make them with `pathfm embed`")
            files += inside
        else:
            files.append(path)
    return files


def check_comparable(parts: Sequence[Embeddings]) -> None:
    """`PathfmError` unless all features are of the same pictures at the same input size."""
    first = parts[0]
    names = [part.info.name for part in parts]
    if len(set(names)) < len(names):
        raise PathfmError(f"two embeddings have one name: {', '.join(names)}; embed with --name")
    for part in parts[1:]:
        for what in ("data_digest", "input_px"):
            a, b = getattr(first.info, what), getattr(part.info, what)
            if a != b:
                raise PathfmError(
                    f"{first.info.name} and {part.info.name} cannot be compared: "
                    f"{what} {str(a)[:12]} and {str(b)[:12]}. Embed both again"
                )


def _split(data: Embeddings, config: ProbeConfig, repeat: int) -> Split:
    return stratified_split(data.labels, config.test_share, config.seed, repeat, data.groups)


def _result(
    key: str,
    config: ProbeConfig,
    data: Embeddings,
    splits: Sequence[Split],
    backbones: list[BackboneResult],
) -> ProbeResult:
    caveats = [
        f"RankMe of {other.name} is {other.rankme / backbones[0].rankme:.2f} of {backbones[0].name}'s: below "
        f"{COLLAPSE_BELOW} its features have begun to collapse, whatever the probe says."
        for other in backbones[1:]
        if other.rankme < COLLAPSE_BELOW * backbones[0].rankme
    ]
    if len({backbone.precision for backbone in backbones}) > 1:
        each = ", ".join(f"{backbone.name} in {backbone.precision}" for backbone in backbones)
        caveats.append(
            f"Features are of different precision ({each}): where bf16 turned none of a backbone's "
            "features (cosine to fp32 at least 0.999) it was used."
        )
    if not data.groups:
        caveats.append(
            "No slide or patient ids (no groups.csv): neighbouring patches can fall on both sides "
            "of a split, so these scores are optimistic. Compare them with each other only."
        )
    caveats.append(
        "The sd is over splits of one data set; it does not tell how another data set would differ."
    )
    return ProbeResult(
        key=key,
        data=data.info.data,
        data_digest=data.info.data_digest,
        input_px=data.info.input_px,
        classes=list(data.classes),
        n=len(data.labels),
        n_per_class=np.bincount(data.labels, minlength=len(data.classes)).tolist(),
        n_train=len(splits[0].train),
        n_test=len(splits[0].test),
        n_seeds=config.n_seeds,
        seed=config.seed,
        test_share=config.test_share,
        k=config.k,
        backbones=backbones,
        paired=[
            compare_paired(backbones[0], other, probe)
            for other in backbones[1:]
            for probe in PROBES
        ],
        caveats=caveats,
    )


def show(result: ProbeResult) -> None:
    """Prints the table, the per-class recall, the verdict and the caveats."""
    from rich.markup import escape
    from rich.table import Table

    out = console()
    about = (
        f"{result.data}: {result.n:,} pictures, {len(result.classes)} classes, input "
        f"{result.input_px} px, {result.n_train:,} train / {result.n_test:,} test, "
        f"{result.n_seeds} splits. Balanced accuracy, %, mean ± sd over splits:"
    )
    out.print(about, markup=False, highlight=False)
    table = Table("backbone")
    mixed = len({b.precision for b in result.backbones}) > 1
    for column in ("logistic", f"kNN, k={result.k}", "RankMe"):
        table.add_column(column, justify="right", no_wrap=True)
    recall = Table("backbone", title="recall of each class, %, logistic", title_justify="left")
    for name in result.classes:
        recall.add_column(escape(name), justify="right")
    for b in result.backbones:
        scores = (b.probes[probe] for probe in PROBES)
        table.add_row(
            escape(f"{b.name} ({b.precision})" if mixed else b.name),
            *(f"{100 * s.mean:.1f} ± {100 * s.sd:.1f}" for s in scores),
            f"{b.rankme:.1f} of {b.dim}",
        )
        values = b.probes["logistic"].recall
        recall.add_row(escape(b.name), *(f"{100 * value:.0f}" for value in values))
    out.print(table)
    out.print(recall)
    if result.paired:
        out.print(result.verdict, markup=False, highlight=False)
    for caveat in result.caveats:
        out.print(f"note: {caveat}", markup=False, highlight=False)
