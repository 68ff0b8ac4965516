"""A GDC manifest is a cohort: slides are read by ranges from a server that answers as the GDC does."""

import contextlib
import json
import os
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from online_patching import ForegroundMask, PatchLoader, PatchSampler, SlideIndex, open_slide
from online_patching.errors import ObjectChangedError, PatchingError, StoreError
from online_patching.stores import Stores
from online_patching.stores.http_headers import ENVIRONMENT, forget
from online_patching.testing import SyntheticSlide, write_tiff
from pathfm.cli import main
from pathfm.cohorts import CohortOptions, find_cohort, index_row
from pathfm.runtime import PathfmError
from tests.archives import GdcServer, gdc_manifest

IDS = [f"{n:08x}-0000-4000-8000-{n:012x}" for n in range(1, 5)]
NAMES = (
    "TCGA-02-0001-01Z-00-DX1.83fce43e-42ac-4dcd-b156-2908e75f2e47.svs",
    "TCGA-02-0001-01A-01-TS1.5a2d1fdf-0a5f-4b3b-9b0a-7a5cd2f4a4e1.svs",
    "TCGA-A8-A06R-01Z-00-DX1.svs",
)


@pytest.fixture(autouse=True)
def _no_headers_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    yield
    os.environ.pop(ENVIRONMENT, None)
    forget()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gdc")
    for number, name in enumerate(NAMES):
        write_tiff(folder / name, SyntheticSlide(number, 900 + 64 * number, 700))
    return {number: folder / name for number, name in zip(IDS, NAMES, strict=False)}


def options(server: GdcServer, **more: object) -> CohortOptions:
    return CohortOptions(gdc_endpoint=server.endpoint, **more)


