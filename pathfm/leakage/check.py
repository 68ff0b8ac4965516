"""Which samples of a data set a backbone has already seen in pretraining."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from online_patching import read_slide_index
from online_patching.errors import PatchingError, redact
from pathfm.leakage.digests import MOST_BITS, Digests, digest_picture, distances, stacked
from pathfm.leakage.seen import SHORTEST_NAME, Ids, PretrainedOn, patient_ids, slide_key
from pathfm.runtime import PathfmError

Policy = Literal["refuse", "mark"]
_MOST_TOLD = 5
_KINDS = {"slide": "slide", "patient": "patient", "patch": "near-duplicate picture"}


@dataclass(frozen=True)
class Evidence:
    """What a data set of n samples offers for a comparison; what it lacks stays empty.

    groups: the patient or slide each comes from ("" unknown). slides: the `SlideIndex.digest` of the
    slide each is, or is cut from. patches: digests (n, 32) of the pictures. names: for messages.
    """

    n: int
    groups: Sequence[str] = ()
    slides: Sequence[str] = ()
    patches: Digests | None = None
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        for what in ("groups", "slides", "names", "patches"):
            given = getattr(self, what)
            if given is not None and len(given) not in (0, self.n):
                raise PathfmError(f"leakage: {len(given):,} {what} for {self.n:,} samples")


@dataclass(frozen=True)
class Leaks:
    """Samples that a backbone has seen: per kind of evidence their row numbers, ascending.

    `known` is False where nothing is recorded of the pretraining data; `compared` are the kinds of evidence
    that were there on both sides, `notes` what could not be compared and why.
    """

    n: int
    known: bool
    compared: tuple[str, ...] = ()
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    cohorts: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def mask(self) -> NDArray[np.bool_]:
        """True for every sample that was seen, by any evidence: (n,)."""
        out = np.zeros(self.n, bool)
        for rows in self.rows.values():
            out[list(rows)] = True
        return out

    def told(self, among: NDArray[Any] | None = None) -> str:
        """One line: how many of the samples (of the rows `among`) were seen, and how that is known."""
        if not self.known:
            why = "; ".join(self.notes) or "nothing is recorded"
            return f"What the backbone was pretrained on is not known: {why}."
        inside = np.ones(self.n, bool)
        if among is not None:
            inside[:] = False
            inside[among] = True
        total, seen = int(inside.sum()), int((self.mask() & inside).sum())
        by = {kind: int(inside[list(rows)].sum()) for kind, rows in self.rows.items()}
        parts = [f"{count:,} by {_KINDS[kind]}" for kind, count in by.items() if count]
        cohorts = ", ".join(self.cohorts) or "no slides"
        how = f" ({', '.join(parts)})" if parts else ""
        compared = ", ".join(_KINDS[kind] for kind in self.compared) or "nothing"
        return (
            f"{seen:,} of {total:,} samples were in the pretraining data ({cohorts}){how}; compared: {compared}."
            + "".join(f" {note}" for note in self.notes)
        )

    def to_json(self) -> str:
        """As text, for a file's header."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Leaks:
        """What `to_json` wrote; "" is a file from before this was recorded. PathfmError for anything else."""
        if not text:
            return Leaks(
                0, known=False, notes=("these embeddings were made before it was recorded",)
            )
        try:
            facts = json.loads(text)
            facts["rows"] = {kind: tuple(map(int, rows)) for kind, rows in facts["rows"].items()}
            for name in ("compared", "cohorts", "examples", "notes"):
                facts[name] = tuple(facts[name])
            found = Leaks(**facts)
            if not set(found.rows) <= set(_KINDS) or any(
                not 0 <= row < found.n for rows in found.rows.values() for row in rows
            ):
                raise ValueError("rows that are not there")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PathfmError(f"leakage: a damaged record ({error}). Embed again") from None
        return found


