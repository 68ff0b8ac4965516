"""The slides of a corpus and their patients, as a list of what was seen names them; leaks among slides."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from online_patching import Corpus
from online_patching.stores.local import atomic_write_text
from pathfm.cohorts.names import barcode_of
from pathfm.leakage.check import Leaks, Policy, not_compared, refuse_or_mark, seen_by
from pathfm.leakage.seen import SHORTEST_NAME, PretrainedOn, public_id, slide_key
from pathfm.runtime import PathfmError

BAGS_LEAKS = "leaks.json"
"""Beside the bags of a corpus's slides, in the folder of their model."""
_JOURNAL = "index.journal"  # one JSON object a slide: docs/indexing.md
_MAX_BYTES = 256 << 20
_FORM = "2"  # the first form did not tell what could not be compared


@dataclass(frozen=True)
class Listed:
    """A slide: its id, its `SlideIndex.digest`, and every way in which its patient may be listed."""

    slide_id: str
    digest: str
    patients: tuple[str, ...]


def slides_of(folder: Path, corpus: Corpus | None = None) -> Iterator[Listed]:
    """Every slide of a packed corpus, in its order.

    Patients are as the corpus's journal has them: salted ids under the mark of their salt, plain names
    hashed; and the barcodes that slides' own names begin with. No journal: only these.
    """
    corpus = corpus or Corpus.open(folder)
    rows = json_lines(folder / _JOURNAL)
    known = {str(row["slide_id"]): row for row in rows if "slide_id" in row}
    for number, slide_id in enumerate(corpus.slide_ids):
        row = known.get(slide_id, {})
        barcode, patient, salt = barcode_of(slide_id), str(row.get("patient", "")), row.get("salt")
        patients = [public_id(barcode)] if barcode else []
        if salt == "plain" and len(patient) >= SHORTEST_NAME:
            patients.append(public_id(patient))
        elif salt and patient and salt != "plain":
            patients.append(f"{salt} {patient}")
        yield Listed(
            slide_id, str(row.get("digest") or corpus.index(number).digest), tuple(patients)
        )


def check_corpus(seen: PretrainedOn | None, slides: Sequence[Listed]) -> Leaks:
    """Which slides of a corpus a backbone has seen, by digest and by patient; reads no slide."""
    n = len(slides)
    if seen is None:
        return Leaks(n, known=False, notes=("its weights come without pretrained_on.json",))
    rows: dict[str, tuple[int, ...]] = {}
    if len(seen.slides):
        listed = {row.tobytes() for row in seen.slides}
        hits = [slide_key(slide.digest).tobytes() in listed for slide in slides]
        rows["slide"] = tuple(np.flatnonzero(hits).tolist())
    if seen.patients and any(slide.patients for slide in slides):
        patients = set(seen.patients)
        hits = [not patients.isdisjoint(slide.patients) for slide in slides]
        rows["patient"] = tuple(np.flatnonzero(hits).tolist())
    marks, ours = (
        {one.partition(" ")[0] for one in ids} - {"public"}
        for ids in (seen.patients, [p for slide in slides for p in slide.patients])
    )
    apart = marks and ours and not marks & ours
    note = ("Its patients are listed under another salt than these slides'.",) if apart else ()
    return Leaks(
        n,
        known=True,
        compared=tuple(rows),
        rows=rows,
        cohorts=tuple(stage.name for stage in seen.stages),
        notes=(*seen.notes, *note, *not_compared(seen, tuple(rows))),
    )


def check_bags(bags: Path, weights: str, corpus: Path) -> Leaks:
    """Writes into a folder of bags which of the corpus's slides the weights had seen."""
    slides = list(slides_of(corpus))
    found = check_corpus(seen_by(weights), slides)
    facts = {
        "form": _FORM,
        "slides": [s.slide_id for s in slides],
        "leaks": json.loads(found.to_json()),
    }
    atomic_write_text(bags / BAGS_LEAKS, json.dumps(facts) + "\n")
    return found


def mark_of_bags(name: str, folder: Path, slides: Sequence[str], policy: Policy) -> str:
    """What a table of these bags must say of leaks, "" where they are clean; refuses what was seen.

    folder: of bags, or the `h5_files` in it. Bags of others come without a list: that is not known.
    Raises PathfmError, also for a damaged list.
    """
    path = (folder.parent if folder.name == "h5_files" else folder) / BAGS_LEAKS
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES >> 20} MiB")
        facts = json.loads(path.read_text(encoding="utf-8"))
        found = Leaks.from_json(json.dumps(facts["leaks"]) if facts.get("form") == _FORM else "")
        place = {str(slide): row for row, slide in enumerate(facts["slides"])}
    except FileNotFoundError:
        return f"{name}: What the backbone was pretrained on is not known: these bags come without {BAGS_LEAKS}."
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PathfmError(f"{path}: damaged ({error}). Delete it and embed again") from None
    wanted = [slide for slide in slides if place.get(slide, found.n) < found.n]
    chosen = np.array([place[slide] for slide in wanted], np.int64)
    hit = [slide for slide in wanted if found.mask()[place[slide]]] if found.known else []
    line = refuse_or_mark(_named(found, hit), policy, chosen)
    missing = len(slides) - len(wanted)
    if missing:
        line += f" {missing:,} slides are not in its list."
    return f"{name}: {line.strip()}" if line else ""


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; what is torn or no object is left out, as is a missing file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _named(found: Leaks, hit: Sequence[str]) -> Leaks:
    return Leaks(**{**vars(found), "examples": tuple(hit[:5])})
