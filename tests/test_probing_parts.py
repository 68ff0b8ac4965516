"""Rows are in one part, and what cannot be probed is refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from pathfm.probing.parts import Parts, check_inputs
from pathfm.runtime import PathfmError


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_a_row_in_two_parts_cannot_be_made() -> None:
    with pytest.raises(PathfmError, match="a row is in two"):
        Parts(rows(0, 1), rows(1, 2), rows())
    with pytest.raises(PathfmError, match="twice in one"):
        Parts(rows(0, 0), rows(1, 2), rows())
    with pytest.raises(PathfmError, match="no row is in val: nothing to choose by"):
        Parts(rows(0, 1), rows(), rows(2))


def test_test_reports_and_without_one_validation_does() -> None:
    whole = Parts(rows(0, 1), rows(2), rows(3))
    assert (whole.reported.tolist(), whole.reported_on) == ([3], "test")
    halves = Parts(rows(0, 1), rows(2), rows())
    assert (halves.reported.tolist(), halves.reported_on) == ([2], "val")


def test_parts_are_read_from_names() -> None:
    parts = Parts.of_names(["train", "", "test", "val", "train"])
    assert [part.tolist() for part in (parts.train, parts.val, parts.test)] == [[0, 4], [3], [2]]
    whole = Parts.of_names(["train", "val"])
    assert (whole.val.tolist(), whole.test.tolist(), whole.reported_on) == ([1], [], "val")
    with pytest.raises(PathfmError, match="splits holdout: only train, val, test"):
        Parts.of_names(["train", "holdout"])


def test_a_test_without_validation_stays_the_test_and_train_gives_whole_groups_to_choose_by() -> (
    None
):
    names = ["train"] * 40 + ["test"] * 10 + [""]
    labels = np.tile(rows(0, 1), 26)[:51]
    groups = [f"p{i // 4}" for i in range(51)]
    parts = Parts.of_names(names, labels, groups)
    assert parts.carved
    assert (parts.test.tolist(), parts.reported_on) == (list(range(40, 50)), "test")
    assert sorted([*parts.train, *parts.val]) == list(range(40))
    assert len(parts.val) == 8
    assert not {groups[i] for i in parts.val} & {groups[i] for i in parts.train}
    assert np.bincount(labels[parts.val]).tolist() == [4, 4]
    np.testing.assert_array_equal(Parts.of_names(names, labels, groups).val, parts.val)
    with pytest.raises(PathfmError, match="train and test, but no val, and none can be cut out"):
        Parts.of_names(["train", "train", "test"], rows(0, 1, 0))


GOOD = Parts(rows(0, 1, 2, 3), rows(4, 5), rows(6, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(8, np.int64)}, "class 1 of 2 has no sample in train"),
        ({"labels": rows(0, 1, 0, 1, 0, 0, 0, 1)}, "val has samples of one class only"),
        ({"labels": rows(0, 1, 0, 1, 0, 1, 1, 1)}, "test has samples of one class only"),
        ({"labels": rows(0, 1, 0, 2, 0, 1, 0, 1)}, r"labels 0 to 2 outside 0..1"),
        ({"labels": rows(0, 1)}, "do not belong together"),
        ({"features": np.full((8, 3), np.nan, np.float32)}, "8 of 8 rows have NaN"),
        ({"features": np.ones((4, 3), np.float32), "labels": rows(0, 1, 0, 1)}, "rows 0 to 7 of 4"),
    ],
)
def test_what_cannot_be_probed_is_refused(change: dict, message: str) -> None:
    good = {"features": np.ones((8, 3), np.float32), "labels": np.tile(rows(0, 1), 4)}
    check_inputs(**good, parts=GOOD, n_classes=2)
    with pytest.raises(PathfmError, match=message):
        check_inputs(**{**good, **change}, parts=GOOD, n_classes=2)
