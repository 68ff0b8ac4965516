"""Ablations: models against one baseline, named by what their pretraining changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pathfm.compare.records import Difference, Found
from pathfm.runtime import PathfmError

_MOST_CHANGES = 3
_WIDEST = 44  # letters of a change
_NEVER = ("seed", "run", "tracking")


@dataclass(frozen=True)
class Ablation:
    """Paired differences from one baseline on one data set: a row a model, a panel a protocol."""

    data: str
    baseline: str
    told: str
    rows: tuple[str, ...]  # model, and below it what changed
    panels: Mapping[str, tuple[Difference | None, ...]]  # protocol -> one a row
    source: str


def ablations(found: Found, params: frozenset[str], baseline: str | None) -> list[Ablation]:
    """One for each result file and baseline. `PathfmError` for a baseline that is none."""
    every = found.differences
    if baseline is not None:
        every = tuple(d for d in every if d.baseline == baseline)
        if not every:
            names = sorted({d.baseline for d in found.differences})
            raise PathfmError(
                f"baseline: nothing is compared with {baseline!r}, but with: {', '.join(names) or 'none'}. "
                "Probe it together with the others, first"
            )
    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for one in every:
        groups.setdefault((one.task.data_digest, one.baseline, one.source), []).append(one)
    facts = {(s.model, s.source): s.facts for s in found.scores}
    made = []
    for (_, name, source), group in groups.items():
        models = list(dict.fromkeys(d.other for d in group))
        protocols = list(dict.fromkeys(d.task.protocol for d in group))
        at = {(d.other, d.task.protocol): d for d in group}
        first = group[0].task
        rows = tuple(
            _row(m, facts.get((name, source), {}), facts.get((m, source), {}), params)
            for m in models
        )
        panels = {p: tuple(at.get((m, p)) for m in models) for p in protocols}
        made.append(Ablation(first.data, name, first.told, rows, panels, source))
    return made


def _row(
    model: str, before: Mapping[str, str], after: Mapping[str, str], params: frozenset[str]
) -> str:
    changed = changes(before, after, params)
    lines = [_cut(change) for change in changed[:_MOST_CHANGES]]
    if len(changed) > _MOST_CHANGES:
        lines[-1] += f", {len(changed) - _MOST_CHANGES} more"
    return "\n".join([model, *lines])


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def changes(
    before: Mapping[str, str], after: Mapping[str, str], params: frozenset[str]
) -> Sequence[str]:
    """Params that two pretrained backbones differ in; [] where one of them was not pretrained here."""
    if "run" not in before or "run" not in after:
        return []
    names = sorted(params & (before.keys() | after.keys()))
    return [
        f"{name} {before.get(name, 'none')} → {after.get(name, 'none')}"
        for name in names
        if before.get(name) != after.get(name) and not name.startswith(_NEVER)
    ]
