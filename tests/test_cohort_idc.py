"""A bucket laid out as the Imaging Data Commons lays out its own: a folder of instances a series."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from online_patching import ForegroundMask, PatchLoader, PatchSampler, open_slide
from online_patching.errors import NotASlideError
from online_patching.stores import Stores
from pathfm.cli import main
from pathfm.cohorts import CohortOptions, find_cohort, index_row, read_cohort
from pathfm.cohorts.patients import patient_id
from pathfm.runtime import PathfmError
from tests.archives import idc_bucket, not_a_slide, with_patient

WSI = Path(__file__).parent.parent / "../shared/data/wsi"
FOLDERS = ("vendor/wsic_dicom_CMU-1-Small-Region", "converted/gallery-06_oral_scc_dicom")
SERIES = [str(uuid.uuid5(uuid.NAMESPACE_URL, name)) for name in (*FOLDERS, "ct")]

pytestmark = pytest.mark.skipif(
    not all((WSI / name).is_dir() for name in FOLDERS), reason="no real DICOM slides here"
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two real series, one of them of a patient, and a CT; the URI of their bucket."""
    objects = {f"{SERIES[2]}/{uuid.uuid4()}.dcm": not_a_slide("PLANTED-CT")}
    for folder, series in zip(FOLDERS, SERIES, strict=False):
        for path in sorted((WSI / folder).glob("*.dcm")):
            data = path.read_bytes()
            if folder.startswith("converted"):
                data = with_patient(data, "PLANTED^JANE", "PLANTED-4711")
            objects[f"{series}/{uuid.uuid5(uuid.NAMESPACE_URL, path.name)}.dcm"] = data
    with (
        idc_bucket(tmp_path_factory.mktemp("s3"), objects) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield "s3://idc-open-data"


def test_a_prefix_and_a_manifest_give_the_same_series(archive: str, tmp_path: Path) -> None:
    manifest = tmp_path / "m.s5cmd"
    manifest.write_text("".join(f"cp {archive}/{series}/* .\n" for series in sorted(SERIES)))
    by_prefix = find_cohort([f"{archive}/"]).rows
    assert [row.uri for row in by_prefix] == [f"{archive}/{series}/" for series in sorted(SERIES)]
    assert find_cohort([str(manifest)]).rows == by_prefix


def test_pixels_from_the_bucket_are_those_of_the_folder(archive: str) -> None:
    with contextlib.closing(Stores()) as stores:
        for folder, series in zip(FOLDERS, SERIES, strict=False):
            (row,) = find_cohort([f"{archive}/{series}/"], stores=stores).rows
            index, _ = index_row(row, None, stores)
            assert (index.slide_id, index.container) == (series, "dicom")
            x_um, y_um = (side_px * index.mpp / 2 for side_px in index.dimensions)
            with open_slide(index) as far, open_slide(str(WSI / folder)) as near:
                assert far.dimensions == near.dimensions
                patch = {"x_um": x_um, "y_um": y_um, "mpp": 4 * index.mpp, "size_px": 80}
                np.testing.assert_array_equal(far.read_patch(**patch), near.read_patch(**patch))


def test_other_modalities_are_refused_with_a_code(archive: str) -> None:
    with contextlib.closing(Stores()) as stores:
        (row,) = find_cohort([f"{archive}/{SERIES[2]}/"], stores=stores).rows
        with pytest.raises(NotASlideError, match="no whole-slide image"):
            index_row(row, None, stores)


def test_a_bucket_is_indexed_and_patients_are_salted_ids(
    archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATHFM_SALT", "a salt that only this test knows")
    corpus = tmp_path / "corpus"
    assert main(["index", f"{archive}/", "--out", str(corpus), "--threads", "2"]) == 0
    told = {row.name: row.patient for row in read_cohort(corpus / "slides.parquet").rows}
    # openssl: printf 'patient\0PLANTED-4711' | openssl dgst -sha256 -hmac 'a salt that only this test knows'
    assert told == {SERIES[0]: "", SERIES[1]: "pa34284c423cba8eb38f4"}
    assert "not_a_slide" in (corpus / "skipped.csv").read_text()
    assert "PLANTED" not in "".join(capfd.readouterr())
    for path in corpus.rglob("*"):
        assert path.is_dir() or b"PLANTED" not in path.read_bytes()


@pytest.mark.parametrize("killed", [False, True])
def test_with_another_salt_headers_are_asked_again_and_nothing_is_appended(
    archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    corpus, table = tmp_path / "corpus", tmp_path / "t.csv"
    table.write_text(f"uri,patient\n{archive}/{SERIES[0]}/,PLANTED-4711\n{archive}/{SERIES[1]}/,\n")
    salt = tmp_path / "salt"

    def patients(*more: str) -> set[str]:
        words = ["index", str(table), "--out", str(corpus), "--cohort.salt_file", str(salt)]
        assert main([*words, "--cohort.fingerprints", "false", *more]) == 0
        return {row.patient for row in read_cohort(corpus / "slides.parquet").rows}

    salt.write_text("the first salt of two")
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr("pathfm.index.finishing.finish", _dies)
            with pytest.raises(AssertionError):
                patients()
    else:
        (first,) = patients()
    salt.write_text("the second salt of two")
    if not killed:
        before = (corpus / "index.journal").read_bytes()
        with pytest.raises(AssertionError):
            patients("--append", "true")
        assert (corpus / "index.journal").read_bytes() == before
    (second,) = patients()  # both ways of naming the patient have the new id
    assert killed or second != first
    assert patients("--append", "true") == {second}


def _dies(*_: object) -> None:
    raise PathfmError("killed")


def test_a_patient_is_the_same_whether_a_table_or_a_header_names_them(
    archive: str, tmp_path: Path
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"uri,patient\n{archive}/{SERIES[0]}/,PLANTED-4711\n{archive}/{SERIES[1]}/,\n")
    with contextlib.closing(Stores()) as stores:
        cohort = find_cohort([str(table)], CohortOptions(), stores, tmp_path / "corpus")
        rows = [index_row(row, None, stores, salt=cohort.salt)[1] for row in cohort.rows]
    assert rows[0].patient == rows[1].patient != ""


@pytest.mark.slow
def test_a_series_is_trained_on_without_downloading_it(archive: str, tmp_path: Path) -> None:
    """The very batches of the same files in a folder."""
    (tmp_path / SERIES[1]).symlink_to((WSI / FOLDERS[1]).resolve())
    batches = []
    with contextlib.closing(Stores()) as stores:
        for source in (f"{archive}/{SERIES[1]}/", str(tmp_path / SERIES[1])):
            (row,) = find_cohort([source], stores=stores).rows
            index, _ = index_row(row, None, stores)
            masks = [ForegroundMask.everything(index)]
            sampler = PatchSampler([index], masks, size_px=64, mpp=[3.0, 6.0], seed=7)
            with PatchLoader(sampler, batch_size=4) as loader:
                batches.append(np.stack([batch.pixels for batch in islice(loader, 2)]))
    np.testing.assert_array_equal(*batches)


# --- the header's PatientID -----------------------------------------------------------------------


def instance() -> bytes:
    return next((WSI / FOLDERS[1]).glob("*.dcm")).read_bytes()[: 256 * 2**10]


def test_a_patient_id_is_found_past_sequences_of_unknown_length() -> None:
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + b"\x10\x00\x20\x00LO\x04\x00evil"
    ends = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    sequence = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + item + ends
    data = with_patient(instance(), "A^B", "PATIENT-1")
    at = data.index(b"\x10\x00\x10\x00PN")
    assert patient_id(data) == patient_id(data[:at] + sequence + data[at:]) == "PATIENT-1"


def test_a_header_that_says_nothing_or_nonsense_names_nobody() -> None:
    data = with_patient(instance(), "A^B", "PATIENT-1")
    assert patient_id(b"") == patient_id(bytes(200)) == patient_id(instance()) == ""
    at = data.index(b"\x10\x00\x20\x00LO")
    for stop in (*range(0, 400, 7), at + 4, at + 8, at + 12):
        assert patient_id(data[:stop]) == ""
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data[:4096])
        broken[int(rng.integers(128, 4096))] = int(rng.integers(256))
        patient_id(bytes(broken))
