"""`probe.json` -> scores, paired differences, few-shot curves and confusion matrices."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Self

from pydantic import BaseModel, Field, FiniteFloat, model_validator

from pathfm.compare.parsing import pair_of, parsed, told_by
from pathfm.compare.records import (
    EVA,
    Confusion,
    Difference,
    Found,
    OverMpp,
    Score,
    Shots,
    Source,
    Task,
)
from pathfm.embeddings.info import RESIZED
from pathfm.probing.protocol import HeadProtocol

_EVA_PX = 224
BALANCED = "balanced accuracy"
_ON = {"val": "validation", "test": "test"}


class _Scores(BaseModel):
    values: list[FiniteFloat] = Field(min_length=1)
    mean: FiniteFloat
    sd: FiniteFloat
    confusion: list[list[int]] = []
    interval: list[FiniteFloat] | None = Field(None, max_length=2)
    interval_of: str = ""


class _FewShot(BaseModel):
    shots: list[int]
    mean: list[FiniteFloat]
    sd: list[FiniteFloat]

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if not len(self.shots) == len(self.mean) == len(self.sd):
            raise ValueError("shots, mean and sd have other lengths")
        return self


class _AtMpp(BaseModel):
    mpp: FiniteFloat = Field(gt=0)
    n: int
    probes: dict[str, _Scores]


class _Backbone(BaseModel):
    name: str
    backbone: str = ""
    backbone_digest: str = ""
    dim: int = 0
    probes: dict[str, _Scores]
    few_shot: dict[str, _FewShot] = {}
    by_mpp: list[_AtMpp] = Field([], max_length=100)
    pooling: str = ""
    transform: str = ""
    mpp: float = 0.0


class _Paired(BaseModel):
    baseline: str
    other: str
    probe: str
    mean: FiniteFloat
    interval: list[FiniteFloat] | None = Field(None, max_length=2)
    p: FiniteFloat | None = None


class _Probe(BaseModel):
    data: str
    data_digest: str
    input_px: int
    classes: list[str]
    n: int
    n_train: int
    n_test: int
    n_seeds: int
    k: int
    backbones: list[_Backbone]
    paired: list[_Paired] = []
    own_splits: bool = False
    n_val: int = 0
    reported_on: str = "test"
    caveats: list[str] = []
    embeddings: list[str] = []  # one a backbone, or none

    @model_validator(mode="after")
    def _square(self) -> Self:
        n = len(self.classes)
        for backbone in self.backbones:
            for name, found in backbone.probes.items():
                table = found.confusion
                if table and [len(row) for row in table] != [n] * n:
                    raise ValueError(f"the confusion matrix of {name} is not {n} x {n}")
        return self


def read_probe(source: Source) -> Found:
    """Scores, paired differences, few-shot curves, scores by µm/px and confusion matrices of a `probe.json`."""
    probe = parsed(_Probe, source)
    scores, shots, confusions = [], [], []
    over_mpp: list[OverMpp] = []
    for backbone in probe.backbones:
        facts = {"input_px": str(probe.input_px), "dim": str(backbone.dim)} | _input_facts(backbone)
        digest = backbone.backbone_digest
        for name, found in backbone.probes.items():
            task = _task(probe, name, source, backbone)
            scores.append(_score(task, backbone, found, facts, source))
            if found.confusion:
                counts = tuple(map(tuple, found.confusion))
                names = tuple(probe.classes)
                confusions.append(Confusion(task, backbone.name, names, counts, digest, facts))
            over_mpp += _over_mpp(task, backbone, name, facts)
        for method, curve in backbone.few_shot.items():
            task = _task(probe, f"few-shot, {method}", source, backbone)
            k, mean, sd = tuple(curve.shots), tuple(curve.mean), tuple(curve.sd)
            shots.append(Shots(task, backbone.name, k, mean, sd, digest, facts))
    models = {backbone.name: backbone for backbone in probe.backbones}
    differences = tuple(
        Difference(
            _task(probe, pair.probe, source, models.get(pair.other)),
            pair.baseline,
            pair.other,
            pair.mean,
            pair_of(pair.interval or ()),
            pair.p,
            source.told,
        )
        for pair in probe.paired
    )
    notes = told_by(source, probe.caveats)
    digests = [backbone.backbone_digest for backbone in probe.backbones]
    files = tuple(zip(probe.embeddings, digests, strict=False))
    return Found(
        scores=tuple(scores),
        differences=differences,
        shots=tuple(shots),
        over_mpp=tuple(over_mpp),
        confusions=tuple(confusions),
        notes=notes,
        embeddings=files,
    )


def _over_mpp(
    task: Task, backbone: _Backbone, name: str, facts: Mapping[str, str]
) -> Iterator[OverMpp]:
    """The probe's scores at each µm/px, where there is more than one."""
    at = sorted((each for each in backbone.by_mpp if name in each.probes), key=lambda a: a.mpp)
    if len(at) > 1:
        found = (each.probes[name] for each in at)
        yield OverMpp(
            task,
            backbone.name,
            tuple(each.mpp for each in at),
            tuple(each.n for each in at),
            tuple((scores.mean, pair_of(scores.interval or ())) for scores in found),
            backbone.backbone_digest,
            facts,
        )


