"""The public data sets: miniature copies in the layouts of their downloads, whole, lacking and wrong."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from pathfm.datasets import DATASETS, Benchmark, open_dataset, registry
from pathfm.datasets.panda import stratified
from pathfm.runtime import PathfmError
from tests.datasets_mini import MAKERS, make_patch_camelyon, small_slide

PATCHES = [name for name in DATASETS if DATASETS[name].facts.task != "slide"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Benchmark]:
    root = tmp_path_factory.mktemp("copies")
    return {name: open_dataset(name, MAKERS[name](root / name), partial=True) for name in MAKERS}


@pytest.fixture(scope="module")
def camelyon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS["camelyon16"](tmp_path_factory.mktemp("camelyon16"))


# --- whole copies ---------------------------------------------------------------------------------


def test_published_counts_of_classes_add_up_to_those_of_splits() -> None:
    for name, entry in DATASETS.items():
        assert name == entry.facts.name
        for split, counts in entry.facts.class_counts.items():
            assert sum(counts) == entry.facts.counts[split]
    totals = {name: sum(entry.facts.counts.values()) for name, entry in DATASETS.items()}
    assert totals == {  # field notes, section 6: eva's leaderboard and the publishers
        "bach": 400,
        "bracs": 4539,
        "breakhis": 1471,
        "crc": 107_180,
        "gleason": 22_752,
        "mhist": 3152,
        "patch_camelyon": 327_680,
        "patch_camelyon_10shot": 327_680,
        "unitopatho": 8669,
        "camelyon16": 399,
        "camelyon16_small": 399,
        "panda": 9555,
        "panda_small": 1909,
        "consep": 41,
        "monusac": 294,
    }


def test_sets_without_a_test_split_say_that_they_select_on_what_they_report() -> None:
    selecting = {name for name, entry in DATASETS.items() if entry.facts.selects_on_reported}
    assert selecting == set("bach breakhis crc gleason mhist unitopatho consep monusac".split())


@pytest.mark.parametrize("name", PATCHES)
def test_every_sample_of_a_copy_can_be_read(name: str, copies: dict[str, Benchmark]) -> None:
    found = copies[name]
    assert len(found) == len(found.paths) > 2
    for i in {0, len(found) // 2, len(found) - 1}:
        pixels = found.read(i)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        if found.facts.task == "segmentation":
            assert found.mask(i).shape == pixels.shape[:2]
            assert found.mask(i).max() < len(found.classes)
    assert np.isfinite(found.mpp).all()
    assert not found.torn_groups()


def test_bach_is_split_at_the_places_that_its_patients_give(copies: dict[str, Benchmark]) -> None:
    found = copies["bach"]
    assert not found.shortfalls()
    first_val = [found.paths[row].rsplit("/", 1)[1] for row in found.rows("val")[:2]]
    assert first_val == ["b042.tif", "b043.tif"]
    assert found.paths[100].endswith("InSitu/is001.tif")
    assert found.splits[100] == "train"
    assert found.splits[89] == "val"  # train again from 90


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("bracs", "BRACS_1003"),
        ("breakhis", "21998CD"),
        ("gleason", "ZT80_38_A_1_2"),
        ("unitopatho", "149-B3-HP"),
        ("monusac", "TCGA-55-1594"),
    ],
)
def test_groups_are_slides_or_patients(name: str, group: str, copies: dict[str, Benchmark]) -> None:
    assert copies[name].groups[0] == group


def test_breakhis_has_its_patients_on_one_side_and_four_classes(
    copies: dict[str, Benchmark],
) -> None:
    found = copies["breakhis"]
    val = {found.groups[row] for row in found.rows("val")}
    assert len(val) == 14
    assert not val & {found.groups[row] for row in found.rows("train")}
    assert all("/40X/" in path for path in found.paths)
    assert found.classes[found.labels[0]] == "F"


def test_slides_of_camelyon_are_named_not_read(camelyon: Path) -> None:
    found = open_dataset("camelyon16", camelyon)  # 399 slides: nothing of it is partial
    val = [found.groups[row] for row in found.rows("val")]
    assert (val[0], val[31:33], val[-1]) == ("normal_010", ["normal_152", "tumor_001"], "tumor_109")
    digits = "".join(name[-3:] for name in val)  # eva's list, from its source
    assert hashlib.sha256(digits.encode()).hexdigest()[:16] == "550197419b8fe6e9"
    assert found.labels[found.rows("test")][:4].tolist() == [1, 1, 0, 1]
    assert found.slide(0) == str(camelyon / found.paths[0])
    assert (found.facts.slide_patches, found.facts.slide_mpp) == (10_000, 0.25)
    assert open_dataset("camelyon16_small", camelyon).facts.slide_patches == 1000
    with pytest.raises(PathfmError, match="whole slides"):
        found.read(0)
    with pytest.raises(PathfmError, match="no masks"):
        found.mask(0)


# --- masks ----------------------------------------------------------------------------------------


def test_consep_has_epithelium_in_one_class_and_spindle_shaped_cells_in_another(
    tmp_path: Path,
) -> None:
    root = MAKERS["consep"](tmp_path)
    types = np.arange(40 * 60).reshape(40, 60) % 8
    scipy.io.savemat(root / "Train/Labels/train_1.mat", {"type_map": types.astype(np.float64)})
    mask = open_dataset("consep", root, partial=True).mask(0)
    assert mask[0, :16].tolist() == [0, 1, 2, 3, 3, 4, 4, 4] * 2


def test_a_later_polygon_covers_an_earlier_one_and_odd_names_are_ambiguous(tmp_path: Path) -> None:
    root = MAKERS["monusac"](tmp_path)

    def drawn(name: str, *corners: tuple[float, float]) -> str:
        vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in corners)
        return (
            f'<Annotation><Attributes><Attribute Name="{name}"/></Attributes><Regions><Region>'
            f"<Vertices>{vertices}</Vertices></Region></Regions></Annotation>"
        )

    text = drawn("Macrophage", (2, 1), (6, 1), (6, 4), (2, 4)) + drawn(
        "Cell", (5, 3), (9, 3), (9, 8)
    )
    (root / f"{SITE}.xml").write_text(f"<Annotations>{text}</Annotations>")
    mask = open_dataset("monusac", root, partial=True).mask(0)
    assert mask.shape == (37, 52)  # height, width; x runs along the width
    assert [mask[1, 2], mask[4, 6], mask[3, 4], mask[3, 5], mask[3, 9], mask[7, 9]] == [
        4,
        5,
        4,
        5,
        5,
        5,
    ]
    assert mask[4, 2] == 4
    assert (mask[:, 10:] == 0).all()


# --- PANDA's split --------------------------------------------------------------------------------


def test_pandas_split_has_the_published_sizes_for_the_published_grades() -> None:
    """Grades of the 9,555 clean slides do not matter to the last digit; their sum does."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(6), [2600, 2400, 1210, 1120, 1124, 1101]))
    train, val, test = stratified(labels, (0.7, 0.15, 0.15), everything=True)
    assert sorted(np.concatenate([train, val, test]).tolist()) == list(range(9555))
    for label, n in enumerate((2600, 2400, 1210, 1120, 1124, 1101)):
        assert (labels[train] == label).sum() == int(0.7 * n)
        assert (labels[val] == label).sum() == int(0.15 * n)
    small = stratified(labels, (0.1, 0.05, 0.05), everything=False)
    assert [len(part) for part in small] == [
        sum(int(share * n) for n in (2600, 2400, 1210, 1120, 1124, 1101))
        for share in (0.1, 0.05, 0.05)
    ]


