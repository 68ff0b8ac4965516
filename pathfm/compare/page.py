"""The page: compare.html (self-contained), compare.md beside its pictures, scores.csv for one's own plots."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from online_patching.stores.local import atomic_write_text
from pathfm.compare.records import Found, Picture
from pathfm.compare.tables import Table
from pathfm.runtime import git_commit

HTML, MARKDOWN, SCORES = "compare.html", "compare.md", "scores.csv"


@dataclass(frozen=True)
class Page:
    """Everything the page shows. where: the store or the folders, as they are named to people."""

    title: str
    where: str
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    notes: Sequence[str]


def write_page(page: Page, found: Found, out: Path) -> list[Path]:
    """Writes the three files into `out`, each whole or not at all, and returns their paths.

    Text is escaped (names come from strangers), pictures are data URIs, nothing is loaded or run.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pathfm", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = f"{datetime.now(UTC):%d %B %Y, %H:%M UTC}, commit {git_commit()}"
    pictures = [(p, _data_uri(p.path)) for p in page.pictures]
    text = environment.get_template("compare.html.j2").render(
        page=page, pictures=pictures, made=made
    )
    written = {HTML: text, MARKDOWN: markdown(page, made), SCORES: scores_csv(found)}
    for name, content in written.items():
        atomic_write_text(out / name, content)
    return [out / name for name in written]


def markdown(page: Page, made: str) -> str:
    """The page as Markdown: tables, and pictures by their file names."""
    parts = [f"# {_md(page.title)}", f"{_md(page.where)}; made {made}."]
    for table in page.tables:
        lines = ["| " + " | ".join(map(_md, table.columns)) + " |"]
        lines.append("|" + "|".join([" --- ", *[" ---: "] * (len(table.columns) - 1)]) + "|")
        lines += ["| " + " | ".join(map(_md, row)) + " |" for row in table.rows]
        parts += [f"## {_md(table.title)}", "\n".join(lines)]
        parts += [_md(note) for note in table.notes]
    if page.pictures:
        parts.append("## Pictures")
    for picture in page.pictures:
        parts += [f"### {_md(picture.title)}", f"![{_md(picture.title)}]({picture.path.name})"]
        parts.append(_md(picture.caption))
    if page.notes:
        parts += ["## Notes", "\n".join(f"- {_md(note)}" for note in page.notes)]
    return "\n\n".join(parts) + "\n"


def scores_csv(found: Found) -> str:
    """One line a score, 0..1, nothing rounded; a cell that a spreadsheet would run is quoted as text."""
    stored = io.StringIO()
    writer = csv.writer(stored, lineterminator="\n")
    heads = "model protocol metric data data_digest n told mean sd repeats low high interval_of backbone_digest source"
    writer.writerow(heads.split())
    for s in found.scores:
        low, high = s.interval or ("", "")
        task = s.task
        row = [s.model, task.protocol, task.metric, task.data, task.data_digest, task.n, task.told]
        row += [s.mean, "" if s.sd is None else s.sd, s.n_repeats, low, high, s.interval_of]
        writer.writerow([_harmless(cell) for cell in [*row, s.backbone_digest, s.source]])
    return stored.getvalue()


def _harmless(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in tuple("=+-@\t\r") else cell


def _md(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no new column."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