def leaks(evidence: Evidence, seen: PretrainedOn | None, ids: Ids | None = None) -> Leaks:
    """Compares a data set with what a backbone was pretrained on.

    By slide: the same SlideIndex.digest, so the same file under any name. By patient: a group's id under
    the salt `ids`, or a public barcode. By picture: at most MOST_BITS of 255 bits differ, in any of eight
    orientations. None of it finds a patch of a slide that both sides know under other names and files.
    `notes` tells what the list holds and the data set offers nothing to compare with.
    """
    if seen is None:
        return Leaks(
            evidence.n, known=False, notes=("its weights come without pretrained_on.json",)
        )
    rows: dict[str, tuple[int, ...]] = {}
    compared, notes = [], list(seen.notes)
    if evidence.slides and len(seen.slides):
        compared.append("slide")
        listed = {row.tobytes() for row in seen.slides}
        rows["slide"] = _where(
            bool(s) and slide_key(s).tobytes() in listed for s in evidence.slides
        )
    if any(evidence.groups) and seen.patients:
        compared.append("patient")
        rows["patient"] = _by_patient(evidence.groups, seen, ids, notes)
        unnamed = sum(not group for group in evidence.groups)
        if unnamed:
            notes.append(f"{unnamed:,} of {evidence.n:,} samples are of no known patient.")
    if evidence.patches is not None and len(seen.patches):
        compared.append("patch")
        rows["patch"] = _where(distances(evidence.patches, seen.patches)[0] <= MOST_BITS)
    found = Leaks(
        evidence.n,
        known=True,
        compared=tuple(compared),
        rows=rows,
        cohorts=tuple(stage.name for stage in seen.stages),
        notes=(*notes, *not_compared(seen, compared)),
    )
    first = np.flatnonzero(found.mask())[:_MOST_TOLD].tolist()
    names = evidence.names or [f"sample {row}" for row in range(evidence.n)]
    return replace(found, examples=tuple(names[row] for row in first))


def not_compared(seen: PretrainedOn, compared: Sequence[str]) -> tuple[str, ...]:
    """Sentences on what a list holds that was not compared, with its numbers; () where all of it was.

    compared: "slide", "patient", "patch". Patches of slides need no comparison where slides were compared:
    a patch is seen if its slide is. The other way round it does not hold: listed are few of the patches drawn,
    and one cut elsewhere in a slide is another picture.
    """
    lacking = []
    if len(seen.slides) and "slide" not in compared:
        lacking.append(f"its {len(seen.slides):,} slides")
    if seen.patients and "patient" not in compared:
        lacking.append(f"its {len(seen.patients):,} patient ids")
    pictures = [stage for stage in seen.stages if stage.patches and not stage.slides]
    if len(seen.patches) and "patch" not in compared and (pictures or "slide" not in compared):
        lacking.append(f"its {len(seen.patches):,} listed patches")
    told = [f"These data have nothing to compare {' and '.join(lacking)} with."] if lacking else []
    sampled = any(stage.every > 1 for stage in pictures)
    if "patch" in compared and (sampled or (len(seen.slides) and "slide" not in compared)):
        draws = sum(stage.draws for stage in seen.stages)
        others = "others are not found"
        if all(stage.every == 1 for stage in seen.stages):
            others = "the others show too little to be recognised, and what is cut elsewhere is another picture"
        listed = f"{len(seen.patches):,} patches of {draws:,} draws: {others}"
        if len(seen.patches) == draws:
            listed = f"all {draws:,} draws: what is cut elsewhere is another picture"
        told.append(f"Listed are {listed}.")
    return tuple(told)


def seen_by(weights: str) -> PretrainedOn | None:
    """What weights as `load_backbone` names them have seen; None where that is not known.

    "random", "imagenet" and "dinov2" have seen no slides. Of a run, a checkpoint or an export, what their
    folder says. PathfmError for a damaged file.
    """
    from pathfm.backbone import find_backbone_folder  # late: it imports torch

    if weights.partition(":")[0] == "random" or weights in ("imagenet", "dinov2"):
        return PretrainedOn.nothing()
    folder = find_backbone_folder(Path(weights))
    return None if folder is None else PretrainedOn.load(folder)


