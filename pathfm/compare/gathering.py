"""Where results come from: files kept with MLflow's runs, and files in folders.

A probed backbone is the one a pretraining run ended with when their digests are equal; then that
run's params and figures are facts of its scores, and can be axes of curves and names of ablations.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from pathfm.compare.reading_judged import read_judged
from pathfm.compare.reading_probe import read_probe
from pathfm.compare.reading_robustness import read_robustness
from pathfm.compare.records import Found, Score, Source, Task
from pathfm.runtime import PathfmError
from pathfm.tracking import RunRecord, read_artifacts

READERS: dict[str, Callable[[Source], Found]] = {
    "probe.json": read_probe,
    "robustness.json": read_robustness,
    "slide_probe.json": read_judged,
    "segmentation_probe.json": read_judged,
}
"""What is done with a file of that name."""

_SUMMARY = "summary.json"
_MOST_BYTES = 64 << 20
_MOST_FOLDERS = 10_000
_NEVER_FACTS = ("tracking.", "out", "corpus", "device", "threads", "log_", "watch.")


@dataclass(frozen=True)
class Gathered:
    """What was found, with facts of pretraining in the scores; and which of the facts are params."""

    found: Found
    params: frozenset[str]


def chosen(records: Sequence[RunRecord], patterns: Sequence[str]) -> list[RunRecord]:
    """The runs whose id or name fits a pattern, and all below them; every run without patterns.

    Raises `PathfmError` for a pattern that nothing fits.
    """
    if not patterns:
        return list(records)
    kept: set[str] = set()
    for pattern in patterns:
        fit = {
            r.run_id for r in records if pattern == r.run_id or fnmatch.fnmatchcase(r.name, pattern)
        }
        if not fit:
            names = ", ".join(sorted({r.name for r in records})[:20])
            raise PathfmError(f"no run is called {pattern!r}; there are: {names}")
        kept |= fit
    before = -1
    while len(kept) > before:  # children of children too
        before = len(kept)
        kept |= {r.run_id for r in records if r.parent_id in kept}
    return [r for r in records if r.run_id in kept]


def from_runs(uri: str, records: Sequence[RunRecord]) -> tuple[list[Source], list[str]]:
    """Result files and summaries kept with the runs, and a note for each run that could not be read."""
    sources, notes = [], []
    names = [record.name for record in records]
    for record in records:
        told = record.name
        if names.count(told) > 1:
            told += f" ({record.run_id[:8]})"
        try:
            files = read_artifacts(uri, record.run_id, [*READERS, _SUMMARY], _MOST_BYTES)
        except PathfmError as error:
            notes.append(f"{told}: {error}")
            continue
        for name, content in files.items():
            sources.append(Source(name, content, told, record.params))
    return sources, notes


def from_files(paths: Sequence[Path]) -> list[Source]:
    """Result files among the given ones and, in folders, anywhere below; links are not followed."""
    return [_source(file) for path in paths for file in _files(path)]


def gather(sources: Sequence[Source], notes: Sequence[str] = ()) -> Gathered:
    """All results of all sources. The same file found twice (in a run and in a folder) counts once."""
    seen: set[str] = set()
    parts: list[Found] = [Found(notes=tuple(notes))]
    pretrained: dict[str, dict[str, str]] = {}
    params: set[str] = set()
    for source in sources:
        digest = hashlib.sha256(source.kind.encode() + source.content).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        if source.kind == _SUMMARY:
            facts, scores = _pretraining(source)
            pretrained |= facts
            parts.append(Found(scores=scores))
            params |= _params(source).keys() if facts else set()
        else:
            parts.append(READERS[source.kind](source))
    found = together(parts)
    every = tuple(_with_facts(score, pretrained) for score in found.scores)
    return Gathered(replace(found, scores=every), frozenset(params))


def _with_facts(score: Score, pretrained: Mapping[str, Mapping[str, str]]) -> Score:
    return replace(score, facts={**pretrained.get(score.backbone_digest, {}), **score.facts})


def _pretraining(source: Source) -> tuple[dict[str, dict[str, str]], tuple[Score, ...]]:
    """Digest of the backbone -> params and figures of the run, and the scores of its probe in training.

    Both are empty for a summary of something else.
    """
    try:
        summary = json.loads(source.content)
        digest = str(summary["backbone_digest"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}, ()
    figures = {k: f"{v:g}" for k, v in summary.items() if type(v) in (int, float)}
    facts = {**figures, **_params(source), "run": source.told}
    scores = (_in_training(source, name, summary, digest, facts) for name in ("logistic", "knn"))
    return {digest: facts}, tuple(score for score in scores if score is not None)


def _in_training(
    source: Source, name: str, summary: Mapping[str, Any], digest: str, facts: dict[str, str]
) -> Score | None:
    """What the probe in training said of the run's last weights; None where there was none."""
    value = summary.get(f"probe_{name}_end")
    if type(value) is not float or not 0 <= value <= 1:
        return None

    def option(key: str) -> str:
        return source.params.get(f"watch.probe_{key}", "not known")

    folder = option("folder")
    told = (
        "last weights of each run, probed on validation pictures of its probe folder: "
        f"at most {option('max_per_class')} a class, seed {option('seed')}, input {option('px')} px, nothing selected"
    )
    protocol = {"logistic": f"logistic, C = {option('c')}", "knn": f"kNN, k = {option('k')}"}[name]
    task = Task(
        f"probe in training, {protocol}", "balanced accuracy", Path(folder).name, folder, 0, told
    )
    return Score(source.told, task, value, None, 1, None, "", digest, source.told, facts)


