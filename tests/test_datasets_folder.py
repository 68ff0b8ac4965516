"""A labelled folder: what is found, what is refused, and splits that leak nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pathfm.datasets import scan_folder, stratified_split
from pathfm.datasets.folder import read_picture
from pathfm.runtime import PathfmError


def make_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (30, 20)) -> Path:
    rng = np.random.default_rng(0)
    for name, n in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


def test_classes_paths_and_labels_are_sorted_and_clutter_is_left_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", {"b": 2, "a": 3, ".hidden": 1})
    (root / "empty").mkdir()
    (root / "a" / "notes.txt").write_text("x")
    folder = scan_folder(root)
    assert folder.classes == ("a", "b")
    assert folder.paths == ("a/00.png", "a/01.png", "a/02.png", "b/00.png", "b/01.png")
    assert folder.labels.tolist() == [0, 0, 0, 1, 1]


def test_the_digest_follows_bytes_and_names_but_not_the_place(tmp_path: Path) -> None:
    first = scan_folder(make_folder(tmp_path / "x", {"a": 2, "b": 2})).digest
    other = make_folder(tmp_path / "y", {"a": 2, "b": 2})
    assert scan_folder(other).digest == first
    Image.new("RGB", (9, 9)).save(other / "a" / "00.png")
    assert scan_folder(other).digest != first


@pytest.mark.parametrize(
    ("counts", "message"),
    [({}, "no class with pictures"), ({"a": 3}, "only the class 'a'")],
)
def test_too_few_classes_are_refused(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    tmp_path.joinpath("d").mkdir()
    with pytest.raises(PathfmError, match=message):
        scan_folder(make_folder(tmp_path / "d", counts))


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(PathfmError, match="no such folder"):
        scan_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_a_damaged_picture_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.png"
    if content is None:  # truncated
        Image.effect_noise((64, 64), 50).save(path)
        content = path.read_bytes()[:900]
    path.write_bytes(content)
    with pytest.raises(PathfmError, match=r"bad\.png: not a readable picture"):
        read_picture(path)


def test_a_slide_is_no_patch(tmp_path: Path) -> None:
    Image.new("1", (9000, 8000)).save(tmp_path / "huge.png")
    with pytest.raises(PathfmError, match="is no patch"):
        read_picture(tmp_path / "huge.png")


def test_a_subset_is_a_function_of_the_seed(tmp_path: Path) -> None:
    folder = scan_folder(make_folder(tmp_path / "d", {"a": 12, "b": 5}))
    one, same, other = folder.subset(4, 0), folder.subset(4, 0), folder.subset(4, 1)
    assert np.bincount(one.labels).tolist() == [4, 4]
    assert one.paths == same.paths != other.paths
    assert set(folder.subset(2, 0).paths) <= set(one.paths)


@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=5),
    share=st.floats(0.1, 0.9),
    seed=st.integers(0, 2**63),
    repeat=st.integers(0, 1000),
)
def test_a_split_covers_everything_once_in_the_right_shares(
    counts: list[int], share: float, seed: int, repeat: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    wanted = [max(1, round(share * n)) for n in counts]
    if any(n == w for n, w in zip(counts, wanted, strict=True)):
        with pytest.raises(PathfmError, match="too few samples"):
            stratified_split(labels, share, seed, repeat)
        return
    split = stratified_split(labels, share, seed, repeat)
    both = np.concatenate([split.train, split.test])
    np.testing.assert_array_equal(np.sort(both), np.arange(len(labels)))
    assert np.bincount(labels[split.test], minlength=len(counts)).tolist() == wanted


def test_splits_differ_by_seed_and_repeat_but_never_by_call() -> None:
    labels = np.repeat([0, 1, 2], [30, 41, 52]).astype(np.int64)
    tests = [
        tuple(stratified_split(labels, 0.3, seed, repeat).test)
        for seed, repeat in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert len(set(tests)) == 3
    assert tests[0] == tests[3]


def test_groups_are_never_torn_apart(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], 60).astype(np.int64)
    groups = [f"slide{i // 6}" for i in range(180)]
    for repeat in range(5):
        split = stratified_split(labels, 0.3, 0, repeat, groups)
        assert not {groups[i] for i in split.train} & {groups[i] for i in split.test}
        shares = np.bincount(labels[split.test]) / 60
        assert ((shares > 0.15) & (shares < 0.45)).all()


def test_a_groups_table_must_name_every_picture(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", {"a": 2, "b": 1})
    (root / "groups.csv").write_text("path,group\na/00.png,s1\na/01.png,s1\n")
    with pytest.raises(PathfmError, match=r"1 of 3 pictures have no group, first b/00\.png"):
        scan_folder(root)
    (root / "groups.csv").write_text("path,group\na/00.png,s1\na/01.png,s1\nb/00.png,s2\n")
    assert scan_folder(root).groups == ("s1", "s1", "s2")


def test_groups_in_another_encoding_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    (tmp_path / "groups.csv").write_bytes("path,group\na/0.png,Müller\n".encode("latin-1"))
    with pytest.raises(PathfmError, match=r"groups\.csv: not a UTF-8"):
        scan_folder(tmp_path)


@pytest.mark.parametrize("what", ["picture", "class", "nowhere"])
def test_a_link_out_of_a_labelled_folder_is_refused(tmp_path: Path, what: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a", root / "b", outside):
        folder.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(folder / "1.png")
    (root / "b" / "2.png").symlink_to(root / "b" / "1.png")
    assert len(scan_folder(root)) == 3  # within the folder a link is a picture
    if what == "class":
        (root / "c").symlink_to(outside)
    else:
        (root / "a" / "2.png").symlink_to(outside / ("1.png" if what == "picture" else "none"))
    with pytest.raises(PathfmError, match=r"a link that leads nowhere|a link out of the data set"):
        scan_folder(root)
