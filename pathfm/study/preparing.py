"""What the cells of studies share: a corpus, labelled parts, a grid on disk. Made once, under a lock.

All of it lies in `<out>/shared`, in folders named by what they are made of, so that studies share it too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from online_patching.philox import words
from online_patching.stores import is_remote, local_path
from online_patching.stores.local import atomic_write_text
from pathfm import foreground, index
from pathfm.checkpoint import file_sha256
from pathfm.cohorts import CohortOptions, absent, write_csv
from pathfm.datasets import LabelledFolder, scan_folder, stratified_split
from pathfm.pretrain import PretrainConfig
from pathfm.runtime import PathfmError, make_folder
from pathfm.study.claims import digest_of, in_turn
from pathfm.study.equal import config_of
from pathfm.study.plan import Arm, Data, Study, cells_of

_NOISE_STREAM = 471
_TEST_SHARE, _VAL_SHARE = 0.3, 0.2
_DONE = "prepared.json"


@dataclass(frozen=True)
class Prepared:
    """Where the shared things are: None what the study does not use.

    facts: digests and counts of them, which figures depend on. costs: of each offline grid, as measured.
    caveats: what must be known of these data, whatever is asked of them.
    """

    corpus: Path | None
    patches: Path | None
    train: dict[float, Path]
    offline: dict[str, Path]
    facts: dict[str, Any]
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    caveats: tuple[str, ...] = ()


def missing(study: Study) -> list[str]:
    """What of a study's data is not on this machine, each with the option that names another.

    Remote slides and names of weights are not asked after; drawn pictures are told by the study itself.
    """
    data, found = study.data, []
    if study.kind == "foreground":
        return _missing_pictures(data)
    if data.patches is None:
        found.append("no labelled patches: give --patches FOLDER")
    elif not data.patches.exists():
        found.append(f"labelled patches {data.patches} are not there: give --patches FOLDER")
    if any(arm.reads != "labelled" for arm in study.arms):
        gone = absent(data.slides)
        if gone or not data.slides:
            told = f"slides {', '.join(gone)} are not there" if gone else "no slides"
            found.append(f"{told}: give --slides SLIDES")
        if data.mpp_overrides is not None and not data.mpp_overrides.exists():
            found.append(f"{data.mpp_overrides} is not there: give --mpp_overrides CSV")
    files = sorted({c.weights for c in cells_of(study) if c.weights.endswith(".safetensors")})
    gone = [name for name in files if not Path(name).exists()]
    told = "are not there: give --weights FILE, or imagenet"
    return [*found, *(f"weights {name} {told}" for name in gone)]


def _missing_pictures(data: Data) -> list[str]:
    if not data.pictures:
        return ["no drawn thumbnails: give --pictures FOLDER [FOLDER ...]"]
    try:
        _drawn(data)
    except PathfmError as error:
        return [str(error)]
    return []


def prepare(study: Study, out: Path) -> Prepared:
    """Makes, or finds made, all that the cells need. `PathfmError` where data are missing."""
    root = out / "shared"
    if study.kind == "foreground":
        return _prepared(study, root, make=False)
    with in_turn(root):
        return _prepared(study, root, make=True)


def look_up(study: Study, out: Path) -> Prepared:
    """The same as it was made; `PathfmError` where it was not."""
    return _prepared(study, out / "shared", make=False)


def _prepared(study: Study, root: Path, make: bool) -> Prepared:
    if study.kind == "foreground":
        return Prepared(None, None, {}, {}, _drawn(study.data))
    assert study.data.patches is not None
    labelled = scan_folder(study.data.patches)
    patches, train, facts = _patches(study, labelled, root, make)
    corpus: Path | None = None
    offline: dict[str, Path] = {}
    costs: dict[str, dict[str, float]] = {}
    if any(arm.reads != "labelled" for arm in study.arms):
        corpus, of_slides = _corpus(study.data, root, make)
        facts |= of_slides
    for arm in study.arms:
        if arm.reads == "offline":
            assert corpus is not None
            offline[arm.name], costs[arm.name] = _offline(study, arm, corpus, root, make)
            facts[f"offline {arm.name}"] = offline[arm.name].name
    for cell in cells_of(study):
        if cell.weights:
            facts[f"weights {cell.start}"] = _content(cell.weights)
    if sites := (study.robustness or {}).get("sites"):
        facts["sites"] = _content(str(sites))
    return Prepared(corpus, patches, train, offline, facts, costs, caveats_of(labelled))


def caveats_of(labelled: LabelledFolder) -> tuple[str, ...]:
    """What must be known of labelled pictures; that they have no groups the probe says itself."""
    if not labelled.clustered:
        return ()
    told = (
        "The labelled patches' groups are clusters of features (tools/cluster_groups.py), not slides: harder for the "
        "backbone whose features they are than for what moved away from it."
    )
    return (told,)


def _content(name: str) -> str:
    """The digest of a file, or of the backbone in a run's folder; what is neither by its name."""
    for path in (Path(name), Path(name) / "backbone" / "model.safetensors"):
        if path.is_file():
            return file_sha256(path)
    return name