def _score(
    task: Task, backbone: _Backbone, found: _Scores, facts: dict[str, str], source: Source
) -> Score:
    n = len(found.values)
    return Score(
        model=backbone.name,
        task=task,
        mean=found.mean,
        sd=found.sd if n > 1 else None,
        n_repeats=n,
        interval=pair_of(found.interval or ()),
        interval_of=found.interval_of,
        backbone_digest=backbone.backbone_digest,
        source=source.told,
        facts=facts,
    )


def _input_facts(backbone: _Backbone) -> dict[str, str]:
    """What else makes one model's features others: the pooling, and µm/px that were asked for."""
    facts = {"pooling": backbone.pooling} if backbone.pooling else {}
    if _geometry(backbone) not in ("", RESIZED) and backbone.mpp:
        facts["input_mpp"] = f"{backbone.mpp:g}"
    return facts


def _geometry(backbone: _Backbone) -> str:
    """How pictures were brought to the input; "" where that is not known."""
    try:
        return str(json.loads(backbone.transform)["geometry"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _task(probe: _Probe, name: str, source: Source, backbone: _Backbone | None) -> Task:
    """The column of one probe: anything that makes figures incomparable is in its words."""
    protocol = {"logistic": "logistic regression", "knn": f"kNN, k = {probe.k}"}.get(name, name)
    if name == "eva":
        changed = _changed(source.params, probe.input_px, backbone)
        protocol = f"{EVA} ({changed})" if changed else EVA
    if not probe.own_splits:
        each = (
            "first of our splits" if name == "eva" or "few" in name else f"{probe.n_seeds} splits"
        )
        told = (
            f"{probe.n:,} pictures; {each}, {probe.n_train:,} train / {probe.n_test:,} test; "
            "a part of train selects, test reports"
        )
    else:
        reports = _ON.get(probe.reported_on, probe.reported_on)
        sizes = [probe.n_train, probe.n_val]
        sizes += [probe.n_test] if probe.reported_on == "test" else []
        told = f"{probe.n:,} pictures; own splits, {' / '.join(f'{size:,}' for size in sizes)}; validation selects"
        told += " and reports" if probe.reported_on == "val" else f", {reports} reports"
    reported = probe.reported_on if probe.own_splits else ""
    return Task(protocol, BALANCED, probe.data, probe.data_digest, probe.n, told, reported)


def _changed(params: Mapping[str, str], input_px: int, backbone: _Backbone | None) -> str:
    """What a run set otherwise than eva does, in words; "" where it did exactly as eva."""
    default, told = HeadProtocol(), []
    if input_px != _EVA_PX:
        told.append(f"input {input_px} px")
    if backbone is None or backbone.pooling != "cls":
        told.append(f"pooling {(backbone and backbone.pooling) or 'not known'}")
    if backbone is None or _geometry(backbone) != RESIZED:
        mpp = _input_facts(backbone).get("input_mpp") if backbone else None
        told.append(f"input at {mpp} µm/px" if mpp else "input not known")
    if not any(key.startswith("eva.") for key in params):
        return ", ".join([*told, "settings not known"])
    for part in fields(default):
        given = params.get(f"eva.{part.name}")
        if part.name != "seed" and given not in (None, "None"):
            usual = str(getattr(default, part.name))
            if _numbers(given) != _numbers(usual):
                told.append(f"{part.name} {given}")
    return ", ".join(told)


def _numbers(text: str) -> list[float] | str:
    """The numbers in a param's text, so that (0.0003,) and [0.0003] are one; text without any as it is."""
    return [float(found) for found in re.findall(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?", text)] or text
