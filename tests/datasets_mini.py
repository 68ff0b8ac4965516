"""Miniature copies of the public data sets: the layouts of their downloads, a few tiny pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image

from online_patching.testing import SyntheticSlide, write_tiff


class Painter:
    """Pictures that no two are alike."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def pixels(self, height: int = 12, width: int = 17) -> NDArray[np.uint8]:
        return self.rng.integers(0, 256, (height, width, 3), np.uint8)

    def save(self, path: Path, height: int = 12, width: int = 17) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.pixels(height, width)).save(path)
        return path


def make_bach(root: Path) -> Path:
    paint = Painter(1)
    photos = root / "ICIAR2018_BACH_Challenge" / "Photos"
    for folder, letters in (("Normal", "n"), ("Benign", "b"), ("InSitu", "is"), ("Invasive", "iv")):
        for number in range(1, 101):
            paint.save(photos / folder / f"{letters}{number:03}.tif", 6, 9)
    (photos / "microscopy_ground_truth.csv").write_text("n001.tif,Normal\n")
    return root


def make_bracs(root: Path) -> Path:
    paint = Painter(2)
    for split, slides in (("train", (280, 1003)), ("val", (265,)), ("test", (264, 291))):
        for name in ("0_N", "1_PB", "2_UDH", "3_FEA", "4_ADH", "5_DCIS", "6_IC"):
            for slide in slides:
                for number in (2, 18):
                    file = f"BRACS_{slide}_{name[2:]}_{number}.png"
                    paint.save(root / "BRACS_RoI" / "latest_version" / split / name / file)
    return root


def make_breakhis(root: Path) -> Path:
    paint = Painter(3)
    top = root / "BreaKHis_v1" / "histology_slides" / "breast"
    kinds = (
        ("benign", "tubular_adenoma", "TA", ("14-3411F", "14-16184CD", "14-15275", "14-13200")),
        ("benign", "adenosis", "A", ("14-22549AB",)),
        ("benign", "fibroadenoma", "F", ("14-9133", "14-23060CD", "14-21998CD", "14-21998EF")),
        (
            "malignant",
            "mucinous_carcinoma",
            "MC",
            ("14-19979", "14-10147", "13-18842D", "14-16875"),
        ),
        ("malignant", "ductal_carcinoma", "DC", ("14-5695", "14-2523", "15-2773", "14-3909")),
        ("malignant", "ductal_carcinoma", "DC", ("14-15792", "14-16716", "14-5287")),
        ("malignant", "lobular_carcinoma", "LC", ("14-12204",)),
    )
    for side, folder, kind, patients in kinds:
        letter = side[0].upper()
        for patient in patients:
            case = top / side / "SOB" / folder / f"SOB_{letter}_{kind}_{patient}"
            for zoom in (40, 100):
                for number in (1, 2):
                    name = f"SOB_{letter}_{kind}-{patient}-{zoom}-{number:03}.png"
                    paint.save(case / f"{zoom}X" / name)
    return root


def make_crc(root: Path) -> Path:
    paint = Painter(4)
    for folder, n in (("NCT-CRC-HE-100K", 3), ("CRC-VAL-HE-7K", 2), ("NCT-CRC-HE-100K-NONORM", 1)):
        for name in ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"):
            for letters in ("AAAFLCLY", "TCGA-AATLP", "ZZZ")[:n]:
                paint.save(root / folder / name / f"{name}-{letters}.tif")
    return root


def make_gleason(root: Path) -> Path:
    paint = Painter(5)
    train, test = root / "train_validation_patches_750", root / "test_patches_750"
    cores = {
        train: ("ZT76_39_A_1_2", "ZT111_4_B_4_6", "ZT199_1_A_2_8", "ZT204_6_B_7_8"),
        test / "patho_1": ("ZT80_38_A_1_2", "ZT80_38_B_3_1"),
        test / "patho_2": ("ZT80_38_A_1_2",),
    }
    for folder, names in cores.items():
        for core in names:
            for number, label in ((0, 0), (12, 1), (7, 2), (18, 3)):
                file = f"{core}_patch_{number}_class_{label}.jpg"
                paint.save(folder / core / file, 24, 24)
    return root


def make_mhist(root: Path) -> Path:
    paint = Painter(6)
    rows = [
        "Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition"
    ]
    votes = ("SSA,6,train", "HP,0,train", "HP,2,test", "SSA,7,test", "HP,3,train", "SSA,4,test")
    for letters, vote in zip(("aaa", "aab", "aac", "aae", "aaf", "aag"), votes, strict=True):
        rows.append(f"MHIST_{letters}.png,{vote}")
        paint.save(root / "images" / f"MHIST_{letters}.png")
    (root / "annotations.csv").write_text("\n".join(rows) + "\n")
    return root


def make_patch_camelyon(root: Path, n: Sequence[int] = (24, 10, 8)) -> Path:
    rng = np.random.default_rng(7)
    root.mkdir(parents=True, exist_ok=True)
    for part, rows in zip(("train", "valid", "test"), n, strict=True):
        stem = f"camelyonpatch_level_2_split_{part}"
        with h5py.File(root / f"{stem}_x.h5", "w") as file:
            pixels = rng.integers(0, 256, (rows, 96, 96, 3), np.uint8)
            file.create_dataset(
                "x", data=pixels, chunks=(min(5, rows), 96, 96, 3), compression="gzip"
            )
        with h5py.File(root / f"{stem}_y.h5", "w") as file:
            file["y"] = rng.permutation(np.arange(rows) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)
    return root


