"""PretrainedOn: what a backbone has seen, small enough to travel with its weights.

    {"format": "pathfm.pretrained_on.1", "cohorts": [{"name", "digest", "draws", "slides", ...}], "notes": [...],
     "slides": base64, "patients": [...], "patches": base64}

Slides are the first 16 bytes of `SlideIndex.digest` (of headers and tile places, not of names), patients
are salted ids with the mark of their salt, patches are perceptual digests. No slide's or patient's name is
in it; public TCGA barcodes are, as plain SHA-256, so that others can look.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from online_patching.stores.local import atomic_write_text
from pathfm.cohorts.names import barcode_of
from pathfm.leakage.digests import DIGEST_BYTES, Digests
from pathfm.runtime import PathfmError

PRETRAINED_ON = "pretrained_on.json"
"""The file's name, in the folder that holds a backbone's weights."""

_FORMAT = "pathfm.pretrained_on.1"
_MAX_BYTES = 512 << 20
SLIDE_BYTES = 16
SHORTEST_NAME = 5
"""Shorter names of patients ("12") are no evidence: every study has them."""


class Ids(Protocol):
    """Ids for names: `pathfm.cohorts.Salt`."""

    def id(self, kind: str, name: str) -> str:
        """The id of a name."""

    @property
    def mark(self) -> str:
        """What tells ids made with this salt from others."""


@dataclass(frozen=True)
class Stage:
    """One pretraining run: the cohort's name and digest, its draws, and what of it is listed."""

    name: str
    digest: str
    draws: int
    slides: int = 0
    patients: int = 0
    patches: int = 0
    every: int = 1
    """One of so many draws is among the patches."""


@dataclass(frozen=True, eq=False)
class PretrainedOn:
    """What a backbone has seen, of all stages. Arrays are sorted and without repeats; `save` and `load`.

    slides: (n, 16) uint8. patients: "<mark> <id>". patches: (m, 32) uint8. notes: what is not known.
    """

    stages: tuple[Stage, ...]
    slides: NDArray[np.uint8]
    patients: tuple[str, ...]
    patches: Digests
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, array, width in (
            ("slides", self.slides, SLIDE_BYTES),
            ("patches", self.patches, DIGEST_BYTES),
        ):
            if array.ndim != 2 or array.shape[1] != width or array.dtype != np.uint8:
                raise PathfmError(
                    f"pretrained on: {what} {array.shape} {array.dtype}, wanted (n, {width}) uint8"
                )
        object.__setattr__(self, "slides", _unique(self.slides))
        object.__setattr__(self, "patches", _unique(self.patches))
        object.__setattr__(self, "patients", tuple(sorted(set(self.patients))))
        object.__setattr__(self, "notes", tuple(dict.fromkeys(self.notes)))

    @staticmethod
    def nothing(*notes: str) -> PretrainedOn:
        """Of no cohort."""
        slides, patches = (np.zeros((0, width), np.uint8) for width in (SLIDE_BYTES, DIGEST_BYTES))
        return PretrainedOn((), slides, (), patches, notes)

    def after(self, earlier: PretrainedOn) -> PretrainedOn:
        """What a backbone has seen that was trained on this, having started from weights trained on that."""
        return PretrainedOn(
            (*earlier.stages, *self.stages),
            np.concatenate([earlier.slides, self.slides]),
            earlier.patients + self.patients,
            np.concatenate([earlier.patches, self.patches]),
            earlier.notes + self.notes,
        )

    def save(self, folder: Path) -> Path:
        """Writes the file into a folder, whole or not at all."""
        facts = {
            "format": _FORMAT,
            "stages": [asdict(stage) for stage in self.stages],
            "notes": self.notes,
            "patients": self.patients,
            "slides": base64.b64encode(self.slides.tobytes()).decode(),
            "patches": base64.b64encode(self.patches.tobytes()).decode(),
        }
        path = folder / PRETRAINED_ON
        atomic_write_text(path, json.dumps(facts, indent=1) + "\n")
        return path

    @staticmethod
    def load(folder: Path) -> PretrainedOn | None:
        """What the folder's file says; None where there is none. PathfmError for a damaged one."""
        path = folder / PRETRAINED_ON
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"more than {_MAX_BYTES >> 20} MiB")
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["format"] != _FORMAT:
                raise ValueError(f"format {facts['format']!r}, wanted {_FORMAT!r}")
            return PretrainedOn(
                tuple(Stage(**stage) for stage in facts["stages"]),
                _rows(facts["slides"], SLIDE_BYTES),
                tuple(str(patient) for patient in facts["patients"]),
                _rows(facts["patches"], DIGEST_BYTES),
                tuple(str(note) for note in facts["notes"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
            raise PathfmError(
                f"{path}: not a list of what a backbone was pretrained on ({error}). Copy it again from the run, "
                "or delete it: then nothing is known of the pretraining data"
            ) from None


def slide_key(digest: str) -> NDArray[np.uint8]:
    """A slide's 16 bytes, from its SlideIndex.digest."""
    return np.frombuffer(bytes.fromhex(digest)[:SLIDE_BYTES], np.uint8)


def slide_keys(digests: Sequence[str]) -> NDArray[np.uint8]:
    """(n, 16) of SlideIndex.digests."""
    keys = [slide_key(digest) for digest in digests]
    return np.stack(keys) if keys else np.zeros((0, SLIDE_BYTES), np.uint8)


def patient_ids(name: str, ids: Ids | None = None) -> tuple[str, ...]:
    """Every way in which a file may list a patient (or a slide's name that begins with a barcode).

    () for "" and for names that are too short to say anything.
    """
    barcode = barcode_of(name)
    found = []
    if barcode:
        found.append(public_id(barcode))
    if len(name) >= SHORTEST_NAME:
        if ids is not None:
            found.append(f"{ids.mark} {ids.id('patient', name)}")
            if barcode and barcode != name:
                found.append(f"{ids.mark} {ids.id('patient', barcode)}")
        found.append(public_id(name))
    return tuple(dict.fromkeys(found))


def public_id(name: str) -> str:
    """How a name that anybody may know is listed."""
    return f"public {hashlib.sha256(f'patient{chr(0)}{name}'.encode()).hexdigest()[:32]}"


def _unique(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Different rows that are not all zeros, sorted."""
    return np.unique(rows[rows.any(axis=1)], axis=0)


def _rows(text: str, width: int) -> NDArray[np.uint8]:
    data = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(data) % width:
        raise ValueError(f"{len(data):,} bytes are no rows of {width}")
    return data.reshape(-1, width)