def _drawn(data: Data) -> dict[str, Any]:
    """What is known of the drawn thumbnails, which cells read where they lie."""
    from pathfm.segmentation.training_data import gather

    drawn = gather(data.pictures)
    return {
        "drawn": drawn.digest,
        "training": len(drawn.training),
        "validation": len(drawn.validation),
    }


def _corpus(data: Data, root: Path, make: bool) -> tuple[Path, dict[str, Any]]:
    """The slides' corpus folder: indexed and masked, unless that is done."""
    from online_patching import Corpus

    if not data.slides:
        raise PathfmError("no slides: give --slides FOLDER, or `data.slides` in the study's file")
    slides = [uri if is_remote(uri) else os.path.abspath(local_path(uri)) for uri in data.slides]
    overrides = data.mpp_overrides and os.path.abspath(data.mpp_overrides)
    key = digest_of([slides, overrides, data.exclude])[:12]
    folder = root / f"corpus-{key}"
    if make:
        index.run(
            index.IndexConfig(
                slides=data.slides,
                out=folder,
                mpp_overrides=data.mpp_overrides,
                cohort=CohortOptions(**({"exclude": data.exclude} if data.exclude else {})),
            )
        )
        foreground.run(foreground.ForegroundConfig(corpus=folder))
    elif not folder.is_dir():
        raise _not_made(folder)
    corpus = Corpus.open(folder)
    return folder, {"corpus": corpus.digest, "slides": len(corpus)}


def _not_made(folder: Path) -> PathfmError:
    return PathfmError(f"{folder} is not made yet: the same command without --status begins")


def _patches(
    study: Study, folder: LabelledFolder, root: Path, make: bool
) -> tuple[Path, dict[float, Path], dict[str, Any]]:
    """The labelled folder that is probed, and its training part by label noise."""
    digest = folder.digest  # of every picture and its group
    facts: dict[str, Any] = {
        "labelled": len(folder),
        "groups": len(set(folder.groups)),
        "digest": digest,
    }
    if not study.split_labelled:
        return folder.root, {}, facts
    whole = root / f"labelled-{digest[:12]}"
    with _made(whole, make) as draft:
        if draft is not None:
            _part(folder, draft)
    parts = {name: len(scan_folder(whole / name)) for name in ("train", "val", "test")}
    train = {0.0: whole / "train"}
    for noise in sorted({arm.label_noise for arm in study.arms} - {0.0}):
        train[noise] = root / f"{whole.name}-noise{noise:g}"
        with _made(train[noise], make) as draft:
            if draft is not None:
                _mislabel(scan_folder(whole / "train"), noise, draft)
    return whole, train, facts | parts


