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
from pathfm.runtime import counted, git_commit, make_folder, scrubbed, told_time
from pathfm.study.drawing import draw_curves, draw_others, draw_verdict
from pathfm.study.judging import Judged, Results, idle
from pathfm.study.metrics import scale_of, words_of
from pathfm.study.plan import START, Study, made_of
from pathfm.study.tables import (
    Table,
    arms_table,
    beside_table,
    cost_table,
    differences_table,
    interval,
    moved_table,
    points,
    shares_table,
    signed,
    which,
)
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
    tables: list[Table]
    pictures: list[tuple[str, Path]]
    caveats: list[str]
    commands: list[str]
    made: str


def write_page(
    study: Study,
    judged: Judged,
    results: Results,
    commands: list[str],
    out: Path,
    of_data: Sequence[str] = (),
) -> list[Path]:
    """Writes pictures, page and figures into `out`; the paths, the HTML first. of_data: caveats of its data."""
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
    shown = Shown(
        title=study.title,
        lead=lead_of(study, judged),
        colour={"yes": "#00734f", "no": "#a84300"}.get(judged.verdict, "#55505c"),
        facts=_facts(study, judged, results),
        tables=[
            arms_table(study, judged),
            differences_table(study, judged),
            *moved_table(study, judged),
            *beside_table(study, judged),
            *shares_table(study, results),
            *cost_table(results),
        ],
        pictures=pictures,
        caveats=[*of_data, *caveats_of(study, judged, results)],
        commands=commands,
        made=f"{datetime.now(UTC):%d %B %Y, %H:%M UTC}, commit {git_commit()}",
    )
    atomic_write_text(out / HTML, _html(shown))
    atomic_write_text(out / MARKDOWN, markdown(shown))
    facts = {"study": study.model_dump(mode="json"), **asdict(judged), "results": dict(results)}
    text = json.dumps(scrubbed(_without_nan(facts)), indent=1, allow_nan=False)
    atomic_write_text(out / FIGURES, text + "\n")
    return [out / HTML, out / MARKDOWN, out / FIGURES, *(path for _, path in pictures)]


def lead_of(study: Study, judged: Judged) -> str:
    """The verdict in words: the answer, then every difference that decides."""
    said = _said(study, judged)
    if judged.verdict == "not finished":
        return f"Not finished: {judged.done} of {judged.cells} cells are done. {said}"
    more = f" To be above {_margin(study)}." if study.criterion.margin else ""
    names = sorted({idle(study, each, judged.moved) for each in judged.differences} - {""})
    if names:
        more += f" Training did not make {', '.join(names)} better than its start, so that says nothing."
    if study.seeds == 1:
        more += " One seed has no interval, so nothing can be told: give --seeds 3."
    return f"{_LEADS[judged.verdict]} {said}{more}"


def _said(study: Study, judged: Judged) -> str:
    parts = []
    metric = study.criterion.metric
    scale, of = scale_of(metric), points(metric)
    for each in judged.differences:
        if not each.values:
            continue
        line = f"{each.arm} − {each.against}: {signed(scale * each.mean)}{of}"
        if told := interval(each):
            line += f" [{told.replace(' to ', ', ')}]"
        parts.append(line)
    return f"{words_of(metric)}{which(metric)}: {'; '.join(parts)}." if parts else ""


def _margin(study: Study) -> str:
    """What a gain must be above, with the sign that better is positive."""
    metric, margin = study.criterion.metric, study.criterion.margin
    return f"{scale_of(metric) * margin:+g}{points(metric)}".replace("-", "−")


def _facts(study: Study, judged: Judged, results: Results) -> list[tuple[str, str]]:
    criterion = study.criterion
    wanted = "; ".join(f"{c.arm} over {c.against}" for c in criterion.contrasts)
    seen: dict[str, float] = next(
        (r["metrics"] for n, r in results.items() if not n.startswith(START)), {}
    )
    held = ", ".join(
        f"{what.replace('_', ' ')} ({seen[f'run/{what}']:,.0f})" if f"run/{what}" in seen else what
        for what in study.equal
    )
    each = "each " if len(criterion.contrasts) > 1 else ""
    whole = f"by the whole of its {100 * criterion.level:g} % interval over seeds"
    facts = [
        ("question", study.question),
        ("published", study.published),
        ("made of", made_of(study.data, study.kind)),
        ("held equal, and checked", held),
        (
            "a yes would be",
            f"a gain in {words_of(criterion.metric)} of {wanted}, {each}above {_margin(study)} {whole}",
        ),
    ]
    if criterion.matters is not None:
        least = f"{scale_of(criterion.metric) * criterion.matters:+g}{points(criterion.metric)}"
        it = "one of them" if each else "that gain"
        facts.append(("a no would be", f"{it} below {least} {whole}"))
    facts.append(("seeds", f"{study.seeds}; {judged.done} of {judged.cells} cells done"))
    return [*facts, *_made_on(results)]


def _made_on(results: Results) -> list[tuple[str, str]]:
    """Machine, commit and time of the cells: where several were used, all of them."""
    known = [each["provenance"] for each in results.values() if "provenance" in each]
    if not known:
        return []
    machines = sorted({each.get("gpu", each["machine"]) for each in known})
    commits = sorted({each["git_commit"] for each in known})
    seconds = sum(each.get("seconds", 0.0) for each in results.values())
    return [
        (
            "cells made on",
            f"{'; '.join(machines)}; commit {', '.join(commits)}; {told_time(seconds)} one after the other",
        )
    ]


def caveats_of(study: Study, judged: Judged, results: Results) -> list[str]:
    """What the study says of its data, what the probes said, and what a few seeds can tell."""
    said = [*study.caveats, *_probes_said(results)]
    if study.seeds == 1:
        return said
    if judged.verdict != "not finished":
        lacking = [e for e in judged.differences if len(e.values) < study.seeds]
        said += [
            f"{e.arm} − {e.against}: {len(e.values)} of {study.seeds} seeds have the figure: nothing is said."
            for e in lacking
        ]
    several = len(study.criterion.contrasts)
    if several > 1:
        said.append(
            f"A yes wants all {several} differences; each has its own interval, not corrected for their number."
        )
    said.append(
        f"Intervals are Student's over {study.seeds} seeds of training (t with "
        f"{counted(study.seeds - 1, 'degree')} of freedom), "
        "on one set of labelled pictures: they do not tell how other slides or other labels would differ."
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
    return [
        lines[0] + (f" (And {counted(len(lines) - 1, 'more cell')} likewise.)" if lines[1:] else "")
        for lines in found.values()
    ]


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
