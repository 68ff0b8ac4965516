"""Verb `probe`: frozen features -> scores of several protocols, with their doubts, backbones paired.

Always: logistic regression (L-BFGS, C by validation) and kNN. Also, where asked for: linear heads as
kaiko-eva trains them, and few-shot. How each is fitted and scored is in `probing`. Every backbone sees
the same splits, first heads, batches and draws, so their difference is taken repeat by repeat. What is
measured goes to `<out>/probe.json`, `<out>/eva/<backbone>/results.json` (eva's keys),
`<out>/predictions/<backbone>.safetensors`, and to MLflow.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from online_patching.stores.local import atomic_write_text
from pathfm.datasets import Split, stratified_split
from pathfm.embeddings import Embeddings
from pathfm.leakage import marks_of
from pathfm.probing.few_shot import check_shots, smallest_class
from pathfm.probing.files import write_eva_results, write_predictions
from pathfm.probing.measuring import (
    PROBES,
    BackboneResult,
    Measured,
    check_k,
    compare_measured,
    compare_paired,
    measure,
    parts_of,
    probe_backbone,
    repeats_of,
    shots_of,
    with_own_protocol,
)
from pathfm.probing.parts import Parts
from pathfm.probing.recording import Place, record_backbone
from pathfm.probing.result import ProbeResult, caveats_of, load_result
from pathfm.probing.scoring import Paired, Scores
from pathfm.probing.settings import EvaConfig, ProbeConfig
from pathfm.probing.telling import show
from pathfm.runtime import (
    PathfmError,
    as_dict,
    make_folder,
    progress,
    provenance,
    save_config,
)
from pathfm.tracking import Run, open_run

__all__ = [
    "PROBES",
    "RESULT",
    "BackboneResult",
    "EvaConfig",
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
_FORMAT = "pathfm.probe.3"  # raised when the same options give other figures


def run(config: ProbeConfig) -> ProbeResult:
    """Probes every file, writes `<out>/probe.json`, prints the table and the verdict.

    A rerun with the same features and options prints what is there.
    """
    files = find_embeddings(config.embeddings)
    parts = [Embeddings.load(path) for path in files]
    check_comparable(parts)
    config = with_own_protocol(config, parts[0])
    splits = splits_of(parts[0], config)
    config, left_out = _with_usable_shots(config, parts[0], splits)
    notes = _leaks(files, parts, config)
    path, key = config.out / RESULT, result_key(parts, config, notes)
    earlier = load_result(path)
    if earlier is not None and earlier.key == key and _whole(config, earlier):
        print(f"probe: {path} is up to date; nothing is recorded again")
        show(earlier)
        return earlier
    splits = splits_of(parts[0], config)
    too_few = check_k(parts[0], splits, config)
    save_config(config, make_folder(config.out), "probe.yaml")
    tracking = config.tracking.filled(config.out, "probe")
    params = as_dict(config)
    with open_run(tracking, config.out, params, provenance() | {"stage": "probe"}) as tracked:
        first = parts[0]
        tracked.cohort(first.info.data, first.info.data_digest, "evaluation")
        each = len(repeats_of(first, splits, config))
        with progress(len(parts) * each, "probes", "probe") as bar:
            measured = [measure(part, splits, config, bar.advance) for part in parts]
        result = _result(key, config, first, splits, measured, files)
        result = replace(result, caveats=[*result.caveats, *too_few, *left_out, *notes])
        for part, one in zip(parts, measured, strict=True):
            _write(config, part, one, result.reported_on)
        chose = result.selected_on
        tracked.tag("selected_on", f"a part of {chose}" if chose == "train" else chose)
        tracked.tag("reported_on", result.reported_on)
        _record(tracked, result.backbones)
        for file, part, one in zip(files, parts, measured, strict=True):
            place = Place(tracking, config.out, file)
            tracked.tag(f"embeddings.{part.info.name}.key", part.info.key)
            record_backbone(tracked, place, params, part, one)
        # last, for a rerun takes it as a sign that all the rest was done
        atomic_write_text(path, json.dumps(asdict(result), indent=1) + "\n")
        tracked.artifact(path)
    show(result)
    print(f"written: {path}")
    print(f"next: pathfm compare --results {shlex.quote(str(config.out))} --out page")
    return result


def _whole(config: ProbeConfig, result: ProbeResult) -> bool:
    """Whether the files that were written with a result are still there."""
    names = [backbone.name for backbone in result.backbones]
    wanted = [config.out / "predictions" / f"{name}.safetensors" for name in names]
    if "eva" in result.also:
        wanted += [config.out / "eva" / name / "results.json" for name in names]
    return all(path.is_file() for path in wanted)


def _leaks(files: Sequence[Path], parts: Sequence[Embeddings], config: ProbeConfig) -> list[str]:
    """What must be said of pictures that a backbone had seen; refuses those that are reported."""
    own = _own_parts(parts[0])
    names = [(part.info.name, path, part.info.key) for path, part in zip(files, parts, strict=True)]
    return marks_of(names, config.leaks, own.reported if own else None, parts[0].paths)


def _own_parts(data: Embeddings) -> Parts | None:
    return Parts.of_names(data.splits, data.labels, data.groups) if any(data.splits) else None


def splits_of(data: Embeddings, config: ProbeConfig) -> Parts | list[Split]:
    """The data set's own parts, or a drawn split a seed."""
    own = _own_parts(data)
    return own or [_split(data, config, repeat) for repeat in range(config.n_seeds)]


