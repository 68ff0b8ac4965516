"""JSON files of stages, read by their form and not by the stages' own classes.

A file of an older or newer version is worth comparing as long as it has what is asked of it here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pathfm.compare.records import Source
from pathfm.runtime import PathfmError

T = TypeVar("T", bound=BaseModel)


def parsed(model: type[T], source: Source) -> T:
    """The file as a model, fields it does not know passed over; `PathfmError` in one line otherwise."""
    try:
        return model.model_validate(json.loads(source.content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PathfmError(
            f"{source.told}: {source.kind} is not as expected at {where or 'its root'} ({first['msg']}); "
            "make it again, or leave it out"
        ) from None
    except (ValueError, RecursionError) as error:
        raise PathfmError(
            f"{source.told}: {source.kind} is no JSON ({' '.join(str(error).split())[:100]})"
        ) from None


def pair_of(values: Sequence[float]) -> tuple[float, float] | None:
    """The two ends of an interval; None for an empty one."""
    return (values[0], values[1]) if len(values) == 2 else None


def told_by(source: Source, caveats: Sequence[str]) -> tuple[str, ...]:
    """What a stage said must be known beside its figures (leaks, too few groups ...), and where it said so."""
    return tuple(f"{source.told}: {caveat}" for caveat in caveats)