def test_a_manifest_s_slides_carry_name_size_patient_and_site(
    files: dict[str, Path], tmp_path: Path
) -> None:
    manifest = gdc_manifest(tmp_path / "gdc_manifest.txt", files)
    with manifest.open("a") as text:
        text.write(f"{IDS[3]}\treads.bam\t{'a' * 32}\t99\treleased\n\n")
    cohort = find_cohort([str(manifest)])
    assert [row.title for row in cohort.rows] == list(NAMES)
    assert cohort.rows[0].uri == f"https://api.gdc.cancer.gov/data/{IDS[0]}"
    assert [row.size_bytes for row in cohort.rows] == [f.stat().st_size for f in files.values()]
    assert [row.patient for row in cohort.rows] == ["TCGA-02-0001", "TCGA-02-0001", "TCGA-A8-A06R"]
    assert [row.site for row in cohort.rows] == ["02", "02", "A8"]
    assert all(re.fullmatch("md5:[0-9a-f]{32}", row.content) for row in cohort.rows)
    (skipped,) = cohort.skipped
    assert (skipped.code, "reads.bam" in skipped.reason) == ("not_a_slide", True)
    assert any("TCGA barcodes" in note for note in cohort.notes)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("../../etc/passwd\ta.svs\t\t9\treleased", "line 2: '../../etc/passwd' is no file id"),
        (f"{IDS[0]}\ta.svs\t\tmany\treleased", "line 2: 'many' is no size in bytes"),
        (f"{IDS[0]}\t{'a' * 200_000}.svs\t\t9\treleased", "line 2: not a manifest: field larger"),
    ],
    ids=["id", "size", "length"],
)
def test_a_bad_line_of_a_manifest_is_refused(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "m.tsv"
    path.write_text(f"id\tfilename\tmd5\tsize\tstate\n{line}\n")
    with pytest.raises(PathfmError, match=says):
        find_cohort([str(path)])


@pytest.mark.parametrize("etag_every", [0, 1, 2, 3])
@pytest.mark.parametrize("redirect", [None, ""])
def test_slides_are_indexed_and_read_by_ranges_whatever_etags_and_redirects_come(
    files: dict[str, Path], tmp_path: Path, etag_every: int, redirect: str | None
) -> None:
    manifest = gdc_manifest(tmp_path / "m.txt", files)
    with GdcServer(files, etag_every=etag_every, redirect=redirect) as server:
        row = find_cohort([str(manifest)], options(server)).rows[0]
        stores = Stores()
        index, _ = index_row(row, None, stores)
        assert (index.slide_id, index.token) == (NAMES[0].removesuffix(".svs"), "")
        with open_slide(index) as far, open_slide(str(files[IDS[0]])) as near:
            patch = {"x_um": 31.0, "y_um": 20.0, "mpp": 0.5, "size_px": 96}
            np.testing.assert_array_equal(far.read_patch(**patch), near.read_patch(**patch))
        stores.close()
        assert server.ranges
        assert all("Range" in head and "If-Match" not in head for _, head in server.seen)


def test_another_size_than_the_manifest_s_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    manifest = gdc_manifest(tmp_path / "m.txt", files, {IDS[1]: 12_345})
    with GdcServer(files) as server, contextlib.closing(Stores()) as stores:
        rows = find_cohort([str(manifest)], options(server)).rows
        index_row(rows[0], None, stores)
        size = files[IDS[1]].stat().st_size
        with pytest.raises(ObjectChangedError, match=f"has {size:,} bytes .* says 12,345"):
            index_row(rows[1], None, stores)


def test_a_token_opens_controlled_slides_and_is_written_and_told_nowhere(
    files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = gdc_manifest(tmp_path / "m.txt", files)
    token = tmp_path / "token.txt"
    token.write_text("S3CRET-gdc-token\n")
    corpus = tmp_path / "corpus"
    words = ["index", str(manifest), "--out", str(corpus), "--threads", "2"]
    with GdcServer(files, controlled={IDS[1]: "S3CRET-gdc-token"}) as server:
        words += ["--cohort.gdc_endpoint", server.endpoint]
        assert main(words) == 0
        assert "access refused" in (corpus / "skipped.csv").read_text()
        assert main([*words, "--cohort.gdc_token_file", str(token)]) == 0
        assert len((corpus / "slides.csv").read_text().splitlines()) == 1 + len(files)
        index = SlideIndex.load(corpus / "slides" / f"{NAMES[1].removesuffix('.svs')}.index")
        with open_slide(index) as slide:  # later, by whoever has the environment
            assert slide.read_patch(x_um=1.0, y_um=1.0, mpp=0.5, size_px=32).std() > 0
    said = "".join(capfd.readouterr())
    written = [path.read_bytes() for path in corpus.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not any(b"S3CRET" in data for data in written)
    assert "S3CRET" not in said


def test_a_token_is_not_sent_to_where_the_endpoint_redirects(
    files: dict[str, Path], tmp_path: Path
) -> None:
    token = tmp_path / "token.txt"
    token.write_text("S3CRET")
    manifest = gdc_manifest(tmp_path / "m.txt", files)
    with (
        GdcServer(files) as elsewhere,
        GdcServer(files, redirect=elsewhere.origin) as server,
        contextlib.closing(Stores()) as stores,
    ):
        rows = find_cohort([str(manifest)], options(server, gdc_token_file=token)).rows
        index_row(rows[0], None, stores)
        assert all(head.get("X-Auth-Token") == "S3CRET" for _, head in server.seen)
        assert elsewhere.seen
        assert not any("X-Auth-Token" in head for _, head in elsewhere.seen)


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "cannot be read"), ("", "one line of plain"), ("a\r\nHost: evil", "one line of plain")],
)
def test_a_token_file_that_holds_none_is_told_without_its_content(
    files: dict[str, Path], tmp_path: Path, text: str | None, says: str
) -> None:
    token = tmp_path / "token.txt"
    if text is not None:
        token.write_text(text)
    manifest = gdc_manifest(tmp_path / "m.txt", files)
    with pytest.raises((PathfmError, PatchingError), match=says) as caught:
        find_cohort([str(manifest)], CohortOptions(gdc_token_file=token))
    assert "evil" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{", '{"x": 1}', '{"nowhere": {"A": "b"}}', "[" * 9999])
def test_headers_that_the_environment_spells_wrong_are_told(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(ENVIRONMENT, text)
    forget()
    with contextlib.closing(Stores()) as stores, pytest.raises(StoreError, match=ENVIRONMENT):
        stores.version("http://127.0.0.1:9/data/x")


def test_a_header_of_ours_cannot_be_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "v").write_text("bytes=0-0")
    told = {"http://127.0.0.1:9": {"Range": str(tmp_path / "v")}}
    monkeypatch.setenv(ENVIRONMENT, json.dumps(told))
    forget()
    with contextlib.closing(Stores()) as stores, pytest.raises(StoreError, match="no header to"):
        stores.version("http://127.0.0.1:9/data/x")


def test_a_manifest_is_trained_on_without_downloading_it(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """The very batches of the downloaded files, by ranges alone."""
    manifest = gdc_manifest(tmp_path / "m.txt", files)
    batches = []
    with GdcServer(files, etag_every=3) as server, contextlib.closing(Stores()) as stores:
        for source in (str(manifest), str(files[IDS[0]].parent)):
            rows = sorted(find_cohort([source], options(server)).rows, key=lambda row: row.title)
            indexes = [index_row(row, None, stores)[0] for row in rows]
            masks = [ForegroundMask.everything(index) for index in indexes]
            sampler = PatchSampler(indexes, masks, size_px=64, mpp=[0.5, 1.0], seed=7)
            server.ranges.clear()
            with PatchLoader(sampler, batch_size=8) as loader:
                batches.append(np.stack([batch.pixels for batch in islice(loader, 3)]))
            assert bool(server.ranges) == (source == str(manifest))
        assert all("Range" in head for _, head in server.seen)
    np.testing.assert_array_equal(*batches)
