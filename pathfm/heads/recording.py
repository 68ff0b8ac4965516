"""A probe of heads is made once: found again by its key, or measured, written, tracked and told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel

from pathfm.heads.result import HeadResult, load_result, write_result
from pathfm.runtime import as_dict, make_folder, provenance, save_config
from pathfm.tracking import TrackingConfig, open_run


class Config(Protocol):
    """What every probe of heads is told."""

    @property
    def out(self) -> Path:
        """Folder for the results."""

    @property
    def tracking(self) -> TrackingConfig:
        """Where the run is recorded."""


def key_of(*facts: object) -> str:
    """A digest of everything that a result depends on, all of it JSON."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def once(
    verb: str,
    config: Config,
    file: str,
    key: str,
    data: tuple[str, str],
    measure: Callable[[], HeadResult],
    show: Callable[[HeadResult], None],
    beside: Sequence[str] = (),
) -> HeadResult:
    """The result that lies in `<out>/<file>` under this key; otherwise what `measure` finds.

    data: its name and digest, for the tracked run. beside: what each head's other files end with, which
    `measure` writes as `stem_of` says; where one is gone all is measured again. A new result is tracked (mean
    and sd of every head, each run a step), and written last: what a killed run leaves is no result.
    """
    path = config.out / file
    earlier = load_result(path)
    if earlier is not None and earlier.key == key and _whole(earlier, config.out, beside):
        again = "; it is not recorded again" if config.tracking.enabled else ""
        print(f"{verb}: {path} is up to date{again}")
        show(earlier)
        return earlier
    assert isinstance(config, BaseModel)
    save_config(config, make_folder(config.out), f"{verb.replace('-', '_')}.yaml")
    tracking = config.tracking.filled(config.out, verb)
    tags = provenance() | {"stage": verb}
    with open_run(tracking, config.out, as_dict(config), tags) as tracked:
        tracked.cohort(*data, "evaluation")
        result = measure()
        tracked.tag("reported", result.told)
        for model in result.models:
            at = f"{file_name(model.name)}/{model.protocol}"
            tracked.summary(**{f"{at}.mean": model.mean, f"{at}.sd": model.sd})
            for number, value in enumerate(model.values):
                tracked.log(number, **{f"{at}.by_run": value})
        write_result(path, result)
        tracked.artifact(path)
    show(result)
    print(f"written: {path}")
    return result


def stem_of(name: str, protocol: str) -> str:
    """What the names of a head's own files begin with."""
    return f"{file_name(name)}.{protocol}"


def file_name(name: str) -> str:
    """A model's name as a part of a file's name: a weights file is named by its path."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[-100:].lstrip(".") or "_"


def _whole(result: HeadResult, out: Path, beside: Sequence[str]) -> bool:
    stems = [stem_of(model.name, model.protocol) for model in result.models]
    return all((out / f"{stem}{end}").is_file() for stem in stems for end in beside)
