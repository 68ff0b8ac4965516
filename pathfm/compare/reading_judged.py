"""`slide_probe.json` and `segmentation_probe.json` -> scores of slides and of masks."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, Field, FiniteFloat

from pathfm.compare.parsing import pair_of, parsed, told_by
from pathfm.compare.records import Found, Score, Source, Task

_PROTOCOLS = {"abmil": "slides, ABMIL", "mean": "slides, mean pooling"}


class _Model(BaseModel):
    name: str
    protocol: str
    values: list[FiniteFloat] = Field(min_length=1)
    mean: FiniteFloat
    sd: FiniteFloat | None = None
    interval: list[FiniteFloat] | None = Field(None, max_length=2)
    interval_of: str = ""
    backbone_digest: str = ""


class _Judged(BaseModel):
    data: str
    data_digest: str = ""
    n: int
    told: str
    metric: str
    models: list[_Model] = Field(min_length=1)
    caveats: list[str] = []


def read_judged(source: Source) -> Found:
    """Scores of every model and head in the file."""
    judged = parsed(_Judged, source)
    metric = judged.metric.replace("_", " ")
    scores = tuple(
        Score(
            model=model.name,
            task=Task(
                protocol=_PROTOCOLS.get(model.protocol, model.protocol),
                metric=metric,
                data=_data_name(judged.data),
                data_digest=judged.data_digest,
                n=judged.n,
                told=f"{judged.n:,} reported: {judged.told}",
            ),
            mean=model.mean,
            sd=model.sd if len(model.values) > 1 else None,
            n_repeats=len(model.values),
            interval=pair_of(model.interval or ()),
            interval_of=_resampled(model.interval_of),
            backbone_digest=model.backbone_digest,
            source=source.told,
        )
        for model in judged.models
    )
    return Found(scores=scores, notes=told_by(source, judged.caveats))


def _data_name(given: str) -> str:
    """A data set's name without its folder, a table's without its path."""
    name, equals, _ = given.partition("=")
    return name if equals else Path(given).name or given


def _resampled(told: str) -> str:
    """ "patients" of "mean over runs, patients resampled"."""
    found = re.search(r"(\w+) resampled", told)
    return found[1] if found else told
