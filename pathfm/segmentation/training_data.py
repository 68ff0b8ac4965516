"""The drawn pictures a mask model may be trained and validated on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathfm.runtime import PathfmError
from pathfm.segmentation.templates import Template, read_templates
from pathfm.segmentation.truth import DrawnPicture, read_pictures

PERMITTED = ("CC0", "MIT", "BSD", "Apache", "CC BY")
"""The licences whose pictures may teach weights that are passed on."""
_PERMITTED = re.compile(r"(CC0|MIT|BSD|Apache|CC[ -]BY)([ -]\d.*|)|BSD-\d-Clause(-Clear)?")


def permitted(licence: str) -> bool:
    """Whether it is one of `PERMITTED`, in some version: CC BY-NC, -ND and -SA are other licences."""
    return _PERMITTED.fullmatch(licence) is not None


@dataclass(frozen=True)
class DrawnData:
    """Pictures with drawn truth: those that teach, and those that choose among models."""

    training: tuple[DrawnPicture, ...] = ()
    validation: tuple[DrawnPicture, ...] = ()
    templates: tuple[Template, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over every picture's name, all that is drawn on it and what it is used for."""
        sha = hashlib.sha256()
        for use, pictures in (("training", self.training), ("validation", self.validation)):
            for picture in sorted(pictures, key=lambda p: p.name):
                sha.update(f"{use} {picture.name} {picture.rgb.shape}".encode())
                kinds = [mask for _, mask in sorted(picture.kinds.items())]  # crops look for them
                for array in (picture.rgb, picture.tissue, picture.ignore, *kinds):
                    sha.update(array.tobytes())
        for template in self.templates:
            sha.update(f"template {template.name} {template.mask.shape}".encode())
            sha.update(template.light.tobytes() + template.mask.tobytes())
        return sha.hexdigest()

    def told(self) -> list[dict[str, Any]]:
        """Name, licence and origin of every picture that taught, for a model card."""
        return [{"name": p.name, "licence": p.licence, "origin": p.origin} for p in self.training]


def gather(roots: Sequence[Path], templates: Path | None = None) -> DrawnData:
    """The drawn training and validation pictures found under the roots, and templates to paste.

    Without roots no pictures; without a folder of templates none of those.

    Raises ``PathfmError`` for a picture that is missing, changed, or whose licence is none of
    ``PERMITTED``.
    """
    pasted = tuple(read_templates(templates)) if templates is not None else ()
    if not roots:
        return DrawnData(templates=pasted)
    data = DrawnData(
        tuple(read_pictures(roots, "training")), tuple(read_pictures(roots, "validation")), pasted
    )
    for picture in (*data.training, *data.validation):
        if not permitted(picture.licence):
            raise PathfmError(
                f"picture {picture.name}: its licence is {picture.licence!r}; weights are made only "
                f"from {', '.join(PERMITTED)} pictures. Give it split=evaluation in pictures.csv"
            )
    return data
