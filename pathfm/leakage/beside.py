"""What `embed` found of leaks, in a file beside the features: NAME.safetensors, NAME.leaks.json."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from online_patching.stores.local import atomic_write_text
from pathfm.cohorts import CohortOptions, Salt
from pathfm.cohorts.salting import ENVIRONMENT
from pathfm.leakage.check import Leaks, Policy, check_pictures, refuse_or_mark, seen_by
from pathfm.leakage.seen import Ids, PretrainedOn
from pathfm.runtime import PathfmError

_MAX_BYTES = 256 << 20
_FORM = "2"  # the first form did not tell what could not be compared


class Samples(Protocol):
    """Labelled pictures: `pathfm.datasets.Benchmark`."""

    @property
    def paths(self) -> Sequence[str]:
        """What each is called."""

    @property
    def groups(self) -> Sequence[str]:
        """The patient or slide of each; "" unknown."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> NDArray[np.uint8]:
        """Picture i, uint8 (h, w, 3)."""

    def slide_digests(self) -> Sequence[str]:
        """The `SlideIndex.digest` of the slide each is cut from; () for pictures."""


def check_beside(
    embeddings: Path,
    key: str,
    weights: str,
    samples: Samples,
    threads: int = 1,
    ids: Ids | None = None,
) -> Leaks:
    """The leaks of a data set, looked for once for these features and this list, and written beside them.

    key: of the embeddings, which says what model and data they are of. Looked for again where the weights'
    list has changed, or a salt is at hand that was not (`ids.mark`): under it other patients are found. A
    sample without a group is told apart by its path, which is no patient's name, so that groups equal to
    paths count as unknown.
    """
    seen = seen_by(weights)
    about = {"form": _FORM, "key": key, "seen": _digest(seen), "salt": ids.mark if ids else ""}
    path = _place(embeddings)
    found = _stored(path, about)
    if found is None:
        groups = ["" if g == p else g for g, p in zip(samples.groups, samples.paths, strict=False)]
        n, names = len(samples), samples.paths
        slides = samples.slide_digests() if seen is not None and len(seen.slides) else ()
        found = check_pictures(seen, samples.read, n, groups, names, ids, threads, slides)
        facts = about | {"leaks": json.loads(found.to_json())}
        atomic_write_text(path, json.dumps(facts) + "\n")
    return found


def salt_at_hand(corpus: Path) -> Salt | None:
    """The salt that PATHFM_SALT holds, so that patients can be compared by id; None where it is unset."""
    return Salt(CohortOptions(), corpus) if os.environ.get(ENVIRONMENT) else None


def marks_of(
    given: Sequence[tuple[str, Path, str]],
    policy: Policy,
    rows: NDArray[np.int64] | None = None,
    names: Sequence[str] = (),
) -> list[str]:
    """What a table of these features must say of leaks: of each (name, file, key) that is not clean a line.

    rows: those that are reported; None: all. names: of all samples, for the error. PathfmError where one
    was seen and that is refused.
    """
    lines = []
    for name, path, key in given:
        line = refuse_or_mark(read_beside(path, key), policy, rows, names)
        if line:
            lines.append(f"{name}: {line}")
    return lines


def read_beside(embeddings: Path, key: str) -> Leaks:
    """What `check_beside` found for the features of this key; "not known" where there is nothing of them.

    Raises PathfmError for a damaged file.
    """
    return _stored(_place(embeddings), {"form": _FORM, "key": key}) or Leaks.from_json("")


def _stored(path: Path, about: dict[str, str]) -> Leaks | None:
    """What is written of these features, None where it is of others or nothing is."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES >> 20} MiB")
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.get("form") != _FORM or any(facts[k] != value for k, value in about.items()):
            return None
        return Leaks.from_json(json.dumps(facts["leaks"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PathfmError(f"{path}: damaged ({error}). Delete it and embed again") from None


def _place(embeddings: Path) -> Path:
    return embeddings.with_name(f"{embeddings.stem}.leaks.json")


def _digest(seen: PretrainedOn | None) -> str:
    """What tells one list from another; "" for none."""
    if seen is None:
        return ""
    total = hashlib.sha256(seen.slides.tobytes() + seen.patches.tobytes())
    total.update(json.dumps([seen.patients, seen.notes, list(map(vars, seen.stages))]).encode())
    return total.hexdigest()
