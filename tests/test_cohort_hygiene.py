"""What must not get into training, or out of the house: fluorescence, twins, labels, names."""

from __future__ import annotations

import base64
import contextlib
import csv
import errno
import hashlib
import hmac
import logging
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import yaml

from online_patching import open_slide, read_slide_index
from online_patching.stores import Stores
from online_patching.testing import SyntheticSlide, write_ome_zarr, write_tiff
from pathfm import foreground, index
from pathfm.cli import main
from pathfm.cohorts import (
    CohortOptions,
    CohortRow,
    Salt,
    find_cohort,
    find_twins,
    fingerprint,
    read_cohort,
)
from pathfm.cohorts.twins import _coverage
from pathfm.index import IndexConfig
from pathfm.runtime import PathfmError, provenance
from pathfm.tracking import TrackingConfig, open_run
from tests.archives import with_patient
from tests.mlflow_store import new_store
from tests.servers import FaultServer

WSI = Path(__file__).parent.parent / "../shared/data/wsi"
SVS = WSI / "vendor/CMU-1-Small-Region.svs"
DICOM = WSI / "vendor/wsic_dicom_CMU-1-Small-Region"
JP2 = WSI / "vendor/wsic_CMU-1-Small-Region.jp2.tiff"

real = pytest.mark.skipif(not SVS.exists(), reason="no real slides here")


def rows(corpus: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((corpus / name).read_text().splitlines()))


# --- what is refused ------------------------------------------------------------------------------


@real
def test_fluorescence_and_multiplex_are_skipped_with_their_codes(tmp_path: Path) -> None:
    names = ["ndpi_test3-DAPI-2-387.ndpi", "pathml_small_vectra.qptiff", SVS.name]
    sources = tuple(str(WSI / "vendor" / name) for name in names)
    index.run(IndexConfig(slides=sources, out=tmp_path / "c"))
    codes = {Path(row["uri"]).name: row["code"] for row in rows(tmp_path / "c", "skipped.csv")}
    assert codes == {names[0]: "fluorescence", names[1]: "multiplex"}
    assert [row["slide_id"] for row in rows(tmp_path / "c", "slides.csv")] == [SVS.stem]


# --- several stains of one case -------------------------------------------------------------------