def test_pandas_shuffle_is_the_one_of_numpy_that_eva_had() -> None:
    """Golden: another numpy that shuffles differently would quietly change who is in the test."""
    labels = np.arange(60) % 6
    train, val, test = stratified(labels, (0.7, 0.15, 0.15), everything=True)
    text = ",".join(map(str, np.concatenate([train, val, test])))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "c55ee4d2dea59585"


def test_unitopathos_test_table_is_the_validation_split(copies: dict[str, Benchmark]) -> None:
    found = copies["unitopatho"]
    assert {found.groups[row][:3] for row in found.rows("val")} == {str(243 + n) for n in range(6)}
    assert len(found.rows("train")) == len(found.rows("val")) == 12


def test_noisy_labels_of_panda_are_left_out(copies: dict[str, Benchmark]) -> None:
    rows = (copies["panda"].root / "train_with_noisy_labels.csv").read_text().splitlines()[1:]
    noisy = {row.split(",")[0] for row in rows if row.endswith(",0")}
    assert len(noisy) == 13
    assert len(copies["panda"]) == 126 - 13
    assert not noisy & set(copies["panda"].groups)


@pytest.mark.parametrize("name", ["bracs", "crc", "mhist"])
def test_class_counts_that_no_source_confirms_are_a_warning_not_a_refusal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    entry, root = DATASETS[name], MAKERS[name](tmp_path / name)
    counts = {split: len(entry.open(root).rows(split)) for split in entry.facts.counts}
    labels = {split: entry.open(root).labels[entry.open(root).rows(split)] for split in counts}
    n_classes = len(entry.facts.classes)
    of_class = {s: np.bincount(y, minlength=n_classes).tolist() for s, y in labels.items()}
    of_class["train"][:2] = of_class["train"][0] + 1, of_class["train"][1] - 1
    expected = {s: tuple(n) for s, n in of_class.items()}
    facts = replace(entry.facts, counts=counts, class_counts=expected)
    changed = replace(entry, facts=facts, open=lambda r: replace(entry.open(r), facts=facts))
    monkeypatch.setattr(registry, "DATASETS", {name: changed})
    found = open_dataset(name, root)
    assert len(found) == sum(counts.values())
    told = capsys.readouterr().err
    first = of_class["train"][0]
    assert told.startswith(f"{name} at {root}: WARNING train has {first - 1:,} of class ")
    assert f"expected {first:,}; train has {of_class['train'][1] + 1:,} of class" in told
    assert "expected from counts that no source at hand confirms" in told
    assert told.count("\n") == 1
    assert found.shortfalls() == ()
    sure = replace(facts, class_counts_confirmed="the publisher's table")
    monkeypatch.setattr(
        registry,
        "DATASETS",
        {name: replace(changed, open=lambda r: replace(entry.open(r), facts=sure))},
    )
    with pytest.raises(PathfmError, match="published are"):
        open_dataset(name, root)


