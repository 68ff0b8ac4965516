"""The page of a study: study.html (self-contained), study.md beside its pictures, and study.json."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from online_patching.stores.local import atomic_write_text
from pathfm.runtime import git_commit, make_folder, without_secrets
from pathfm.study.drawing import draw_curves, draw_others, draw_verdict, scale_of, unit_of, words_of
from pathfm.study.judging import Difference, Judged, Results
from pathfm.study.plan import START, Study
from pathfm.templates import render

HTML, MARKDOWN, FIGURES = "study.html", "study.md", "study.json"
_LEADS = {
    "yes": "Yes.",
    "no": "No.",
    "cannot tell": "These runs cannot tell.",
    "not finished": "Not finished.",
}


@dataclass(frozen=True)
class Shown:
    """Everything the page shows."""

    title: str
    lead: str
    colour: str
    facts: list[tuple[str, str]]
    tables: list[tuple[str, list[str], list[list[str]]]]
    pictures: list[tuple[str, Path]]
    caveats: list[str]
    commands: list[str]
    made: str


def write_page(
    study: Study, judged: Judged, results: Results, commands: list[str], out: Path
) -> list[Path]:
    """Writes pictures, page and figures into `out`; the paths, the HTML first."""
    make_folder(out)
    drawn = [
        (
            "What each arm reached, and the differences that decide",
            draw_verdict(study, judged, out / "verdict.png"),
        ),
        ("In training", draw_curves(study, results, out / "curves.png")),
        ("What else was measured", draw_others(study, judged, out / "others.png")),
    ]
    pictures = [(title, path) for title, path in drawn if path is not None]
    made = f"{datetime.now(UTC):%d %B %Y, %H:%M UTC}, commit {git_commit()}"
    shown = Shown(
        title=study.title,
        lead=lead_of(study, judged),
        colour={"yes": "#00734f", "no": "#a84300"}.get(judged.verdict, "#55505c"),
        facts=_facts(study, judged, results),
        tables=[
            _arms_table(study, judged),
            _differences_table(study, judged),
            *_moved_table(study, judged),
            *_beside_table(judged),
            *_cost_table(study, results),
        ],
        pictures=pictures,
        caveats=caveats_of(study, judged, results),
        commands=commands,
        made=made,
    )
    atomic_write_text(out / HTML, _html(shown))
    atomic_write_text(out / MARKDOWN, markdown(shown))
    facts = {"study": study.model_dump(mode="json"), **asdict(judged), "results": dict(results)}
    text = json.dumps(_without_nan(facts), indent=1, allow_nan=False)
    atomic_write_text(out / FIGURES, without_secrets(text) + "\n")
    return [out / HTML, out / MARKDOWN, out / FIGURES, *(path for _, path in pictures)]


def lead_of(study: Study, judged: Judged) -> str:
    """The verdict in words: the answer, then every difference."""
    if judged.verdict == "not finished":
        return (
            f"Not finished: {judged.done} of {judged.cells} cells are done. {_said(study, judged)}"
        )
    above = f" The line to be above: {_margin(study)}." if study.criterion.margin else ""
    return f"{_LEADS[judged.verdict]} {_said(study, judged)}{above}"


def _said(study: Study, judged: Judged) -> str:
    parts = []
    metric = study.criterion.metric
    scale, unit = scale_of(metric), unit_of(metric)
    for each in judged.differences:
        if not each.values:
            continue
        of = " points" if unit == "%" else ""
        line = f"{each.arm} − {each.against}: {_signed(scale * each.mean)}{of}"
        if math.isfinite(each.low):
            line += f" [{_signed(scale * each.low)}, {_signed(scale * each.high)}]"
        parts.append(line)
    turned = "" if study.criterion.higher_is_better else ", turned so that better is positive"
    return f"{words_of(metric)}{turned}: {'; '.join(parts)}." if parts else ""


def _facts(study: Study, judged: Judged, results: Results) -> list[tuple[str, str]]:
    criterion = study.criterion
    wanted = "; ".join(f"{c.arm} against {c.against}" for c in criterion.contrasts)
    seen: dict[str, float] = next((r["metrics"] for n, r in results.items() if n != START), {})
    held = ", ".join(
        f"{what.replace('_', ' ')} ({seen[f'run/{what}']:,.0f})" if f"run/{what}" in seen else what
        for what in study.equal
    )
    whole = f"each above {_margin(study)} by the whole of its {100 * criterion.level:g} % interval over seeds"
    return [
        ("question", study.question),
        ("published", study.published),
        ("held equal, and checked", held),
        ("a yes would be", f"{criterion.metric}: {wanted}, {whole}"),
        ("seeds", f"{study.seeds}; {judged.done} of {judged.cells} cells done"),
        *_made_on(results),
    ]


def _made_on(results: Results) -> list[tuple[str, str]]:
    """Machine, commit and time of the cells: where several were used, all of them."""
    known = [each["provenance"] for each in results.values() if "provenance" in each]
    if not known:
        return []
    machines = sorted({each.get("gpu", each["machine"]) for each in known})
    commits = sorted({each["git_commit"] for each in known})
    hours = sum(each.get("seconds", 0.0) for each in results.values()) / 3600
    return [
        (
            "cells made on",
            f"{'; '.join(machines)}; commit {', '.join(commits)}; {hours:.1f} h one after the other",
        )
    ]


def _margin(study: Study) -> str:
    metric, margin = study.criterion.metric, study.criterion.margin
    of = " points" if unit_of(metric) == "%" else ""
    return f"{scale_of(metric) * margin:+g}{of}".replace("-", "−")


def _arms_table(study: Study, judged: Judged) -> tuple[str, list[str], list[list[str]]]:
    metrics = list(judged.values)
    heads = [
        "arm",
        "what it is",
        *(f"{words_of(m)}{', ' + unit_of(m) if unit_of(m) else ''}" for m in metrics),
    ]
    rows = [
        [arm.name, arm.tells, *(_told(judged.values[m][arm.name], scale_of(m)) for m in metrics)]
        for arm in study.arms
    ]
    if judged.start:
        begun = [
            _told([judged.start[m]] if m in judged.start else [], scale_of(m)) for m in metrics
        ]
        rows.append([START, "the weights all begin with, nothing trained", *begun])
    return "Arms: mean ± sd over seeds", heads, rows


def _differences_table(study: Study, judged: Judged) -> tuple[str, list[str], list[list[str]]]:
    scale, margin = scale_of(study.criterion.metric), study.criterion.margin
    rows = []
    for each in judged.differences:
        values = ", ".join(_signed(scale * v) for v in each.values)
        mean = _signed(scale * each.mean) if each.values else ""
        rows.append([
            f"{each.arm} − {each.against}", values, mean, _interval(each, scale), each.answers(margin),
        ])  # fmt: skip
    heads = ["difference", "by seed", "mean", f"{100 * study.criterion.level:g} % interval", "says"]
    return f"Differences in {words_of(study.criterion.metric)}, paired by seed", heads, rows


def _moved_table(study: Study, judged: Judged) -> list[tuple[str, list[str], list[list[str]]]]:
    """Each arm less the start: an arm that training did not move can hardly differ from another."""
    scale, metric = scale_of(study.criterion.metric), words_of(study.criterion.metric)
    rows = [
        [each.arm, _signed(scale * each.mean), _interval(each, scale)]
        for each in judged.moved
        if each.values
    ]
    heads = ["arm", "mean", f"{100 * study.criterion.level:g} % interval"]
    title = f"What training did to {metric}: each arm against the start, better is positive"
    return [(title, heads, rows)] if rows else []


def _beside_table(judged: Judged) -> list[tuple[str, list[str], list[list[str]]]]:
    """The contrasts in what else was measured."""
    rows = [
        [f"{each.arm} − {each.against}", f"{words_of(metric)}{', ' + unit_of(metric) if unit_of(metric) else ''}",
         _signed(scale_of(metric) * each.mean), _interval(each, scale_of(metric))]
        for metric, differences in judged.beside.items()
        for each in differences
        if each.values
    ]  # fmt: skip
    heads = ["difference", "in", "mean", "interval"]
    title = "The same differences in what else was measured: as they are, not what decides"
    return [(title, heads, rows)] if rows else []


def _interval(each: Difference, scale: float) -> str:
    if not math.isfinite(each.low):
        return ""
    return f"{_signed(scale * each.low)} to {_signed(scale * each.high)}"


def _cost_table(study: Study, results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """What the offline grids cost, where the study has some."""
    rows = []
    for name, cost in sorted(_offline_costs(results).items()):
        rows.append([
            name, f"{cost['patches']:,.0f}", f"{cost['bytes'] / 1e6:,.0f} MB", f"{cost['seconds']:,.0f} s",
            f"{cost['grid_patches']:,.0f}", f"{cost['grid_bytes'] / 1e9:,.2f} GB",
            f"{cost['read_offline_cpu_ms']:.2f}", f"{cost['read_online_cpu_ms']:.2f}",
        ])  # fmt: skip
    if not rows:
        return []
    heads = ["offline grid", "patches cut", "on disk", "cutting", "whole grid", "would be", "CPU ms a patch from it",
             "CPU ms a patch online"]  # fmt: skip
    return [("What cutting beforehand costs (online patching stores nothing)", heads, rows)]


def _offline_costs(results: Results) -> dict[str, dict[str, float]]:
    return {arm: cost for each in results.values() for arm, cost in each.get("offline", {}).items()}


def caveats_of(study: Study, judged: Judged, results: Results) -> list[str]:
    """What the study says of its data, what the probes said, and what a few seeds can tell."""
    said = [*study.caveats, *_probes_said(results)]
    few = study.seeds
    if few == 1:
        return [*said, "One seed: there is no interval, and nothing can be told apart from chance."]
    said.append(
        f"Intervals are Student's over {few} seeds of training (t with {few - 1} degrees of freedom), on one set of "
        "labelled pictures: they do not tell how other slides or other labels would differ."
    )
    return said


def _probes_said(results: Results) -> list[str]:
    """What the cells' probes said of their data, once where only numbers differ.

    Not of sd over splits: here it is over seeds.
    """
    found: dict[str, list[str]] = {}
    for result in results.values():
        for line in {line.removeprefix("cell: ") for line in result.get("caveats", [])}:
            if not line.startswith("The sd is over"):
                found.setdefault(re.sub(r"[0-9][0-9,.]*", "0", line), []).append(line)
    several = [(lines[0], len(lines) - 1) for lines in found.values()]
    return [f"{line}{f' (And {n} more cells likewise.)' if n else ''}" for line, n in several]


def _told(values: Sequence[float], scale: float) -> str:
    if not values:
        return ""
    mean = scale * sum(values) / len(values)
    if len(values) == 1:
        return _short(mean)
    sd = scale * math.sqrt(sum((v - mean / scale) ** 2 for v in values) / (len(values) - 1))
    return f"{_short(mean)} ± {_short(sd)}"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.1f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _html(shown: Shown) -> str:
    pictures = [
        (title, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
        for title, path in shown.pictures
    ]
    return render("study.html.j2", page=shown, pictures=pictures)


def markdown(shown: Shown) -> str:
    """The same page as Markdown, its pictures by their file names."""
    parts = [f"# {escaped(shown.title)}", f"**{escaped(shown.lead)}**"]
    parts.append("\n".join(f"- {name}: {escaped(text)}" for name, text in shown.facts))
    parts += [f"![{title}]({path.name})" for title, path in shown.pictures]
    for title, heads, rows in shown.tables:
        lines = [" | ".join(map(escaped, row)) for row in (heads, *rows)]
        lines.insert(1, " | ".join(["---"] * len(heads)))
        parts += [f"## {escaped(title)}", "\n".join(f"| {line} |" for line in lines)]
    parts += ["## What must be known", "\n".join(f"- {escaped(line)}" for line in shown.caveats)]
    parts += ["## Commands", "\n".join(f"    {line}" for line in shown.commands)]
    return "\n\n".join([*parts, f"Made {shown.made}."]) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no new column."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
