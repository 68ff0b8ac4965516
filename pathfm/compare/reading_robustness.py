"""`robustness.json` -> mCE and what it is made of."""

from __future__ import annotations

from pydantic import BaseModel, Field, FiniteFloat

from pathfm.compare.parsing import parsed, told_by
from pathfm.compare.records import CorruptedModel, Found, Robustness, Source
from pathfm.runtime import PathfmError


class _Figure(BaseModel):
    value: FiniteFloat
    low: FiniteFloat | None = None  # too few groups for an interval
    high: FiniteFloat | None = None


class _Corruption(BaseModel):
    name: str
    errors: list[FiniteFloat] = Field(min_length=1)
    ce: FiniteFloat | None


class _Corrupted(BaseModel):
    name: str
    clean_error: _Figure
    mean_corrupted_error: _Figure
    mce: _Figure | None
    relative_mce: _Figure | None
    corruptions: list[_Corruption] = Field(min_length=1)


class _Robustness(BaseModel):
    data: str
    data_digest: str
    n: int
    n_groups: int
    n_tested: int
    n_splits: int
    input_px: int
    severities: list[int]
    reference: str
    selected_on: str = ""  # an earlier version did not say who chose
    reported_on: str = ""
    models: list[_Corrupted] = Field(min_length=1)
    caveats: list[str] = []


def read_robustness(source: Source) -> Found:
    """mCE and its parts of a `robustness.json`."""
    found = parsed(_Robustness, source)
    names = tuple(each.name for each in found.models[0].corruptions)
    if any(tuple(c.name for c in model.corruptions) != names for model in found.models):
        raise PathfmError(f"{source.told}: {source.kind} has models with other corruptions each")
    severities = ", ".join(map(str, found.severities))
    told = (
        f"{found.n:,} pictures, {found.n_tested:,} of {found.n_groups:,} groups tested in "
        f"{found.n_splits} splits; fitted on clean pictures; {_selects(found)}severities "
        f"{severities}; input {found.input_px} px"
    )
    models = tuple(_corrupted(model) for model in found.models)
    one = Robustness(
        found.data, found.data_digest, told, found.reference, names, models, source.told
    )
    return Found(robustness=(one,), notes=told_by(source, found.caveats))


def _selects(found: _Robustness) -> str:
    """Who selected and who reports; "" where an earlier version did not say."""
    if not found.selected_on:
        return ""
    if found.selected_on == found.reported_on:
        return "validation selects and reports; "
    who = "validation" if found.selected_on == "val" else "a part of train"
    return f"{who} selects, {found.reported_on} reports; "


def _corrupted(model: _Corrupted) -> CorruptedModel:
    return CorruptedModel(
        name=model.name,
        clean_error=model.clean_error.value,
        mean_corrupted_error=model.mean_corrupted_error.value,
        mce=_interval(model.mce),
        relative_mce=_interval(model.relative_mce),
        ce=tuple(each.ce for each in model.corruptions),
        errors=tuple(sum(each.errors) / len(each.errors) for each in model.corruptions),
    )


def _interval(figure: _Figure | None) -> tuple[float, float, float] | None:
    """Value, low and high; both ends are the value where there is no interval. None: no figure."""
    if figure is None:
        return None
    low, high = figure.low, figure.high
    if low is None or high is None:
        low = high = figure.value
    return figure.value, low, high