# --- what a data set can do -----------------------------------------------------------------------


def test_a_subset_reads_the_samples_it_names(copies: dict[str, Benchmark]) -> None:
    for name in ("patch_camelyon", "crc", "monusac"):
        found = copies[name]
        rows = np.asarray([2, 0])
        part = found.subset(rows)
        assert part.paths == (found.paths[2], found.paths[0])
        np.testing.assert_array_equal(part.read(1), found.read(0))
        np.testing.assert_array_equal(part.subset(np.asarray([1])).read(0), found.read(0))


def test_a_data_set_travels_to_another_process(copies: dict[str, Benchmark]) -> None:
    for name in ("patch_camelyon", "bach", "consep"):
        found = copies[name]
        found.read(1)
        again: Benchmark = pickle.loads(pickle.dumps(found))
        np.testing.assert_array_equal(again.read(1), found.read(1))


def test_the_digest_follows_pixels_masks_and_labels_but_not_the_place(tmp_path: Path) -> None:
    for name in ("mhist", "consep", "monusac", "patch_camelyon"):
        one = MAKERS[name](tmp_path / "one" / name)
        two = shutil.copytree(one, tmp_path / "two" / name)
        digest = open_dataset(name, one, partial=True).digest
        assert open_dataset(name, two, partial=True).digest == digest
    table = tmp_path / "two" / "mhist" / "annotations.csv"
    before = open_dataset("mhist", table.parent, partial=True).digest
    table.write_text(table.read_text().replace("MHIST_aaf.png,HP", "MHIST_aaf.png,SSA"))
    assert open_dataset("mhist", table.parent, partial=True).digest != before
    mask = tmp_path / "two" / "consep" / "Train" / "Labels" / "train_1.mat"
    before = open_dataset("consep", mask.parents[2], partial=True).digest
    scipy.io.savemat(mask, {"type_map": np.ones((40, 60))})
    assert open_dataset("consep", mask.parents[2], partial=True).digest != before