def _with_usable_shots(
    config: ProbeConfig, data: Embeddings, splits: Parts | list[Split]
) -> tuple[ProbeConfig, list[str]]:
    """The options without those default shots that a class cannot give, and a sentence of what is left out.

    `PathfmError` where few-shot could not draw what the user asked for.
    """
    if "few-shot" not in config.also:
        return config, []
    drawn_from = splits if isinstance(splits, Parts) else parts_of(data, splits[0], config, 0)
    smallest, most = smallest_class(data.labels, drawn_from)
    if "shots" in config.model_fields_set or max(config.shots) <= most:
        check_shots(data.labels, drawn_from, config.shots, data.classes)
        return config, []
    without = ", ".join(str(k) for k in config.shots if k > most)
    kept = tuple(k for k in config.shots if k <= most)
    told = (
        f"Few-shot leaves out {without} samples a class: class {data.classes[smallest]} has "
        f"{most:,} training samples."
    )
    return config.model_copy(update={"shots": kept}), [told]


def _write(config: ProbeConfig, data: Embeddings, measured: Measured, reported_on: str) -> None:
    name = data.info.name
    write_predictions(config.out / "predictions" / f"{name}.safetensors", data, measured)
    if measured.heads is not None:
        folder = make_folder(config.out / "eva" / name)
        write_eva_results(folder / "results.json", measured, reported_on)


def _record(tracked: Run, backbones: Sequence[BackboneResult]) -> None:
    """Tells MLflow every score: mean and sd as a summary, the seeds as steps."""
    for backbone in backbones:
        for probe, scores in backbone.probes.items():
            at = f"{backbone.name}/{probe}"
            tracked.summary(**{f"{at}.mean": scores.mean})
            if len(scores.values) > 1:
                tracked.summary(**{f"{at}.sd": scores.sd})
            for repeat, value in enumerate(scores.values):
                tracked.log(repeat, **{f"{at}.by_seed": value})
        tracked.summary(**{f"{backbone.name}/rankme": backbone.rankme})


def result_key(parts: Sequence[Embeddings], config: ProbeConfig, notes: Sequence[str] = ()) -> str:
    """A digest of everything the result depends on."""
    options = config.model_dump(mode="json", exclude={"embeddings", "out", "tracking"})
    facts = [_FORMAT, options, [[part.info.name, part.info.key] for part in parts], list(notes)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


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
        for what in ("labels", "splits", "groups"):
            if not np.array_equal(getattr(first, what), getattr(part, what)):
                raise PathfmError(
                    f"{first.info.name} and {part.info.name} cannot be compared: their {what} differ. "
                    "Embed both again"
                )


def _split(data: Embeddings, config: ProbeConfig, repeat: int) -> Split:
    return stratified_split(data.labels, config.test_share, config.seed, repeat, data.groups)


def _result(
    key: str,
    config: ProbeConfig,
    data: Embeddings,
    splits: Parts | Sequence[Split],
    measured: Sequence[Measured],
    files: Sequence[Path],
) -> ProbeResult:
    own = splits if isinstance(splits, Parts) else None
    repeats, shots = repeats_of(data, splits, config), shots_of(data)
    first, backbones = repeats[0], [one.result for one in measured]
    return ProbeResult(
        key=key,
        data=data.info.data,
        data_digest=data.info.data_digest,
        input_px=data.info.input_px,
        classes=list(data.classes),
        n=len(data.labels),
        n_per_class=np.bincount(data.labels, minlength=len(data.classes)).tolist(),
        n_train=len(first.train) + (0 if own else len(first.val)),  # of the first; `sizes` has all
        n_test=len(first.reported),
        n_seeds=len(repeats),
        seed=config.seed,
        test_share=config.test_share,
        k=config.k,
        backbones=backbones,
        paired=[
            compare_measured(measured[0], other, probe)
            for other in measured[1:]
            for probe in other.predictions
        ],
        caveats=caveats_of(data, backbones, own=own is not None, reported_on=first.reported_on),
        own_splits=own is not None,
        n_val=len(first.val),
        selected_on="val" if own and not own.carved else "train",
        reported_on=first.reported_on,
        also=list(config.also),
        embeddings=[str(path) for path in files],
        shots=shots,
        sizes=[
            [len(each.train) + (0 if own and not own.carved else len(each.val)), len(each.reported)]
            for each in repeats
        ],
        carved=first.carved,
    )
