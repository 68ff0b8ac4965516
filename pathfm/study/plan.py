"""A study as its YAML says it: a question, arms, what is held equal, and what would count as a yes."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from pathfm.config import explain, merge, read_yaml
from pathfm.runtime import PathfmError, without_secrets

Held = Literal["patches_seen", "optimizer_steps", "views_seen"]
Reads = Literal["slides", "offline", "labelled"]
START = "start"
"""The pseudo-arm that trains nothing: the weights that the others begin with, probed alike."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,47}")
_PARTS = ("pretrain", "foreground", "probe", "robustness")
"""What `--set` may reach into."""


class _Part(BaseModel, frozen=True, extra="forbid"):
    """Strict, as all settings are."""


class Data(_Part, frozen=True):
    """What a study is made on; each has an option of the same name."""

    slides: tuple[str, ...] = Field((), description="as of `pathfm index`")
    mpp_overrides: Path | None = Field(None, description="as of `pathfm index`")
    exclude: str = Field("", description="as `pathfm index --cohort.exclude`; empty: none")
    patches: Path | None = Field(None, description="labelled folder that is probed")
    weights: str = Field("imagenet", description="where pretraining begins, unless an arm says")
    pictures: tuple[Path, ...] = Field((), description="folders of drawn thumbnails")


class Arm(_Part, frozen=True):
    """One way to train: what it sets beside what all arms have in common."""

    name: str
    tells: str = Field("", description="what it is, in a few words, for tables")
    reads: Reads = Field(
        "slides", description="slides; an offline grid on disk; or the labelled training half"
    )
    label_noise: float = Field(0.0, ge=0, lt=1, description="share of training labels made wrong")
    pretrain: dict[str, Any] = Field(default_factory=dict)
    foreground: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name) or name == START:
            raise ValueError(
                f"{name!r} should have 1 to 48 of a-z, 0-9, _, - and ., and not be 'start'"
            )
        return name


class View(_Part, frozen=True):
    """One way to look at the labelled patches: options of `pathfm embed`."""

    name: str = Field("224", pattern=r"^[\w.-]{1,32}$")
    embed: dict[str, Any] = Field(default_factory=dict)


class Offline(_Part, frozen=True):
    """Which places of the grid the offline arms have on disk."""

    per_slide_and_mpp: int | None = Field(
        None,
        ge=1,
        description="at most so many of each slide and µm/px, one choice for all seeds; unset: all",
    )


class Contrast(_Part, frozen=True):
    """Two arms (or `start`) that are compared, seed by seed."""

    arm: str
    against: str


