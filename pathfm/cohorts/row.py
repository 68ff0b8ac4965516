"""One slide of a cohort, and what a source names that is none."""

from __future__ import annotations

from dataclasses import dataclass

from online_patching.errors import redact

Mpp = float | tuple[float, float] | None
"""µm/px told for a slide: one value, (x, y), or None for what the file says."""


@dataclass(frozen=True, slots=True)
class CohortRow:
    """One slide of a cohort; an empty string is "not said".

    `mpp` overrides the file's own µm/px (level 0); `split` is e.g. train, val or test. `case` is what
    several stains are cut from; `name` is what the slide is called where its URI does not say it.
    `size_bytes` and `content` (e.g. "md5:...") are what the source promises of the bytes (0, "": nothing).
    `twin_of` names the slide that shows the same image in another file.
    """

    uri: str
    patient: str = ""
    site: str = ""
    label: str = ""
    split: str = ""
    mpp: Mpp = None
    case: str = ""
    stain: str = ""
    name: str = ""
    size_bytes: int = 0
    content: str = ""
    twin_of: str = ""

    @property
    def title(self) -> str:
        """What the slide is called: its name, or the last part of its URI."""
        return self.name or redact(self.uri).rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class Skipped:
    """What a source names but is no slide to be used: why, and the code for tables."""

    uri: str
    reason: str
    code: str