@real
@pytest.mark.parametrize("by", ["pattern", "table"])
def test_the_stains_of_a_case_are_one_group_by_a_rule(
    tmp_path: Path, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((WSI / "converted").glob("hpylori_stomach_*"))
    stains = ["HE", "IHC", "giemsa", "warthinstarry"]
    assert len(files) == 4
    words = ["index", "--out", str(tmp_path / "c"), "--mpp_overrides", str(WSI / "mpp.csv")]
    if by == "pattern":
        pattern = r"(?P<case>[a-z]+_[a-z]+)_(?P<stain>[A-Za-z]+)_"
        words += ["--cohort.case_pattern", pattern, "--slides", *map(str, files)]
    else:
        table = tmp_path / "cohort.csv"
        cells = [f"{f},hpylori_stomach,{s}" for f, s in zip(files, stains, strict=True)]
        table.write_text("\n".join(["uri,case,stain", *cells]))
        words += ["--slides", str(table)]
    assert main(words) == 0
    told = rows(tmp_path / "c", "slides.csv")
    assert sorted(row["stain"] for row in told) == stains
    assert len({row["case"] for row in told}) == 1
    assert "several stains are there: 1 (HE, IHC, giemsa, warthinstarry)" in capsys.readouterr().out
    cohort = read_cohort(tmp_path / "c" / "slides.parquet")
    for seed in range(8):
        divided = cohort.with_splits({"train": 0.5, "test": 0.5}, seed)
        assert len({row.split for row in divided.rows}) == 1


# --- the same image in several files --------------------------------------------------------------


@real
def test_one_region_as_svs_jpeg2000_and_dicom_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mpp.csv").write_text(f"file,mpp\n{JP2.name},0.499\n")
    others = [WSI / "converted/metastatic_sarcoma_liver_HE_crop4096.svs"]
    sources = tuple(map(str, [SVS, JP2, DICOM, *others]))
    overrides = tmp_path / "mpp.csv"
    overrides.write_text(overrides.read_text() + f"{others[0].name},0.7\n")
    index.run(IndexConfig(slides=sources, out=tmp_path / "c", mpp_overrides=overrides))
    told = {row["slide_id"]: row["twin_of"] for row in rows(tmp_path / "c", "slides.csv")}
    twins = {JP2.name.removesuffix(".tiff"), DICOM.name}
    assert {slide_id for slide_id, first in told.items() if first == SVS.stem} == twins
    assert told[SVS.stem] == told[others[0].stem] == ""
    assert "column twin_of" in capsys.readouterr().out


def prints_of(folder: Path) -> dict[str, tuple[tuple[int, int], str]]:
    with contextlib.closing(Stores()) as stores:
        found = {}
        for path in sorted(folder.iterdir()):
            read = read_slide_index(str(path), mpp=0.5, stores=stores)
            found[path.name] = (read.dimensions, fingerprint(read, stores))
    return found


def test_a_fingerprint_does_not_hang_on_codec_tiling_or_pyramid(tmp_path: Path) -> None:
    drawn = SyntheticSlide(5, 2300, 1700)
    write_tiff(tmp_path / "a.svs", drawn)
    write_ome_zarr(tmp_path / "b.zarr", drawn)
    with open_slide(str(tmp_path / "a.svs")) as slide:
        pixels = slide.read_region((0, 0), 0, slide.dimensions)
    for name, image in (("c", pixels), ("turned", pixels[::-1]), ("mirrored", pixels[:, ::-1])):
        for quality, tile in ((60, 512), (92, 128)):
            tifffile.imwrite(
                tmp_path / f"{name}{quality}.tif",
                image,
                tile=(tile, tile),
                compression="jpeg",
                compressionargs={"level": quality},
                photometric="rgb",
            )
    found = prints_of(tmp_path)
    assert {len(text) for _, text in found.values()} == {344}
    twins = find_twins((name, size, text) for name, (size, text) in found.items())
    assert twins == {
        "b.zarr": "a.svs",
        "c60.tif": "a.svs",
        "c92.tif": "a.svs",
        "mirrored92.tif": "mirrored60.tif",
        "turned92.tif": "turned60.tif",
    }


def test_a_fingerprint_is_the_mean_luma_of_256_parts(tmp_path: Path) -> None:
    """Oracle: block means in float64 of a picture whose sides 16 divides."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(30, 226, (16, 16, 3), dtype=np.uint8)
    pixels = coarse.repeat(40, axis=0).repeat(64, axis=1)
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, tile=(256, 256), photometric="rgb", compression="zlib"
    )
    ((_, text),) = prints_of(tmp_path).values()
    luma = coarse.astype(float) @ [0.299, 0.587, 0.114]
    got = np.frombuffer(base64.b64decode(text), np.uint8).reshape(16, 16)
    np.testing.assert_allclose(got, luma, atol=0.51)


def test_the_parts_share_out_every_pixel_and_the_last_one_is_cut() -> None:
    """By hand: 20 px decoded at 1/8 are pixels of 8, 8 and 4 px, in 16 parts of 1.25 px."""
    shares = _coverage(20, 8)
    np.testing.assert_allclose(shares.sum(axis=0), [8, 8, 4])
    np.testing.assert_allclose(shares.sum(axis=1), np.full(16, 1.25))
    np.testing.assert_allclose(shares[6], [0.5, 0.75, 0])  # 7.5 to 8.75


def test_an_empty_slide_has_no_fingerprint_and_nonsense_is_no_twin(tmp_path: Path) -> None:
    glass = np.full((700, 900, 3), 240, np.uint8)
    tifffile.imwrite(tmp_path / "glass.tif", glass, tile=(256, 256), photometric="rgb")
    assert prints_of(tmp_path)["glass.tif"][1] == ""
    assert (
        find_twins([("a", (1, 1), ""), ("b", (1, 1), ""), ("c", (1, 1), "x"), ("d", (1, 1), "x")])
        == {}
    )


def test_twins_of_twins_are_followed_and_sizes_must_be_equal() -> None:
    base = np.tile(np.arange(0, 256, 8, dtype=np.uint8).clip(16, 232), 8)

    def text(shift: int) -> str:
        moved = base.astype(int)
        moved[::2] += shift  # as much brighter as the others are darker: the mean stays
        moved[1::2] -= shift
        return base64.b64encode(moved.clip(0, 255).astype(np.uint8).tobytes()).decode()

    chain = [(f"s{n}", (10, 20), text(2 * n)) for n in range(3)]  # ends differ by 4 RMS
    assert find_twins(chain) == {"s1": "s0", "s2": "s0"}
    assert find_twins([chain[0], chain[2]]) == {}
    assert find_twins([chain[0], ("other", (20, 10), chain[0][2])]) == {}
    many = [
        (f"c{n}", (1, 1), text(0)) for n in range(20_000)
    ]  # copies by the thousand are no trouble
    assert set(find_twins(many).values()) == {"c0"}


# --- label and macro ------------------------------------------------------------------------------


@real
def test_no_byte_of_a_label_or_macro_in_an_svs_is_ever_asked_for() -> None:
    with tifffile.TiffFile(SVS) as tiff:
        others = list(tiff.pages[1:])
        kept = [
            (start, start + count)
            for page in others
            for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]
        named = [page.description.splitlines()[-1].split()[0] for page in others]
    assert named[1:] == ["label", "macro"]
    with FaultServer(SVS.parent) as server, contextlib.closing(Stores()) as stores:
        read = read_slide_index(f"{server.url}/{SVS.name}", stores=stores)
        assert len(fingerprint(read, stores)) == 344
        with open_slide(read) as slide:
            assert slide.thumbnail(8.0).std() > 5
        touched = [
            (a, b) for _, a, b in server.ranges for start, stop in kept if a < stop and b > start
        ]
        assert len(server.ranges) > 10
    assert touched == []


@real
def test_no_pixel_of_a_label_or_overview_in_a_dicom_series_is_ever_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = {}
    for path in DICOM.glob("*.dcm"):
        data = path.read_bytes()
        at = data.index(b"\x08\x00\x08\x00CS") + 8
        kind = data[at : at + 40].decode("latin-1").split("\\")[2]
        kinds[path.name] = (kind, data.rindex(b"\xe0\x7f\x10\x00OB"))
    assert sorted(kind for kind, _ in kinds.values()) == ["LABEL", "OVERVIEW", "VOLUME"]
    reads: list[tuple[str, int, int]] = []
    with contextlib.closing(Stores()) as stores:
        true_read = stores.local.read

        def read(key: str, start: int, *rest: Any) -> bytes:
            data = true_read(key, start, *rest)
            reads.append((Path(key).name, start, start + len(data)))
            return data

        monkeypatch.setattr(stores.local, "read", read)
        found = read_slide_index(str(DICOM), stores=stores)
        assert len(fingerprint(found, stores)) == 344
    volume = [name for name, (kind, _) in kinds.items() if kind == "VOLUME"]
    assert any(name in volume for name, *_ in reads)
    asked = [r for r in reads if r[0] not in volume and r[2] > kinds[r[0]][1] + 12]
    assert asked == []


# --- salted ids -----------------------------------------------------------------------------------


def salt(tmp_path: Path, **options: object) -> Salt:
    return Salt(CohortOptions(**options), tmp_path / "corpus")


def test_an_id_is_an_hmac_that_anybody_with_the_salt_can_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATHFM_SALT", "0123456789abcdef")
    expected = hmac.new(b"0123456789abcdef", b"patient\0DOE", hashlib.sha256).hexdigest()[:20]
    assert salt(tmp_path).id("patient", "DOE") == f"p{expected}"
    assert salt(tmp_path).id("case", "DOE")[1:] != expected
    assert salt(tmp_path).id("patient", "") == ""


def test_a_salt_is_made_once_beside_the_corpus_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PATHFM_SALT", raising=False)
    first = salt(tmp_path).id("patient", "DOE")
    path = tmp_path / "corpus.salt"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch("[0-9a-f]{64}\n", path.read_text())
    assert salt(tmp_path).id("patient", "DOE") == first
    path.chmod(0o644)
    with pytest.raises(PathfmError, match="others may read this salt: chmod 600"):
        salt(tmp_path).id("patient", "DOE")
    path.unlink()
    assert salt(tmp_path).id("patient", "DOE") != first


def test_a_full_disk_leaves_no_half_of_a_salt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.delenv("PATHFM_SALT", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr("pathfm.cohorts.salting.os.fsync", full)
        with pytest.raises(PathfmError, match=r"cannot be written \(No space left on device\)"):
            salt(tmp_path).id("patient", "DOE")
    assert list(tmp_path.iterdir()) == []
    assert salt(tmp_path).id("patient", "DOE")


@pytest.mark.parametrize(
    ("text", "says"), [("short", "can be guessed"), (None, "cannot be read"), ("  \n", "of 0 ")]
)
def test_a_salt_that_is_none_is_told(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "salt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PathfmError, match=says) as caught:
        salt(tmp_path, salt_file=path).id("patient", "DOE")
    assert "DOE" not in str(caught.value)
    assert "short" not in str(caught.value)


def test_ids_stay_plain_when_asked_and_no_salt_is_made(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("uri,patient,case\na.svs,P,C\n")
    options = CohortOptions(ids="plain")
    (row,) = find_cohort([str(tmp_path / "t.csv")], options, beside=tmp_path / "corpus").rows
    assert (row.patient, row.case) == ("P", "C")
    assert not (tmp_path / "corpus.salt").exists()


def test_the_name_of_a_remote_slide_cannot_be_hidden(tmp_path: Path) -> None:
    with pytest.raises(PathfmError, match="the name of a remote slide cannot be hidden"):
        salt(tmp_path, salt_names=True).hide([CohortRow("s3://b/DOE.svs")])


# --- names that were planted ----------------------------------------------------------------------

PLANTED = "Planted-Doe"


def texts_under(*folders: Path) -> dict[Path, str]:
    """Every file as text, Parquet tables unpacked; links by their own names, not followed."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                found[path] = f"{path} {table.schema} {table.to_pylist()}"
            elif path.is_file():
                found[path] = f"{path} {path.read_bytes().decode('latin-1')}"
    return found


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    """Slides that name a patient in their own tags, in their names, and in a table beside them."""
    folder = tmp_path / "ward"
    folder.mkdir()
    svs = SVS.read_bytes()
    write_tiff(folder / f"{PLANTED}_HE.svs", SyntheticSlide(1, 900, 700))
    title = b"|Filename = CMU-1|"
    assert svs.count(title) >= 1
    named = f"|User={PLANTED}|".encode().ljust(len(title), b"|")
    (folder / f"{PLANTED}-2.svs").write_bytes(svs.replace(title, named))
    series = folder / f"{PLANTED}-series"
    series.mkdir()
    for number, path in enumerate(sorted(DICOM.glob("*.dcm"))):
        data = with_patient(path.read_bytes(), f"{PLANTED}^Jane", f"{PLANTED}-4711")
        (series / f"{number}.dcm").write_bytes(data)
    names = (f"{PLANTED}_HE.svs", f"{PLANTED}-2.svs", f"{PLANTED}-series", "gone.svs")
    cells = [f"{name},{PLANTED} Jane,{PLANTED}/S-1,{n}" for n, name in enumerate(names)]
    (folder / "cohort.csv").write_text("\n".join(["uri,patient,case,label", *cells]))
    return folder


@real
@pytest.mark.slow
def test_planted_names_are_in_no_file_and_no_log(
    ward: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    corpus = tmp_path / "corpus"
    bare = ward / f"{PLANTED}-bare.svs"  # named by itself, known to the override table alone
    write_tiff(bare, SyntheticSlide(2, 800, 900), with_mpp=False)
    (tmp_path / "mpp.csv").write_text(f"file,mpp\n{bare.name},0.5\n{PLANTED}-typo.svs,1\n")
    config = IndexConfig(
        slides=(str(ward / "cohort.csv"), str(bare)),
        out=corpus,
        mpp_overrides=tmp_path / "mpp.csv",
        cohort=CohortOptions(salt_names=True),
    )
    for _ in range(2):  # a rerun that takes everything over tells no more
        result = index.run(config)
    foreground.run(foreground.ForegroundConfig(corpus=corpus))
    tracking = TrackingConfig(uri=new_store(tmp_path / "mlflow"))
    params = yaml.safe_load((corpus / "index.yaml").read_text())  # what `demo` logs of a stage
    with open_run(tracking, tmp_path / "run", params, provenance()) as run:
        run.cohort("slides", result.cohort_digest, "indexing")
        for name in ("slides.csv", "skipped.csv"):
            run.artifact(corpus / name)
    said = "".join(capfd.readouterr()) + caplog.text
    told = {row["slide_id"]: row["patient"] for row in rows(corpus, "slides.csv")}
    assert len(told) == 4
    assert len(set(told.values()) - {""}) == 1
    assert "not among the slides: 1 files" in said
    written = texts_under(corpus, tmp_path / "run", tmp_path / "mlflow")
    assert len(written) > 15
    assert [str(path) for path, text in written.items() if PLANTED.lower() in text.lower()] == []
    assert PLANTED.lower() not in said.lower()
    links = list((tmp_path / "corpus.names").iterdir())
    assert stat.S_IMODE((tmp_path / "corpus.names").stat().st_mode) == 0o700
    assert {link.readlink().name for link in links} >= {f"{PLANTED}_HE.svs", f"{PLANTED}-series"}


@real
def test_tags_and_tables_are_hidden_without_being_asked(
    ward: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """File names are kept, since most are what a laboratory calls its slides; patients are not."""
    for number, path in enumerate(sorted(ward.glob(f"{PLANTED}*"))):
        path.rename(ward / f"slide{number}{path.suffix}")
    table = ward / "cohort.csv"
    cells = [f"slide{n}{s},{PLANTED}" for n, s in enumerate((".svs", "", ".svs")) if s]
    table.write_text("\n".join(["uri,patient", *cells, "slide1,"]))
    corpus = tmp_path / "corpus"
    index.run(IndexConfig(slides=(str(table),), out=corpus))
    told = {row["slide_id"]: row["patient"] for row in rows(corpus, "slides.csv")}
    assert sorted(told) == ["slide0", "slide1", "slide2"]
    assert told["slide0"] == told["slide2"] != told["slide1"] != ""
    written = texts_under(corpus)
    assert [str(path) for path, text in written.items() if PLANTED in text] == []
    assert PLANTED not in "".join(capfd.readouterr())
