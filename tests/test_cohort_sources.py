"""What people name becomes slides: folders, globs, buckets, tables, manifests."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from online_patching.errors import PatchingError
from online_patching.stores import Listed, Stores
from pathfm.cohorts import Cohort, CohortOptions, CohortRow, find_cohort, read_cohort
from pathfm.cohorts.listing import slides_among
from pathfm.runtime import PathfmError

SERIES = [f"6079cc3b-4b0f-41ec-bdbb-c6e754e8822{n}" for n in range(3)]


def uris(cohort: Cohort) -> list[str]:
    return [row.uri for row in cohort.rows]


@pytest.fixture
def bucket() -> Iterator[fsspec.AbstractFileSystem]:
    """An object store in memory, `memory://`, which lists and reads as a bucket does."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    for name in (
        "site1/a.svs",
        "site1/b.ndpi",
        "site2/c.svs",
        "site2/deep/d.svs",
        "site2/notes.txt",
    ):
        store.pipe(f"/study/{name}", b"x")
    for name in (".zgroup", "0/.zarray", "0/0/0"):
        store.pipe(f"/study/z.zarr/{name}", b"{}")
    for name in ("zarr.json", "0/zarr.json", "0/c/0/0"):
        store.pipe(f"/study/plain/{name}", b"{}")
    for series in SERIES[:2]:
        store.pipe(f"/study/{series}/1.dcm", b"x")
        store.pipe(f"/study/{series}/2.dcm", b"x")
    yield store
    store.store.clear()


def test_a_prefix_gives_files_series_and_stores_and_nothing_else(bucket: object) -> None:
    assert uris(find_cohort(["memory://study/"])) == [
        f"memory://study/{SERIES[0]}/",
        f"memory://study/{SERIES[1]}/",
        "memory://study/plain",
        "memory://study/site1/a.svs",
        "memory://study/site1/b.ndpi",
        "memory://study/site2/c.svs",
        "memory://study/site2/deep/d.svs",
        "memory://study/z.zarr",
    ]


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("memory://study/*/*.svs", ["site1/a.svs", "site2/c.svs"]),
        ("memory://study/**/*.svs", ["site1/a.svs", "site2/c.svs", "site2/deep/d.svs"]),
        ("memory://study/site?/[ab].*", ["site1/a.svs", "site1/b.ndpi"]),
        ("memory://study/site1/[!a].*", ["site1/b.ndpi"]),
        ("memory://study/6079*", [f"{SERIES[0]}/", f"{SERIES[1]}/"]),
        ("memory://study/*.zarr", ["z.zarr"]),
    ],
)
def test_wildcards_stay_within_a_folder_unless_doubled(
    bucket: object, glob: str, found: list[str]
) -> None:
    assert uris(find_cohort([glob])) == [f"memory://study/{name}" for name in found]


@pytest.mark.parametrize("bucket_name", ["plain", "my.bucket", "slides.svs"])
def test_a_bucket_is_listed_whatever_its_name(bucket_name: str) -> None:
    class OneSlide:
        def list(self, prefix: str) -> list[Listed]:
            return [Listed(f"{prefix}/a.svs", 1, "t")]

    source = f"s3://{bucket_name}"
    assert uris(find_cohort([source], stores=cast(Stores, OneSlide()))) == [f"{source}/a.svs"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("memory://study/*.tiff", "nothing there matches"),
        ("memory://nowhere/", "nothing below"),
        ("https://host/folder/", None),
        ("/no/such/*.svs", "there is no such file or folder"),
    ],
)
def test_where_nothing_is_found_it_is_said(bucket: object, source: str, says: str | None) -> None:
    if says is None:  # http(s) cannot be listed: the URL is the slide, and will be asked for
        assert uris(find_cohort([source])) == [source]
        return
    with pytest.raises((PathfmError, PatchingError), match=says):
        find_cohort([source])


