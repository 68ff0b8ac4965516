"""``pathfm study NAME``: a question put to a grid of runs, arms by seeds, and its answer on a page.

    plan.py       what a study's YAML says: arms, what is held equal, the criterion
    equal.py      that it is held equal: before, and as it came out
    preparing.py  what cells share: a corpus, labelled halves      offline.py   a grid cut to disk
    cell.py       one training and its figures                     claims.py    whose cell it is
    working.py    processes, ranks and MLflow's tree of runs       showing.py   the grid as a table
    metrics.py    what figures are called, and which way is better
    judging.py    paired differences and the verdict               drawing.py, tables.py, page.py  the page

In `<out>/<name>`: cells/ (a folder each, with result.json once it is done), study.html, study.md,
study.json and pictures. The same command goes on where a study was stopped or killed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field

from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig

__all__ = ["StudyConfig", "StudyResult", "run"]

_HERE = Path("configs/studies")


class StudyConfig(BaseModel, frozen=True, extra="forbid"):
    """Which study, on what, by how many."""

    name: str | None = Field(None, description="the study; unset: list those there are")
    studies: Path | None = Field(
        None,
        description="folder of NAME.yaml; unset: configs/studies, here or beside the code",
    )
    out: Path = Field(
        Path("runs/studies"),
        description="folder for the studies' folders, and for what they share (shared/)",
    )
    slides: tuple[str, ...] | None = Field(
        None, description="slides to pretrain on, as of index; unset: the study's"
    )
    mpp_overrides: Path | None = Field(
        None, description="CSV of µm/px, as of index; unset: the study's, and with --slides none"
    )
    exclude: str | None = Field(
        None,
        description="as index --cohort.exclude; unset: the study's, and with --slides none",
    )
    patches: Path | None = Field(
        None, description="labelled folder to probe, a folder a class; unset: the study's"
    )
    weights: str | None = Field(
        None,
        description="where pretraining begins: imagenet, a .safetensors file, ...; unset: the study's",
    )
    pictures: tuple[Path, ...] | None = Field(
        None, description="folders of drawn thumbnails, for studies of the mask model"
    )
    seeds: int | None = Field(
        None, ge=1, le=100, description="seeds of each arm; unset: the study's"
    )
    set: tuple[str, ...] = Field(
        (),
        description="settings of all arms, as KEY=VALUE below pretrain, foreground, probe or robustness: "
        "pretrain.steps=1000 pretrain.batch_size=256",
    )
    processes: int | None = Field(
        None, ge=1, le=256, description="processes that share the grid; unset: one a GPU, or one"
    )
    worker: str | None = Field(
        None, description="K/N: be worker K of N that share the grid, here or on other machines"
    )
    dry_run: bool = Field(False, description="run nothing: print the grid and how long it may take")
    status: bool = Field(
        False,
        description="run nothing: print the state of every cell, and make the page of what there is",
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="where runs are recorded")


@dataclass(frozen=True)
class StudyResult:
    """What a study came to so far; exit_code is 0 where the page is whole or nothing failed."""

    verdict: str
    page: Path | None
    exit_code: int = 0


def run(config: StudyConfig) -> StudyResult:
    """Lists studies, shows one, or works on it until every cell is done or somebody else's.

    Raises PathfmError for a study that is none, arms that are not held equal, missing data, and where
    cells failed.
    """
    from pathfm.study.plan import load_study

    folder = config.studies or _shipped()
    if config.name is None:
        _list(folder)
        return StudyResult("", None)
    study = load_study(folder, config.name, config.set)
    given = {
        name: getattr(config, name)
        for name in ("slides", "mpp_overrides", "exclude", "patches", "weights", "pictures")
        if getattr(config, name) is not None
    }
    if config.slides is not None:  # the study's are of its own slides
        given = {"exclude": "", "mpp_overrides": None} | given
    own = {"data": study.data.model_copy(update=given)}
    if config.seeds is not None:
        own["seeds"] = config.seeds  # type: ignore[assignment]
    study = study.model_copy(update=own)
    if config.dry_run:
        from pathfm.study.showing import show_plan

        show_plan(study)
        return StudyResult("", None)
    from pathfm.study.running import run_study

    return run_study(study, config)


def _shipped() -> Path:
    """configs/studies of the working directory, else of the checkout that this code lies in."""
    beside = Path(__file__).resolve().parents[2] / _HERE
    return _HERE if _HERE.is_dir() or not beside.is_dir() else beside


def _list(folder: Path) -> None:
    from pathfm.study.plan import load_study, names_in

    names = names_in(folder)
    if not names:
        raise PathfmError(f"no studies in {folder}: give --studies FOLDER")
    for name in names:
        study = load_study(folder, name)
        print(f"{name:<22} {study.question}")
    print("next: pathfm study NAME --dry-run")