def _params(source: Source) -> dict[str, str]:
    """Params that make a backbone what it is: not where it lies, nor how it was watched."""
    return {k: v for k, v in source.params.items() if not k.startswith(_NEVER_FACTS)}


def _files(path: Path) -> Iterator[Path]:
    wanted = {*READERS, _SUMMARY}
    if path.is_file():
        if path.name not in wanted:
            raise PathfmError(f"{path}: not a result file; they are called {', '.join(READERS)}")
        yield path
        return
    if not path.is_dir():
        raise PathfmError(f"{path}: no such file or folder of results")
    found = [file for file in _walk(path) if file.name in wanted]
    if not found:
        raise PathfmError(f"{path}: no {', '.join([*READERS, _SUMMARY])} in it or below")
    yield from found


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder in order of their paths, of at most `_MOST_FOLDERS` folders; no links."""
    for n, (where, folders, names) in enumerate(os.walk(folder)):
        if n > _MOST_FOLDERS:
            raise PathfmError(
                f"{folder}: more than {_MOST_FOLDERS:,} folders: name the results' own"
            )
        folders.sort()
        files = (Path(where, name) for name in sorted(names))
        yield from (file for file in files if not file.is_symlink())


def _source(file: Path) -> Source:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise PathfmError(f"{file}: more than {_MOST_BYTES >> 20} MiB: no result of pathfm")
        told = file.parent.name if file.name == _SUMMARY else file.as_posix()
        return Source(file.name, file.read_bytes(), told, _options(file))
    except OSError as error:
        raise PathfmError(f"{file}: cannot be read ({error.strerror})") from None


def _options(file: Path) -> dict[str, str]:
    """The options a result was made with, out of the YAML that lies beside it; {} without one."""
    beside = file.with_name("config.yaml" if file.name == _SUMMARY else f"{file.stem}.yaml")
    try:
        if beside.stat().st_size > 1 << 20:
            return {}
        told = yaml.safe_load(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return dict(_flat(told)) if isinstance(told, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def together(parts: Sequence[Found]) -> Found:
    """All of them as one, in their order."""

    def joined(name: str) -> tuple[Any, ...]:
        return tuple(one for part in parts for one in getattr(part, name))

    return Found(**{part.name: joined(part.name) for part in fields(Found)})
