from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.cohorts import Cohort, CohortRow, MppOverrides, read_cohort, write_csv
from pathfm.runtime import PathfmError


def patients(*names: str) -> Cohort:
    return Cohort(tuple(CohortRow(f"{i}.svs", patient=name) for i, name in enumerate(names)))


def test_a_table_is_read_with_paths_beside_it(tmp_path: Path) -> None:
    table = tmp_path / "c.csv"
    table.write_text("\ufeffURI,Patient,mpp,note\na.svs,p1,0.5,x\nhttp://h/b.svs, p2 ,,\n")
    a, b = read_cohort(table).rows
    assert a == CohortRow(str(tmp_path / "a.svs"), patient="p1", mpp=0.5)
    assert b == CohortRow("http://h/b.svs", patient="p2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("patient\np", "line 2: no slide named"),
        ("uri,mpp\na.svs,wide", "line 2: 'wide' is not a number"),
        ("uri,mpp\na.svs,500", "500 µm/px is outside 0.05 to 8"),
        ("uri\na.svs\na.svs", "is listed twice"),
        ("uri", "has no rows"),
        ("uri,patient,split\na,p,train\nb,p,test", "are of one patient, case or image"),
    ],
)
def test_a_bad_table_is_refused_in_words(tmp_path: Path, text: str, says: str) -> None:
    table = tmp_path / "c.csv"
    table.write_text(text)
    with pytest.raises(PathfmError, match=says):
        read_cohort(table)


def test_the_digest_follows_every_cell() -> None:
    base = CohortRow("a.svs", patient="p", site="s", label="l", split="train", mpp=0.5)
    others = [
        CohortRow("b.svs", "p", "s", "l", "train", 0.5),
        CohortRow("a.svs", "p", "s", "l", "train", None),
        CohortRow("a.svs", "p", "s", "l", "test", 0.5),
    ]
    digests = {Cohort((row,)).digest for row in (base, *others)}
    assert len(digests) == 4
    assert Cohort((base,)).digest in digests


@given(st.lists(st.sampled_from("abcdefghijk"), min_size=1, max_size=40), st.integers(0, 2**32 - 1))
def test_no_patient_is_on_two_sides_and_shares_add_up(names: list[str], seed: int) -> None:
    divided = patients(*names).with_splits({"train": 0.6, "val": 0.2, "test": 0.2}, seed)
    sides: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for row in divided.rows:
        sides[row.split].add(row.patient)
    assert sum(map(len, sides.values())) == len(set(names))
    assert abs(len(sides["train"]) - 0.6 * len(set(names))) <= 1


def test_a_split_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    cohort = patients(*"abcdefghijklmnop")
    shares = {"train": 0.5, "test": 0.5}
    first = {r.patient: r.split for r in cohort.with_splits(shares, 1).rows}
    turned = Cohort(cohort.rows[::-1]).with_splits(shares, 1)
    assert {r.patient: r.split for r in turned.rows} == first
    assert {r.patient: r.split for r in cohort.with_splits(shares, 2).rows} != first


def test_overrides_match_by_name_or_longer_ending_of_the_path(tmp_path: Path) -> None:
    table = tmp_path / "mpp.csv"
    table.write_text("file,mpp,source\na.svs,0.5,guess\nsite2/a.svs,0.25,\ngone.svs,1,\n")
    overrides = MppOverrides.read(table)
    assert overrides.find("/data/site1/a.svs") == 0.5
    assert overrides.find("https://host/site2/a.svs?token=1") == 0.25
    assert overrides.find("/data/xa.svs") is None
    assert overrides.unmatched == ["gone.svs"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file,mpp\na,9", "line 2: 9 µm/px is outside 0.05 to 8"),
        ("file,mpp\na,0.01", "line 2: 0.01 µm/px is outside"),
        ("file,mpp\na,nan", "line 2: nan µm/px is outside"),
        ("file,mpp\na,0,5", "line 2: 0 µm/px"),
        ("file,mpp\na,0.5\na,0.6", "a has two values, 0.5 and 0.6 µm/px"),
        ("file,mpp_x,mpp_y\na,0.5,", "line 2: mpp_x and mpp_y go together"),
        ("file,mpp_x,mpp_y\na,0.5,9", "line 2: 9 µm/px is outside"),
        ("file,mpp\na,", "line 2: no µm/px for a"),
        ("file,um\na,0.5", r"no column 'mpp' \(nor 'mpp_x' and 'mpp_y'\); found: file, um"),
    ],
)
def test_an_absurd_override_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    table = tmp_path / "mpp.csv"
    table.write_text(text)
    with pytest.raises(PathfmError, match=says):
        MppOverrides.read(table)


def test_overrides_may_differ_by_axis(tmp_path: Path) -> None:
    table = tmp_path / "mpp.csv"
    table.write_text("file,mpp,mpp_x,mpp_y\na.svs,,0.5,0.25\nb.svs,0.5,,\nc.svs,,0.4,0.4\n")
    overrides = MppOverrides.read(table)
    assert [overrides.find(f"/x/{name}.svs") for name in "abc"] == [(0.5, 0.25), 0.5, 0.4]


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    write_csv(tmp_path / "c.csv", ("uri", "label"), [("/x/a,b.svs", 'say "tumour"')])
    (row,) = read_cohort(tmp_path / "c.csv").rows
    assert (row.uri, row.label) == ("/x/a,b.svs", 'say "tumour"')