def test_meta_tables_of_patch_camelyon_name_the_slides(tmp_path: Path) -> None:
    root = make_patch_camelyon(tmp_path, (4, 2, 2))
    for part, n in (("train", 4), ("valid", 2), ("test", 2)):
        rows = "".join(f"{i},True,False,camelyon16_{part}_{i // 2}\n" for i in range(n))
        meta = root / f"camelyonpatch_level_2_split_{part}_meta.csv"
        meta.write_text(f",tumor_patch,center_tumor_patch,wsi\n{rows}")
    found = open_dataset("patch_camelyon", root, partial=True)
    assert found.groups[:3] == ("camelyon16_train_0", "camelyon16_train_0", "camelyon16_train_1")
    meta.write_text(",wsi\n0,a\n")
    with pytest.raises(PathfmError, match="1 rows for 2 patches"):
        open_dataset("patch_camelyon", root, partial=True)


# --- counts, balance, and what is missing ---------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_a_copy_that_is_not_whole_is_refused_with_page_and_licence(
    name: str, copies: dict[str, Benchmark]
) -> None:
    root = copies[name].root
    if name in ("bach", "camelyon16", "camelyon16_small"):  # these copies are whole
        assert not open_dataset(f"{name}={root}").shortfalls()
        return
    with pytest.raises(PathfmError) as refused:
        open_dataset(name, root)
    told = str(refused.value)
    facts = DATASETS[name].facts
    assert "\n" not in told
    for part in (str(root), facts.page, facts.licence, "published are"):
        assert part in told


def test_an_empty_folder_tells_the_layout_of_each_set(tmp_path: Path) -> None:
    for name, entry in DATASETS.items():
        for root in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(PathfmError) as refused:
                open_dataset(name, root, partial=True)
            assert entry.facts.layout in str(refused.value)
            assert entry.facts.page in str(refused.value)


def test_a_missing_class_and_a_wrong_balance_are_told(tmp_path: Path) -> None:
    root = MAKERS["mhist"](tmp_path / "mhist")
    table = root / "annotations.csv"
    lines = [line for line in table.read_text().splitlines() if "SSA,6,train" not in line]
    table.write_text("\n".join(lines))
    short = open_dataset("mhist", root, partial=True).shortfalls()
    assert "train has none of class SSA" in short
    skewed = make_patch_camelyon(tmp_path / "pcam", (10, 10, 10))
    with h5py.File(skewed / "camelyonpatch_level_2_split_test_y.h5", "r+") as file:
        file["y"][:] = np.asarray([1] * 8 + [0] * 2, np.uint8).reshape(-1, 1, 1, 1)
    told = open_dataset("patch_camelyon", skewed, partial=True).shortfalls()
    assert "test is 20.0 % no_tumor, published are 50 %" in told
    assert not [line for line in told if line.startswith("val is")]