def check_pictures(
    seen: PretrainedOn | None,
    read: Callable[[int], NDArray[np.uint8]],
    n: int,
    groups: Sequence[str] = (),
    names: Sequence[str] = (),
    ids: Ids | None = None,
    threads: int = 1,
    slides: Sequence[str] = (),
) -> Leaks:
    """`leaks` of n pictures that `read(i)` gives as uint8 (h, w, 3); reads none unless patches are listed.

    slides: the `SlideIndex.digest` of the slide each is cut from, where they are cut from slides.
    """
    patches = None
    if seen is not None and len(seen.patches):
        with ThreadPoolExecutor(threads, "pathfm-digest") as pool:
            patches = stacked(pool.map(lambda i: digest_picture(read(i)), range(n)))
    return leaks(Evidence(n, groups, slides, patches, names), seen, ids)


def check_slides(
    seen: PretrainedOn | None,
    uris: Sequence[str],
    groups: Sequence[str] = (),
    ids: Ids | None = None,
) -> Leaks:
    """`leaks` of slides, of which it reads the headers, unless no slides are listed.

    A slide that cannot be read, or has no µm/px of its own, is compared by patient alone, and told.
    """
    digests: list[str] = []
    if seen is not None and len(seen.slides):
        digests = [_digest(uri) for uri in uris]
    names = [redact(uri).rstrip("/").rpartition("/")[2] for uri in uris]
    found = leaks(Evidence(len(uris), groups, digests, None, names), seen, ids)
    unread = sum(not digest for digest in digests)
    note = (f"{unread:,} slides could not be read to be compared.",) if unread else ()
    return replace(found, notes=found.notes + note)


def refuse_or_mark(
    found: Leaks,
    policy: Policy = "refuse",
    rows: NDArray[Any] | None = None,
    names: Sequence[str] = (),
) -> str:
    """A line for the table's notes; PathfmError where a sample (of `rows`) was seen and that is refused.

    What is not known is marked, never refused. "" where all that the list holds was compared (`not_compared`
    has nothing to tell) and nothing was seen.
    names: of all samples, so that the error names some of `rows`; without them the first of all.
    """
    if found.n == 0 and not found.known:
        return found.told()
    seen = found.mask() if rows is None else found.mask()[rows]
    line = found.told(rows)
    if seen.any() and policy == "refuse":
        own = np.arange(found.n) if rows is None else rows
        hit = [names[row] for row in own[seen][:_MOST_TOLD]] if names else found.examples
        raise PathfmError(
            f"{line} Among them {', '.join(hit)}. Scores on them say nothing about new patients: leave "
            "them out, or report it with --leaks mark"
        )
    compared = len(found.compared) > 0 or not found.cohorts
    clean = found.known and not seen.any() and compared and not found.notes
    return "" if clean else line


def _by_patient(
    groups: Sequence[str], seen: PretrainedOn, ids: Ids | None, notes: list[str]
) -> tuple[int, ...]:
    listed = set(seen.patients)
    short = sum(0 < len(group) < SHORTEST_NAME for group in groups)
    if short:
        notes.append(f"{short:,} samples have patient names too short to be compared.")
    marks = {patient.partition(" ")[0] for patient in listed} - {"public"}
    ours = ids.mark if ids is not None else ""
    if marks - {ours}:
        notes.append(
            f"Patients listed under another salt ({', '.join(sorted(marks - {ours}))}) could not be compared by name."
        )
    found = {group for group in set(groups) if listed.intersection(patient_ids(group, ids))}
    return _where(group in found for group in groups)


def _digest(uri: str) -> str:
    try:
        return read_slide_index(uri).digest
    except PatchingError:
        return ""


def _where(hits: Any) -> tuple[int, ...]:
    return tuple(row for row, hit in enumerate(hits) if hit)