class Criterion(_Part, frozen=True):
    """What would count as a yes and as a no, of gains: differences with the sign that better is positive."""

    metric: str = Field(description="of result.json, such as probe/224/logistic")
    margin: float = Field(
        0.0,
        allow_inf_nan=False,
        description="yes: every gain above it by the whole of its interval, in the metric's unit; negative: not "
        "worse by more",
    )
    matters: float | None = Field(
        None,
        allow_inf_nan=False,
        description="no: a gain below it by the whole of its interval, such as the smallest that would matter; "
        "unset: margin",
    )
    contrasts: tuple[Contrast, ...] = Field(min_length=1)
    level: float = Field(0.95, gt=0.5, lt=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.matters is not None and self.matters < self.margin:
            raise ValueError(f"matters {self.matters:g} lies below margin {self.margin:g}")
        return self


class Rates(_Part, frozen=True):
    """How fast cells went where it was measured; `--dry-run` reckons with it."""

    patches_per_s: float = Field(gt=0)
    pictures_per_s: float = Field(1.0, gt=0, description="embedded, for the probe")
    pictures: int = Field(0, ge=0, description="labelled patches of each view")
    robust_pictures: int = Field(0, ge=0, description="pictures embedded for robustness")
    measured: str = Field(min_length=1, description="on what")


class Study(_Part, frozen=True):
    """A grid of arms and seeds, and how it is judged."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,47}$")
    title: str
    question: str
    published: str = Field(description="what has been reported, and by whom")
    kind: Literal["pretrain", "foreground"] = "pretrain"
    seeds: int = Field(3, ge=1, le=100)
    data: Data = Data()
    pretrain: dict[str, Any] = Field(default_factory=dict, description="of all arms")
    foreground: dict[str, Any] = Field(default_factory=dict, description="of all arms")
    views: tuple[View, ...] = (View(),)
    probe: dict[str, Any] = Field(default_factory=dict)
    robustness: dict[str, Any] | None = None
    split_labelled: bool = Field(
        False, description="part the labelled patches into train and test, by group, once"
    )
    offline: Offline | None = None
    arms: tuple[Arm, ...] = Field(min_length=2, max_length=64)
    equal: tuple[Held, ...] = Field(min_length=1)
    criterion: Criterion
    also_compared: tuple[Contrast, ...] = Field(
        (), description="differences that are shown with intervals and decide nothing"
    )
    also_shown: tuple[str, ...] = ()
    curves: str | None = Field(None, description="a number of every step, or of some, to draw")
    caveats: tuple[str, ...] = ()
    rates: Rates

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.name == "shared":
            raise ValueError("name 'shared' is of the folder that studies share: take another")
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError("two arms have one name")
        known = {*names, START} if self.kind == "pretrain" else set(names)
        for contrast in (*self.criterion.contrasts, *self.also_compared):
            for name in (contrast.arm, contrast.against):
                if name not in known:
                    raise ValueError(
                        f"contrasts: {name!r} is no arm; there: {', '.join(sorted(known))}"
                    )
            if contrast.arm in (START, contrast.against):
                raise ValueError(f"contrasts: {contrast.arm!r} cannot be compared so")
        views = [view.name for view in self.views]
        if len(set(views)) < len(views):
            raise ValueError("two views have one name")
        if any(arm.reads == "offline" for arm in self.arms) and self.offline is None:
            raise ValueError("an arm reads offline, and `offline` does not say which places")
        if not self.split_labelled and any(a.reads == "labelled" for a in self.arms):
            raise ValueError(
                "an arm reads labelled patches: set split_labelled, or it would be tested on them"
            )
        if any(arm.label_noise and arm.reads != "labelled" for arm in self.arms):
            raise ValueError("label_noise is of arms that read labelled patches")
        return self

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Cell:
    """One training of a study: an arm at a seed; without an arm a start, weights that are only measured."""

    arm: Arm | None
    seed: int
    weights: str = ""
    backbone: str = ""
    start: str = START

    @property
    def name(self) -> str:
        """Unique in the study."""
        return f"{self.arm.name}-s{self.seed}" if self.arm else self.start


def cells_of(study: Study) -> list[Cell]:
    """The grid, seed by seed, so that a grid that is stopped early has whole pairs; each start before its arms."""
    found: dict[str, Cell] = {}
    for seed in range(study.seeds):
        for arm in study.arms:
            if study.kind == "pretrain":
                start = start_of(study, arm, seed)
                found.setdefault(start.name, start)
            cell = Cell(arm, seed)
            found[cell.name] = cell
    return list(found.values())


def start_of(study: Study, arm: Arm, seed: int) -> Cell:
    """The weights that an arm begins with: the study's, its own, or random ones of each seed."""
    settings = settings_of(study, arm)
    weights = str(settings.get("weights", study.data.weights))
    backbone = backbone_of(study, arm)
    if weights == "random":
        name = f"{START}-random{_unlike(arm)}-s{seed}"
        return Cell(None, seed, f"random:{seed}", backbone, name)
    if weights != study.data.weights:
        return Cell(None, 0, weights, backbone, f"{START}-{arm.name}")
    return Cell(None, 0, weights, backbone, START + _unlike(arm))


def _unlike(arm: Arm) -> str:
    """What a start's name has more where the arm has a backbone of its own."""
    return f"-{arm.name}" if "backbone" in arm.pretrain else ""


def backbone_of(study: Study, arm: Arm) -> str:
    """The timm name of what an arm trains."""
    from pathfm.pretrain import PretrainConfig

    default = PretrainConfig.model_fields["backbone"].default
    return str(settings_of(study, arm).get("backbone", default))


def settings_of(study: Study, arm: Arm) -> dict[str, Any]:
    """What an arm trains with: the common settings under its own, as nested keys."""
    part = study.kind
    merged: dict[str, Any] = copy.deepcopy(dict(getattr(study, part)))
    merge(merged, getattr(arm, part))
    return merged


def made_of(data: Data, kind: str) -> str:
    """Slides, labelled patches and weights, in a line."""
    if kind == "foreground":
        return f"drawn thumbnails of {', '.join(map(str, data.pictures)) or 'no folder'}"
    left_out = f" without {data.exclude}" if data.exclude else ""
    slides = ", ".join(map(without_secrets, data.slides))
    parts = [
        *([f"slides {slides}{left_out}"] if slides else []),
        *([f"labelled patches {data.patches}"] if data.patches else []),
        f"weights {without_secrets(data.weights)}",
    ]
    return "; ".join(parts)


def load_study(folder: Path, name: str, given: Sequence[str] = ()) -> Study:
    """The study `<folder>/<name>.yaml` with `KEY=VALUE` laid over it; `PathfmError` for what is none.

    Its `base: _name` lays it over `<folder>/_name.yaml`, what several studies have in common.
    """
    path = folder / f"{name}.yaml"
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,47}", name) or not path.is_file():
        there = names_in(folder)
        near = difflib.get_close_matches(name, there, 1)
        hint = f": did you mean {near[0]!r}?" if near else f"; there: {', '.join(there) or 'none'}"
        raise PathfmError(f"no study {name!r} in {folder}{hint}")
    values = read_yaml(path)
    if (base := values.pop("base", None)) is not None:
        if f"{base}.yaml" not in {each.name for each in folder.glob("_*.yaml")}:
            raise PathfmError(
                f"study {path}: base: no {base!r} beside it (a file whose name begins with _)"
            )
        under = read_yaml(folder / f"{base}.yaml")
        merge(under, values)
        values = under
    if values.setdefault("name", name) != name:
        raise PathfmError(f"study {path}: name: {values['name']!r} should be its file's, {name!r}")
    assigned = _assignments(given)
    for part in assigned:
        if part not in values and part != "probe":
            raise PathfmError(f"--set {part}.…: study {name} has no {part}")
    merge(values, assigned)
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise PathfmError(f"study {path}: {explain(Study, error)}") from None
    _refuse_what_arms_set(study, assigned)
    return study