@contextmanager
def _made(folder: Path, make: bool) -> Iterator[Path | None]:
    """A folder to fill that takes its name when it is whole; None where it has been made."""
    if (folder / _DONE).exists():
        yield None
        return
    if not make:
        raise _not_made(folder)
    draft = folder.with_name(f".{folder.name}.draft")
    for old in (draft, folder):
        shutil.rmtree(old, ignore_errors=True)
    yield make_folder(draft)
    atomic_write_text(draft / _DONE, "{}\n")
    os.replace(draft, folder)


def _part(folder: LabelledFolder, draft: Path) -> None:
    """train/, val/ and test/ of a labelled folder, groups whole; the same on every machine.

    Test is 30 %, val a fifth of the rest: a probe chooses on val, and nothing is trained on it.
    """
    labels, groups = folder.labels, folder.groups
    outer = stratified_split(labels, _TEST_SHARE, 0, 0, groups)
    within = [groups[row] for row in outer.train.tolist()] if groups else ()
    inner = stratified_split(labels[outer.train], _VAL_SHARE, 0, 1, within)
    parts = {
        "train": outer.train[inner.train],
        "val": outer.train[inner.test],
        "test": outer.test,
    }
    for name, rows in parts.items():
        for row in rows.tolist():
            _link(folder.root / folder.paths[row], draft / name / folder.paths[row])
        if groups:
            listed = [(folder.paths[row], groups[row]) for row in rows.tolist()]
            write_csv(draft / name / "groups.csv", ("path", "group"), listed)


def _mislabel(folder: LabelledFolder, share: float, draft: Path) -> None:
    """The same pictures, `share` of each class in the folder of another class, any as likely."""
    n_classes = len(folder.classes)
    keys = words(0, np.arange(len(folder)), 0, _NOISE_STREAM, 2)
    for label in range(n_classes):
        members = np.flatnonzero(folder.labels == label)
        order = members[np.argsort(keys[members, 0], kind="stable")]
        wrong = set(order[: round(share * len(members))].tolist())
        for row in members.tolist():
            moved = 1 + int(keys[row, 1]) % (n_classes - 1) if row in wrong else 0
            path = folder.paths[row]
            told = folder.classes[(label + moved) % n_classes]
            # the true class stays in the name: two classes may have a picture of one name
            _link(folder.root / path, draft / told / path.replace("/", "__"))


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the disk has none."""
    make_folder(target.parent)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def linked_tree(source: Path, target: Path) -> None:
    """The files of a folder under another name too, unless there is nothing, or that name is taken."""
    if not source.is_dir() or target.exists():
        return
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    make_folder(target.parent)
    shutil.rmtree(draft, ignore_errors=True)  # of a killed process with this number
    shutil.copytree(source, draft, copy_function=_link_in_tree)
    try:
        os.replace(draft, target)
    except OSError:  # another process was quicker
        shutil.rmtree(draft, ignore_errors=True)


def _link_in_tree(source: str, target: str) -> None:
    _link(Path(source), Path(target))


def _offline(
    study: Study, arm: Arm, corpus: Path, root: Path, make: bool
) -> tuple[Path, dict[str, float]]:
    """The grid of an arm on disk, and what it costs; beside it what online patching costs."""
    from pathfm.study.offline import cut_grid

    config = config_of(study, arm)
    assert isinstance(config, PretrainConfig)
    assert study.offline is not None
    most = study.offline.per_slide_and_mpp
    from online_patching import Corpus

    facts = [Corpus.open(corpus).digest, config.patch_px, list(config.mpp), config.min_foreground]
    folder = root / f"offline-{digest_of([*facts, most])[:12]}"
    with _made(folder, make) as draft:
        if draft is not None:
            cost = cut_grid(config, corpus, most, draft)
            atomic_write_text(draft / "cost.json", json.dumps(cost, indent=1) + "\n")
            print(f"offline grid: {cost['patches']:,.0f} patches in {folder}")
    cost = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
    return folder, cost
