"""The page: compare.html (self-contained), compare.md beside its pictures, scores.csv for one's own plots."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from online_patching.stores.local import atomic_write_bytes, atomic_write_text
from pathfm.compare.drawing import SOFTWARE
from pathfm.compare.records import Found, Picture
from pathfm.compare.tables import Table
from pathfm.runtime import counted, git_commit
from pathfm.templates import render

HTML, MARKDOWN, SCORES = "compare.html", "compare.md", "scores.csv"
_OURS = re.compile(
    r"(leaderboard|ablation|scaling|few_shot|mpp|corruptions|confusion|map)_\d+\.png"
)


@dataclass(frozen=True)
class Page:
    """Everything the page shows, in its order.

    where: the store or the folders, as they are named to people; lead: `lead_of`; tables: results;
    runs: stages side by side, which stand last.
    """

    title: str
    where: str
    lead: str
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    runs: Sequence[Table]
    notes: Sequence[str]


def lead_of(found: Found) -> str:
    """What the page is and how to read it, in a few sentences."""
    models = {score.model for score in found.scores}
    models |= {model.name for one in found.robustness for model in one.models}
    data = {score.task.data for score in found.scores} | {one.data for one in found.robustness}
    told = (
        f"{counted(len(models), 'model')} on {counted(len(data), 'data set')}, side by side. "
        if models
        else ""
    )
    told += "Every figure is read from what another stage measured and kept; nothing is trained or fitted here."
    if found.differences:
        told += (
            " Which of two models is ahead is read from the differences on the same samples: clearly where the "
            "interval leaves out 0, and not from two dots and their own intervals."
        )
    return told


def write_page(page: Page, found: Found, out: Path) -> list[Path]:
    """Writes pictures, tables and the page into `out`, each file whole or not at all, and returns their paths.

    Pictures of an earlier page that this one does not have are removed last. Text is escaped (names come
    from strangers), the HTML's pictures are data URIs, nothing is loaded or run.
    """
    made = f"{datetime.now(UTC):%d %B %Y, %H:%M UTC}, commit {git_commit()}"
    pictures = [(p, _data_uri(p.png)) for p in page.pictures]
    text = render("compare.html.j2", page=page, pictures=pictures, made=made)
    written = {HTML: text, MARKDOWN: markdown(page, made), SCORES: scores_csv(found)}
    for picture in page.pictures:
        atomic_write_bytes(out / picture.name, picture.png)
    for name, content in written.items():
        atomic_write_text(out / name, content)
    _remove_stale(out, {picture.name for picture in page.pictures})
    return [out / name for name in [*written, *(picture.name for picture in page.pictures)]]


def _remove_stale(out: Path, kept: Set[str]) -> None:
    """Removes what an earlier page drew and this one did not: our names, and our mark inside the file."""
    for path in out.glob("*_*.png"):
        if path.name not in kept and _OURS.fullmatch(path.name) and _is_ours(path):
            path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Whether `compare` drew the file; somebody else's of the same name, or a link, is not."""
    if path.is_symlink():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError):
        return False


def markdown(page: Page, made: str) -> str:
    """The page as Markdown: tables, and pictures by their file names."""
    parts = [f"# {_md(page.title)}", f"{_md(page.where)}; made {made}.", _md(page.lead)]
    parts += _tables(page.tables)
    if page.pictures:
        parts.append("## Pictures")
    for picture in page.pictures:
        parts += [f"### {_md(picture.title)}", f"![{_md(picture.title)}]({picture.name})"]
        parts.append(_md(picture.caption))
    parts += _tables(page.runs)
    if page.notes:
        parts += ["## Notes", "\n".join(f"- {_md(note)}" for note in page.notes)]
    return "\n\n".join(parts) + "\n"


def _tables(tables: Sequence[Table]) -> Iterator[str]:
    for table in tables:
        lines = ["| " + " | ".join(map(_md, table.columns)) + " |"]
        lines.append("|" + "|".join([" --- ", *[" ---: "] * (len(table.columns) - 1)]) + "|")
        lines += ["| " + " | ".join(map(_md, row)) + " |" for row in table.rows]
        yield f"## {_md(table.title)}"
        yield "\n".join(lines)
        yield from map(_md, table.notes)


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


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
