"""BreakHis at 40x: 1,471 breast micrographs of the four classes with at least seven patients."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pathfm.datasets.benchmark import Benchmark, Facts
from pathfm.datasets.listing import files_under, lacking
from pathfm.datasets.sources import assemble
from pathfm.runtime import PathfmError

FACTS = Facts(
    name="breakhis",
    title="BreakHis, 40X",
    task="classification",
    classes=("TA", "MC", "F", "DC"),
    mpp=0.25,
    counts={"train": 1132, "val": 339},
    licence="CC BY 4.0",
    page="https://web.inf.ufpr.br/vri/databases/breast-cancer-histopathological-database-breakhis/",
    layout="BreaKHis_v1/histology_slides/breast/**/40X/SOB_<B|M>_<class>-<year>-<patient>-40-<n>.png",
)

_MAGNIFICATION = "40X"
# eva 0.4.5: the patients of its validation split
_VAL_PATIENTS = frozenset(
    "18842D 19979 15275 15792 16875 3909 5287 16716 2773 5695 16184CD 23060CD 21998CD 21998EF".split()
)


def open_breakhis(root: Path) -> Benchmark:
    """The 40x pictures of the four classes, in the order of their paths; the group is the patient."""
    paths, labels, patients = [], [], []
    for path in sorted(files_under(root, "", (".png",)) if root.is_dir() else ()):
        parts = PurePosixPath(path).parts
        if len(parts) < 2 or parts[-2] != _MAGNIFICATION:
            continue
        kind, patient = _told_by_name(root / path)
        if kind in FACTS.classes:  # A, PT, LC and PC have too few patients
            paths.append(path)
            labels.append(FACTS.classes.index(kind))
            patients.append(patient)
    if not paths:
        raise lacking(
            FACTS, root, f"no .png of the classes {', '.join(FACTS.classes)} in a folder 40X"
        )
    splits = ["val" if patient in _VAL_PATIENTS else "train" for patient in patients]
    return assemble(FACTS, root, paths, labels, splits, groups=patients)


def _told_by_name(file: Path) -> tuple[str, str]:
    """Class and patient in SOB_B_TA-14-3411F-40-001.png."""
    parts = file.name.split("-")
    if len(parts) != 5:
        raise PathfmError(
            f"{file}: no name of BreakHis (SOB_B_TA-14-3411F-40-001.png); remove the file"
        )
    return parts[0].rsplit("_", 1)[-1], parts[2]