def _refuse_what_arms_set(study: Study, assigned: Mapping[str, Any]) -> None:
    """PathfmError for what was set on the command line and would not change all arms."""
    for arm in study.arms:
        own = _keys(getattr(arm, study.kind))
        for key in _keys(assigned.get(study.kind, {})):
            if any(key == k or key.startswith(f"{k}.") or k.startswith(f"{key}.") for k in own):
                raise PathfmError(
                    f"--set {study.kind}.{key}: arm {arm.name} has its own, which would stay: change it in a copy of "
                    "the study's file and give --studies FOLDER"
                )


def _keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested keys, dotted."""
    found: list[str] = []
    for key, value in values.items():
        within = _keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else []
        found += within or [f"{prefix}{key}"]
    return found


def names_in(folder: Path) -> list[str]:
    """The studies of a folder, by name."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.name[0] != "_")


def _assignments(given: Sequence[str]) -> dict[str, Any]:
    """`pretrain.optim.lr=1e-4` as nested keys; values are read as YAML reads them."""
    values: dict[str, Any] = {}
    for word in given:
        key, equals, text = word.partition("=")
        first, *rest = key.split(".")
        if not equals or first not in _PARTS or not rest or not all(rest):
            raise PathfmError(
                f"--set {word!r} should be KEY=VALUE with a KEY below {', '.join(_PARTS)}, such as "
                "pretrain.steps=20"
            )
        nested: Any = _value(word, text)
        for part in reversed(rest):
            nested = {part: nested}
        merge(values, {first: nested})
    return values


def _value(word: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise PathfmError(f"--set {word!r}: its value is no YAML") from None
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)  # YAML 1.1 takes 1e-4 for a word
    return value


def validated(model: type[BaseModel], values: Mapping[str, Any], where: str) -> Any:
    """A verb's config of plain values; `PathfmError` that says which arm is wrong."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise PathfmError(f"{where}: {explain(model, error)}") from None