@given(st.lists(st.text("ab/.", min_size=1, max_size=12), max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_listing_gives_slides_that_hold_every_object_at_most_once(names: list[str]) -> None:
    names = sorted({f"s3://b/{name}" for name in names})
    found = slides_among(Listed(name, 1, "") for name in names)
    assert found == sorted(set(found))
    for name in names:
        holders = [s for s in found if name == s or name.startswith(s.rstrip("/") + "/")]
        assert len([s for s in holders if s.endswith(".zarr")]) <= 1


def test_a_source_named_twice_counts_once_and_order_is_kept(tmp_path: Path) -> None:
    for name in ("b.svs", "a.svs"):
        (tmp_path / name).write_bytes(b"x")
    cohort = find_cohort([str(tmp_path / "b.svs"), str(tmp_path), str(tmp_path / "*.svs")])
    assert [Path(uri).name for uri in uris(cohort)] == ["b.svs", "a.svs"]


# --- tables ---------------------------------------------------------------------------------------


TABLE = {
    "s3_path": ["s3://b/1.svs", "s3://b/2.svs"],
    "subject": ["p1", "p2"],
    "block": [7, 8],
    "staining": ["HE", "CD3"],
    "hospital": ["A", None],
    "diagnosis": ["x", "y"],
    "mpp_x": [0.5, float("nan")],
    "mpp_y": [0.25, float("nan")],
}
ROWS = (
    CohortRow("s3://b/1.svs", "p1", "A", "x", mpp=(0.5, 0.25), case="7", stain="HE"),
    CohortRow("s3://b/2.svs", "p2", "", "y", case="8", stain="CD3"),
)
CHOSEN = CohortOptions(columns=("uri=S3_Path",))


def parquet(**columns: list[object]) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.table(TABLE | columns), data)
    return data.getvalue()


def csv_text(delimiter: str) -> bytes:
    cells = zip(*TABLE.values(), strict=True)
    lines = [TABLE, *(["" if v is None or v != v else v for v in row] for row in cells)]
    return "\n".join(delimiter.join(map(str, line)) for line in lines).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [("t.csv", csv_text(",")), ("t.tsv", csv_text("\t")), ("t.parquet", parquet(n=[[1], []]))],
)
def test_a_table_says_the_same_as_csv_tsv_and_parquet_here_and_in_a_bucket(
    bucket: fsspec.AbstractFileSystem, tmp_path: Path, name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    bucket.pipe(f"/tables/{name}", data)
    assert find_cohort([str(tmp_path / name)], CHOSEN).rows == ROWS
    assert find_cohort([f"memory://tables/{name}"], CHOSEN).rows == ROWS


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("uri,x\na.svs,1\n")
    with pytest.raises(
        PathfmError, match=r"line 2: no column 'sorte' \(for label\); found: uri, x"
    ):
        find_cohort([str(tmp_path / "t.csv")], CohortOptions(columns=("label=sorte",)))


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_a_table_that_is_none_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1\xff\xfe" + bytes(100))
    with pytest.raises(PathfmError, match=r"not a readable Parquet|not a UTF-8"):
        find_cohort([str(tmp_path / name)])


def test_relative_paths_of_a_remote_table_stay_below_it(bucket: fsspec.AbstractFileSystem) -> None:
    bucket.pipe("/study/t.csv", b"uri\nsite1/a.svs\n")
    assert uris(find_cohort(["memory://study/t.csv"])) == ["memory://study/site1/a.svs"]
    for cell in (b"../other/a.svs", b"/etc/passwd", b"a/../../b"):
        bucket.pipe("/study/t.csv", b"uri\n" + cell + b"\n")
        with pytest.raises(PathfmError, match="leads out of the table's own folder"):
            find_cohort(["memory://study/t.csv"])


def test_the_idc_s_series_urls_in_a_column_are_series(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"PatientID,series_aws_url\nP,s3://idc-open-data/{SERIES[0]}/*\n")
    (row,) = find_cohort([str(table)]).rows
    assert (row.uri, row.patient) == (f"s3://idc-open-data/{SERIES[0]}/", "P")


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_no_bytes_of_a_table_end_in_another_error(data: bytes) -> None:
    store = fsspec.filesystem("memory")
    with contextlib.closing(Stores()) as stores:
        for name, head in (("t.csv", b"uri,mpp\n"), ("t.tsv", b""), ("t.parquet", b"PAR1")):
            store.pipe(f"/fuzz/{name}", head + data)
            with contextlib.suppress(PathfmError, PatchingError):
                find_cohort([f"memory://fuzz/{name}"], stores=stores)


@given(st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_no_damage_of_a_parquet_table_ends_in_another_error(at: int, value: int) -> None:
    data = bytearray(parquet())
    data[at % len(data)] = value
    store = fsspec.filesystem("memory")
    store.pipe("/fuzz/p.parquet", bytes(data))
    with contextlib.suppress(PathfmError, PatchingError):
        find_cohort(["memory://fuzz/p.parquet"], CHOSEN)


# --- an IDC manifest ------------------------------------------------------------------------------


def test_an_s5cmd_manifest_names_each_series_once(tmp_path: Path) -> None:
    manifest = tmp_path / "m.s5cmd"
    manifest.write_text(
        "# To download the files in this manifest, first install s5cmd\n"
        "# s5cmd --no-sign-request --endpoint-url https://s3.amazonaws.com run m.s5cmd\n\n"
        f"cp s3://idc-open-data/{SERIES[0]}/* .\n"
        f"cp --show-progress 's3://idc-open-data/{SERIES[1]}/*' ./there/\n"
        f"cp s3://idc-open-data/{SERIES[2]}/a.dcm .\ncp s3://idc-open-data/{SERIES[2]}/b.dcm .\n"
    )
    assert uris(find_cohort([str(manifest)])) == [f"s3://idc-open-data/{s}/" for s in SERIES]


def test_a_manifest_for_google_s_endpoint_means_gs(tmp_path: Path) -> None:
    manifest = tmp_path / "m.txt"
    manifest.write_text(
        "# s5cmd --no-sign-request --endpoint-url https://storage.googleapis.com run m.txt\n"
        f"cp s3://public-datasets-idc/{SERIES[0]}/* .\n"
    )
    assert uris(find_cohort([str(manifest)])) == [f"gs://public-datasets-idc/{SERIES[0]}/"]


@pytest.mark.parametrize("line", ["cp s3://b/lonely.dcm .", "rm s3://b/s/*", "cp /etc/passwd ."])
def test_a_line_that_names_no_series_is_refused(tmp_path: Path, line: str) -> None:
    manifest = tmp_path / "m.txt"
    manifest.write_text(f"cp s3://b/{SERIES[0]}/* .\n{line}\n")
    with pytest.raises(PathfmError, match="line 2: not `cp s3://bucket/series"):
        find_cohort([str(manifest)])


# --- names ----------------------------------------------------------------------------------------


def named(*names: str, **options: object) -> Cohort:
    store = fsspec.filesystem("memory")
    store.pipe("/n/t.csv", ("uri\n" + "\n".join(names)).encode())
    return find_cohort(["memory://n/t.csv"], CohortOptions(**options))


def test_a_pattern_gives_case_and_stain_and_tells_what_it_misses() -> None:
    cohort = named(
        "x/B7_HE.svs", "x/B7_PAS.svs", "x/odd.svs", case_pattern=r"(?P<case>B\d+)_(?P<stain>[A-Z]+)"
    )
    assert [(row.case, row.stain) for row in cohort.rows] == [("B7", "HE"), ("B7", "PAS"), ("", "")]
    assert "the case pattern does not match 1 of 3 names" in cohort.notes
    assert "cases of which several stains are there: 1 (HE, PAS)" in cohort.notes


def test_nothing_is_guessed_without_a_rule() -> None:
    cohort = named("case7_HE.svs", "case7_IHC.svs")
    assert {(row.case, row.stain, row.patient) for row in cohort.rows} == {("", "", "")}
    assert cohort.notes == ()


def test_a_table_s_cell_goes_before_barcode_and_pattern(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("uri,patient,case\nTCGA-02-0001-01Z-00-DX1.svs,mine,\nTCGA-02-0001xx.svs,,c\n")
    options = CohortOptions(case_pattern="(?P<case>DX.)|(?P<patient>xx)")
    a, b = find_cohort([str(table)], options).rows
    assert (a.patient, a.case, a.site) == ("mine", "DX1", "")
    assert (b.patient, b.case) == ("xx", "c")  # 0001xx is no barcode


def test_include_and_exclude_choose_by_name_and_are_counted() -> None:
    cohort = named("a-DX1.svs", "a-TS1.svs", "b-DX1.svs", include="-DX", exclude="^memory://n/b")
    assert [row.title for row in cohort.rows] == ["a-DX1.svs"]
    assert "2 of 3 slides are left out by include or exclude" in cohort.notes
    with pytest.raises(PathfmError, match="no slides found"):
        named("a.svs", exclude=".")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"case_pattern": "("}, "not a regular expression"),
        ({"case_pattern": "x"}, "wants named groups"),
        ({"case_pattern": "(?P<mood>x)"}, "no group 'mood'"),
        ({"columns": ("uri",)}, "'uri' is not role=column"),
        ({"columns": ("colour=x",)}, "'colour=x' is not role=column"),
        ({"gdc_endpoint": "ftp://x"}, "should be a URL"),
        ({"gdc_endpoint": "https://user@x/data"}, "should be a URL"),
    ],
)
def test_an_option_that_means_nothing_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        CohortOptions(**options)


# --- what stays together --------------------------------------------------------------------------


def test_cases_and_twins_stay_on_one_side_of_a_split(tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    lines = ["slide_id,uri,patient,case,twin_of"]
    for n in range(40):  # pairs of one case; slide 4k+2 shows the image of slide 4k, another case's
        twin = f"s{n - 2}" if n % 4 == 2 else ""
        lines.append(f"s{n},s3://b/s{n}.svs,,case{n // 2},{twin}")
    table.write_text("\n".join(lines))
    cohort = read_cohort(table)
    for seed in range(5):
        side = {
            row.name: row.split
            for row in cohort.with_splits({"train": 0.5, "test": 0.5}, seed).rows
        }
        assert set(side.values()) == {"train", "test"}
        for first in range(0, 40, 4):
            assert len({side[f"s{first + k}"] for k in range(4)}) == 1


def test_a_split_that_tears_twins_apart_is_refused_without_naming_anybody(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("uri,slide_id,patient,split,twin_of\na,a,DOE,train,\nb,b,ROE,test,a\n")
    with pytest.raises(PathfmError, match="one patient, case or image") as caught:
        read_cohort(table)
    assert "DOE" not in str(caught.value)
    assert "ROE" not in str(caught.value)