def make_unitopatho(root: Path) -> Path:
    paint = Painter(8)
    names = ("HP", "NORM", "TA.HG", "TA.LG", "TVA.HG", "TVA.LG")
    tables: dict[str, list[str]] = {"train": [], "test": []}
    for label, name in enumerate(names):
        for slide, part in ((149 + label, "train"), (243 + label, "test")):
            for region in (0, 3):
                place = f"({12824 + region},33871,1812,1812)"
                start = f"{slide}-B3-{name.replace('.', '')}.ndpi_ROI__mpp0.44_reg000_crop_sk"
                file = f"{start}{region:05}_{place}.png"
                paint.save(root / "800" / name / file)
                tables[part].append(f'"{file}",{name},{label},3')
    for part, rows in tables.items():
        header = "image_id,top_label_name,top_label,grade\n"
        (root / "800" / f"{part}.csv").write_text(header + "\n".join(rows) + "\n")
    return root


def make_camelyon16(root: Path) -> Path:
    """All 399 slides by name; nobody opens them: eva does only when it cuts patches."""
    names = [f"training/normal/normal_{n:03}" for n in range(1, 161) if n != 86]
    names += [f"training/tumor/tumor_{n:03}" for n in range(1, 112)]
    names += [f"testing/images/test_{n:03}" for n in range(1, 131) if n != 49]
    for folder in ("training/normal", "training/tumor", "testing/images", "testing/evaluation"):
        (root / folder).mkdir(parents=True)
    for name in names:
        (root / f"{name}.tif").write_bytes(b"II*\0" + name.encode())
    rows = [f"test_{n:03},{'Tumor' if n % 3 else 'Normal'},IDC,Macro" for n in range(1, 131)]
    (root / "testing/reference.csv").write_text("\n".join(rows) + "\n")
    return root


def make_panda(root: Path, per_grade: int = 21) -> Path:
    """Slides that nobody opens: eva reads them only when it cuts patches."""
    rng = np.random.default_rng(9)
    rows = ["image_id,data_provider,isup_grade,gleason_score,noise_ratio_10"]
    folder = root / "train_images"
    folder.mkdir(parents=True)
    for number in range(6 * per_grade):
        name = rng.bytes(16).hex()
        (folder / f"{name}.tiff").write_bytes(b"II*\0" + bytes([number % 251]))
        rows.append(f"{name},karolinska,{number % 6},0+0,{int(number % 10 != 3)}")
    (root / "train_with_noisy_labels.csv").write_text("\n".join(rows) + "\n")
    return root


def make_consep(root: Path) -> Path:
    paint = Painter(10)
    for folder, prefix, numbers in (("Train", "train", (1, 2, 10)), ("Test", "test", (1, 2))):
        (root / folder / "Labels").mkdir(parents=True)
        for number in numbers:
            paint.save(root / folder / "Images" / f"{prefix}_{number}.png", 40, 60)
            types = paint.rng.integers(0, 8, (40, 60)).astype(np.float64)
            content = {"type_map": types, "inst_map": np.zeros((40, 60))}
            scipy.io.savemat(root / folder / "Labels" / f"{prefix}_{number}.mat", content)
    return root


def make_monusac(root: Path) -> Path:
    paint = Painter(11)
    cases = (
        ("MoNuSAC_images_and_annotations", "TCGA-55-1594-01Z-00-DX1", "003", (37, 52)),
        ("MoNuSAC_images_and_annotations", "TCGA-5P-A9K0-01Z-00-DX1", "3", (64, 30)),
        ("MoNuSAC Testing Data and Annotations", "TCGA-2Z-A9JG-01Z-00-DX1", "1", (45, 70)),
    )
    for folder, case, number, (height, width) in cases:
        file = root / folder / case / f"{case}_{number}.tif"
        paint.save(file, height, width)
        file.with_suffix(".svs").write_bytes(b"not read")
        file.with_suffix(".xml").write_text(_annotation(paint.rng, height, width))
    return root


def _annotation(rng: np.random.Generator, height: int, width: int) -> str:
    """Polygons with whole, half and ragged vertices, some leaving the picture, one crossing itself."""
    parts = []
    for number, name in enumerate(
        ("Epithelial", "Lymphocyte", "Macrophage", "Neutrophil", "Ambiguous", "Odd")
    ):
        regions = []
        for kind in range(3):
            middle = rng.uniform((0, 0), (width, height))
            corners = middle + rng.uniform(-15, 15, (rng.integers(3, 9), 2))
            corners = (np.round(corners), np.round(2 * corners) / 2, corners)[kind]
            vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in corners)
            regions.append(
                f'<Region Id="{kind}" Type="0"><Attributes/><Vertices>{vertices}</Vertices></Region>'
            )
        parts.append(
            f'<Annotation Id="{number}"><Attributes><Attribute Name="{name}" Id="0" Value=""/></Attributes>'
            f'<Regions><RegionAttributeHeaders><AttributeHeader Id="9999" Name="Region"/>'
            f"</RegionAttributeHeaders>{''.join(regions)}</Regions><Plots/></Annotation>"
        )
    return f'<?xml version="1.0"?>\n<Annotations MicronsPerPixel="0.252">{"".join(parts)}</Annotations>\n'


def small_slide(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tiff(path, SyntheticSlide(seed, 500, 330, mpp=0.2431))


MAKERS: dict[str, Callable[[Path], Path]] = {
    "bach": make_bach,
    "bracs": make_bracs,
    "breakhis": make_breakhis,
    "crc": make_crc,
    "gleason": make_gleason,
    "mhist": make_mhist,
    "patch_camelyon": make_patch_camelyon,
    "patch_camelyon_10shot": make_patch_camelyon,
    "unitopatho": make_unitopatho,
    "camelyon16": make_camelyon16,
    "camelyon16_small": make_camelyon16,
    "panda": make_panda,
    "panda_small": make_panda,
    "consep": make_consep,
    "monusac": make_monusac,
}
