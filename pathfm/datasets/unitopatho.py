"""UniToPatho: 8,669 patches of colorectal polyps in six classes, one slide a patient."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pathfm.datasets.benchmark import Benchmark, Facts
from pathfm.datasets.listing import files_under, lacking, read_rows
from pathfm.datasets.sources import assemble
from pathfm.runtime import PathfmError

FACTS = Facts(
    name="unitopatho",
    title="UniToPatho (800)",
    task="classification",
    classes=("HP", "NORM", "TA.HG", "TA.LG", "TVA.HG", "TVA.LG"),
    mpp=0.4415,
    counts={"train": 6270, "val": 2399},
    licence="CC BY 4.0",
    page="https://ieee-dataport.org/open-access/unitopatho",
    layout="800/train.csv and 800/test.csv (image_id, top_label), 800/<class>/*.png",
)

_COLUMNS = ("image_id", "top_label")


def open_unitopatho(root: Path) -> Benchmark:
    """The patches in the order of their paths; the group is the slide, the name up to `.ndpi`.

    Classes come from the tables, not from the folders, as in eva.
    """
    told: dict[str, tuple[int, str]] = {}
    for name, split in (("train.csv", "train"), ("test.csv", "val")):
        table = root / "800" / name
        if not table.is_file():
            raise lacking(FACTS, root, f"there is no 800/{name}")
        for row in read_rows(table, _COLUMNS):
            if row["top_label"] not in {str(c) for c in range(len(FACTS.classes))}:
                raise PathfmError(
                    f"{table}: {row['image_id']}: top_label {row['top_label']!r}, wanted 0 to 5"
                )
            if row["image_id"] in told:
                raise PathfmError(f"{table}: {row['image_id']} comes twice, here or in both tables")
            told[row["image_id"]] = (int(row["top_label"]), split)
    return _listed(root, told)


def _listed(root: Path, told: dict[str, tuple[int, str]]) -> Benchmark:
    paths = sorted(files_under(root, "800", (".png",)))
    names = [PurePosixPath(path).name for path in paths]
    unknown = [path for path, name in zip(paths, names, strict=True) if name not in told]
    if unknown:
        raise PathfmError(
            f"{FACTS.name} at {root}: {len(unknown):,} pictures are in neither table, first {unknown[0]}"
        )
    if not paths:
        raise lacking(FACTS, root, "there are no .png below 800")
    labels = [told[name][0] for name in names]
    splits = [told[name][1] for name in names]
    groups = [name.split(".ndpi", 1)[0] if ".ndpi" in name else "" for name in names]
    return assemble(FACTS, root, paths, labels, splits, groups)