def remove(path: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        target = root / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return act


def write(path: str, content: bytes) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        (root / path).write_bytes(content)

    return act


def replace_text(path: str, old: str, new: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        assert old in (root / path).read_text()
        (root / path).write_text((root / path).read_text().replace(old, new, 1))

    return act


def link_out(path: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        outside = root.parent / "outside.png"
        Image.new("RGB", (8, 8)).save(outside)
        (root / path).unlink(missing_ok=True)
        (root / path).symlink_to(outside)

    return act


def rewrite_h5(name: str, key: str, array: np.ndarray) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        with h5py.File(root / name, "w") as file:
            file[key] = array

    return act


def h5_link(root: Path) -> None:
    with h5py.File(root.parent / "other.h5", "w") as file:
        file["x"] = np.zeros((24, 96, 96, 3), np.uint8)
    with h5py.File(root / "camelyonpatch_level_2_split_train_x.h5", "w") as file:
        file["x"] = h5py.ExternalLink("../other.h5", "x")


def h5_virtual(root: Path) -> None:
    with h5py.File(root.parent / "other.h5", "w") as file:
        file["x"] = np.zeros((24, 96, 96, 3), np.uint8)
    layout = h5py.VirtualLayout((24, 96, 96, 3), np.uint8)
    layout[:] = h5py.VirtualSource(root.parent / "other.h5", "x", (24, 96, 96, 3), np.uint8)
    with h5py.File(root / "camelyonpatch_level_2_split_train_x.h5", "w") as file:
        file.create_virtual_dataset("x", layout)


def h5_huge_chunk(root: Path) -> None:
    """A file of a few kB that declares one chunk of 553 MB."""
    with h5py.File(root / "camelyonpatch_level_2_split_train_x.h5", "w") as file:
        shape = (20_000, 96, 96, 3)
        file.create_dataset("x", shape, np.uint8, chunks=shape, compression="gzip")


def mat(array: np.ndarray, key: str = "type_map") -> Callable[[Path], None]:
    return lambda root: scipy.io.savemat(root / "Train/Labels/train_1.mat", {key: array})


PCAM = "camelyonpatch_level_2_split_"
PHOTOS = "ICIAR2018_BACH_Challenge/Photos"
ROIS = "BRACS_RoI/latest_version"
SITE = "MoNuSAC_images_and_annotations/TCGA-55-1594-01Z-00-DX1/TCGA-55-1594-01Z-00-DX1_003"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("bach", remove(f"{PHOTOS}/Benign/b001.tif"), "Benign has 99 pictures.*needs all 100"),
        ("bach", remove(f"{PHOTOS}/InSitu"), "no folder .*InSitu"),
        ("bracs", remove(f"{ROIS}/val"), "no folder .*val/0_N"),
        ("bracs", remove(f"{ROIS}/test/6_IC"), "no folder .*test/6_IC"),
        ("bracs", link_out(f"{ROIS}/test/6_IC/BRACS_264_IC_2.png"), "a link out of"),
        ("breakhis", remove("BreaKHis_v1"), r"no \.png of the classes TA, MC"),
        ("crc", remove("CRC-VAL-HE-7K"), "no folder CRC-VAL-HE-7K/ADI"),
        ("gleason", remove("test_patches_750/patho_1"), "no folder test_patches_750/patho_1"),
        (
            "gleason",
            write("train_validation_patches_750/ZT76_39_A_1_2/strange.jpg", b"x"),
            r"strange\.jpg: no name of this set",
        ),
        (
            "gleason",
            write(
                "train_validation_patches_750/ZT76_39_A_1_2/ZT7_1_A_1_1_patch_1_class_1.jpg", b"x"
            ),
            "microarray ZT7 is in no split",
        ),
        ("mhist", remove("annotations.csv"), "there is no annotations.csv"),
        ("mhist", remove("images/MHIST_aab.png"), r"no file .*MHIST_aab\.png"),
        (
            "mhist",
            replace_text("annotations.csv", "MHIST_aaa", "../MHIST_aaa"),
            "is no path inside",
        ),
        (
            "mhist",
            replace_text("annotations.csv", "MHIST_aaa", "/etc/MHIST_aaa"),
            "is no path inside",
        ),
        (
            "mhist",
            replace_text("annotations.csv", ",HP,", ",TA,"),
            "class 'TA' in partition 'train'",
        ),
        ("mhist", replace_text("annotations.csv", "Partition", "Part"), "no column Partition"),
        ("mhist", replace_text("annotations.csv", ",HP,0,train", ",HP"), "has not 4 cells"),
        ("mhist", write("annotations.csv", b"\xff\xfe\0\0"), "not a UTF-8"),
        ("mhist", link_out("images/MHIST_aaa.png"), "is a link out of"),
        ("patch_camelyon", remove(f"{PCAM}valid_y.h5"), "there is no .*valid_y.h5"),
        (
            "patch_camelyon",
            write(f"{PCAM}test_x.h5", b"\x1f\x8b" + bytes(99)),
            "not a readable HDF5",
        ),
        (
            "patch_camelyon",
            rewrite_h5(f"{PCAM}test_y.h5", "y", np.zeros((7, 1, 1, 1), np.uint8)),
            "7 labels for the 8 patches",
        ),
        (
            "patch_camelyon",
            rewrite_h5(f"{PCAM}test_y.h5", "y", np.full((8, 1, 1, 1), 2, np.uint8)),
            "labels 2 to 2",
        ),
        (
            "patch_camelyon",
            rewrite_h5(f"{PCAM}test_x.h5", "x", np.zeros((8, 95, 96, 3), np.uint8)),
            r"is uint8 \(8, 95, 96, 3\), wanted",
        ),
        ("patch_camelyon", rewrite_h5(f"{PCAM}test_x.h5", "z", np.zeros(1)), "no dataset 'x'"),
        ("patch_camelyon", h5_link, "no dataset 'x' in it"),
        ("patch_camelyon", h5_virtual, "'x' is no dataset of its own"),
        (
            "patch_camelyon",
            h5_huge_chunk,
            "chunks of 527 MiB, each read whole; the limit is 256 MiB",
        ),
        ("patch_camelyon", link_out(f"{PCAM}train_x.h5"), "a link out of"),
        ("unitopatho", remove("800/test.csv"), "there is no 800/test.csv"),
        ("unitopatho", replace_text("800/train.csv", ",HP,0,", ",HP,6,"), "top_label '6'"),
        (
            "unitopatho",
            replace_text("800/train.csv", "(12824,", "(1,"),
            "1 pictures are in neither",
        ),
        ("panda", remove("train_with_noisy_labels.csv"), "no train_with_noisy_labels.csv"),
        ("panda", write("train_images/extra.tiff", b"x"), "has 127 slides, .* 126 rows"),
        (
            "panda",
            replace_text("train_with_noisy_labels.csv", "karolinska,0", "karolinska,7"),
            "'7'",
        ),
        ("consep", remove("Train/Labels/train_2.mat"), "Train/Labels/train_2.mat is missing"),
        ("monusac", remove(f"{SITE}.xml"), r"DX1_003\.xml is missing"),
    ],
)
def test_what_is_missing_or_wrong_is_named_in_one_line(
    name: str, spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    root = MAKERS[name](tmp_path / name)
    spoil(root)
    with pytest.raises(PathfmError, match=message) as refused:
        open_dataset(name, root, partial=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("consep", mat(np.full((40, 60), 8.0)), "classes 8.0 to 8.0"),
        ("consep", mat(np.full((40, 60), 0.5)), "wanted whole numbers"),
        ("consep", mat(np.zeros((60, 40))), r"a mask of \(60, 40\), its picture is \(40, 60\)"),
        ("consep", mat(np.zeros((2, 2)), "inst_map"), "no 'type_map'"),
        (
            "consep",
            write("Train/Labels/train_1.mat", b"MATLAB 5.0" + bytes(200)),
            "not a readable mask",
        ),
        ("monusac", write(f"{SITE}.xml", b"<Annotations><A>"), "not a readable annotation"),
        (
            "monusac",
            write(f"{SITE}.xml", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'),
            "not a readable annotation",
        ),
        (
            "monusac",
            replace_text(f"{SITE}.xml", ' Y="', ' Y="nan" Z0="'),
            "no finite place",
        ),
        (
            "monusac",
            replace_text(f"{SITE}.xml", ' X="', ' X="one" Z0="'),
            "without numbers X and Y",
        ),
    ],
)
def test_a_mask_that_cannot_be_read_is_named(
    name: str, spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    root = MAKERS[name](tmp_path / name)
    spoil(root)
    with pytest.raises(PathfmError, match=message) as refused:
        open_dataset(name, root, partial=True).mask(0)
    assert "\n" not in str(refused.value)


def test_slides_of_the_reference_table_are_asked_for(camelyon: Path, tmp_path: Path) -> None:
    root = shutil.copytree(camelyon, tmp_path / "c16")
    (root / "testing/images/test_999.tif").write_bytes(b"x")
    with pytest.raises(PathfmError, match=r"reference\.csv has no row test_999"):
        open_dataset("camelyon16", root, partial=True)
    (root / "testing/reference.csv").write_text("test_001,maybe\n")
    with pytest.raises(PathfmError, match="'test_001,maybe' is no"):
        open_dataset("camelyon16", root, partial=True)
    (root / "training/tumor/lymph_001.tif").write_bytes(b"x")
    with pytest.raises(PathfmError, match=r"neither normal_<n>\.tif nor tumor_<n>\.tif"):
        open_dataset("camelyon16", root, partial=True)


def test_a_real_slide_of_camelyon_opens_by_its_path(tmp_path: Path) -> None:
    from online_patching import open_slide

    for name in ("normal/normal_001", "tumor/tumor_002"):
        (tmp_path / "training" / name).parent.mkdir(parents=True, exist_ok=True)
    small_slide(tmp_path / "training/normal/normal_001.tif", 3)
    (tmp_path / "testing/images").mkdir(parents=True)
    (tmp_path / "testing/reference.csv").write_text("test_001,Tumor\n")
    found = open_dataset("camelyon16", tmp_path, partial=True)
    with open_slide(found.slide(0)) as slide:
        assert slide.dimensions == (500, 330)
