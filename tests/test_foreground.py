"""The foreground verb: masks where the tissue is, nothing stale trusted, every loss said aloud."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from online_patching import Corpus, ForegroundMask, read_slide_index
from online_patching.testing import SyntheticSlide, write_ome_zarr, write_tiff
from pathfm.foreground import ForegroundConfig, SlideForeground, masking, run, telling
from pathfm.foreground.masking import mask_mpp
from pathfm.runtime import PathfmError
from pathfm.segmentation.tidy import mask_iou

WIDE = SyntheticSlide(seed=21, width_px0=1501, height_px0=1103, mpp=1.161, pen=False)
COARSE = SyntheticSlide(seed=22, width_px0=181, height_px0=250, mpp=7.9, pen=False)


def _add(corpus: Path, slide_file: Path, mpp: float | None = None) -> None:
    index = read_slide_index(str(slide_file), mpp=mpp)
    index.save(corpus / "slides" / f"{index.slide_id}.index")


@pytest.fixture(scope="module")
def slide_files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("slides")
    glass = np.full((900, 1300, 3), (241, 240, 245), np.uint8)
    return {
        "wide": write_tiff(folder / "wide.svs", WIDE, associated=True),
        "coarse": write_ome_zarr(folder / "coarse.zarr", COARSE, chunk_px=128),
        "empty": write_tiff(folder / "empty.tif", WIDE, flavour="generic", level0=glass),
    }


@pytest.fixture
def corpus(tmp_path: Path, slide_files) -> Path:
    for path in slide_files.values():
        _add(tmp_path, path)
    return tmp_path


def _truth(slide: SyntheticSlide, mask: ForegroundMask) -> np.ndarray:
    truth = Image.fromarray(slide.class_map(slide.mpp)).resize((mask.width, mask.height), 0)
    return np.asarray(truth) > 0


def test_masks_lie_where_the_tissue_is_on_slides_that_are_not_square(corpus):
    result = run(ForegroundConfig(corpus=corpus))
    assert {s.slide_id for s in result.usable} == {"wide", "coarse"}
    for slide, name in ((WIDE, "wide"), (COARSE, "coarse")):
        mask = ForegroundMask.load(corpus / "masks" / f"{name}.png")
        bits, truth = mask.bits, _truth(slide, mask)
        assert mask.size_px0 == (slide.width_px0, slide.height_px0)
        assert mask_iou(bits, truth) > 0.8
        turned = [bits[::-1], bits[:, ::-1], bits[::-1, ::-1]]
        assert max(mask_iou(t, truth) for t in turned) < mask_iou(bits, truth) - 0.05
        for kind in ("thumbnails", "overlays"):
            with Image.open(corpus / kind / f"{name}.jpg") as picture:
                assert picture.size == (mask.width, mask.height)


def test_mask_thumbnail_and_overlay_share_one_coordinate_system(tmp_path):
    # One asymmetric piece of tissue whose corners are known, on a slide that is not square.
    level0 = np.full((1103, 1501, 3), 242, np.uint8)
    noise = np.random.default_rng(0).integers(-12, 12, (400, 700, 3))
    level0[100:500, 700:1400] = np.clip(np.array([205, 120, 170]) + noise, 0, 255)
    _add(tmp_path, write_tiff(tmp_path / "one.svs", WIDE, level0=level0))
    run(ForegroundConfig(corpus=tmp_path, method="otsu"))
    mask = ForegroundMask.load(tmp_path / "masks" / "one.png")
    assert mask.fraction(720, 120, 660, 360) > 0.98
    assert mask.fraction(0, 0, 680, 1103) < 0.02
    assert mask.fraction(0, 520, 1501, 583) < 0.02
    with Image.open(tmp_path / "thumbnails" / "one.jpg") as picture:
        pink = np.asarray(picture).astype(int)[..., 1] < 180
    assert mask_iou(pink, mask.bits) > 0.95
    with Image.open(tmp_path / "overlays" / "one.jpg") as picture:
        rgb = np.asarray(picture).astype(int)
    green = np.argwhere(rgb[..., 1] - rgb[..., 0] > 90)  # the outline
    rows, columns = np.nonzero(mask.bits)
    assert abs(green.min(axis=0) - [rows.min(), columns.min()]).max() <= 1
    assert abs(green.max(axis=0) - [rows.max(), columns.max()]).max() <= 1


def test_a_table_a_page_and_the_packed_corpus_are_written(corpus, capsys):
    result = run(ForegroundConfig(corpus=corpus))
    said = capsys.readouterr().out
    assert "no tissue found by the model" in said
    assert "left out" in said
    with (corpus / "foreground.csv").open() as handle:
        rows = {row["slide_id"]: row for row in csv.DictReader(handle)}
    assert float(rows["wide"]["tissue_mm2"]) > 0.4
    assert 0 < float(rows["wide"]["baseline_iou"]) <= 1
    assert rows["empty"]["reason"].startswith("no tissue")
    page = result.page.read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "http" not in page
    packed = Corpus.open(corpus)
    assert set(packed.slide_ids) == {"wide", "coarse"}
    assert [name for name, _ in packed.left_out] == ["empty"]


def _stamps(corpus: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (corpus / "masks").iterdir()}


def test_a_rerun_skips_what_is_done_and_only_that(corpus, slide_files):
    config = ForegroundConfig(corpus=corpus)
    run(config)
    before = _stamps(corpus)
    again = run(config)
    assert all(s.reused for s in again.slides)
    assert _stamps(corpus) == before
    (corpus / "masks" / "coarse.png").write_bytes(b"damaged")
    ForegroundMask.from_array(np.ones((5, 7), bool), (1501, 1103), (1.161, 1.161)).save(
        corpus / "masks" / "wide.png"  # a whole mask, but not the one the facts vouch for
    )
    third = {s.slide_id: s for s in run(config).slides}
    assert {name for name, s in third.items() if s.reused} == {"empty"}
    _add(corpus, slide_files["wide"], mpp=1.0)  # the override table was mended
    fourth = {s.slide_id: s for s in run(config).slides}
    assert {name for name, s in fourth.items() if s.reused} == {"empty", "coarse"}
    ratio = fourth["wide"].tissue_mm2 / third["wide"].tissue_mm2
    assert ratio == pytest.approx((1.0 / 1.161) ** 2, rel=0.25)
    fifth = run(ForegroundConfig(corpus=corpus, threshold=0.6))
    assert not any(s.reused for s in fifth.slides)


def test_an_interrupted_slide_leaves_nothing_a_rerun_would_trust(corpus, monkeypatch):
    run(ForegroundConfig(corpus=corpus))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(masking, "outline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(ForegroundConfig(corpus=corpus, threshold=0.4))
    monkeypatch.undo()
    assert not (corpus / "masks" / "coarse.png").exists()  # the first in order: made from 0.5
    assert not (corpus / "masks" / "coarse.json").exists()
    after = run(ForegroundConfig(corpus=corpus, threshold=0.4))
    assert not any(s.reused for s in after.slides)


def test_a_slide_that_cannot_be_read_is_listed_and_the_rest_goes_on(corpus, slide_files, tmp_path):
    broken = tmp_path / "broken.svs"
    broken.write_bytes(slide_files["wide"].read_bytes())
    _add(corpus, broken)
    size, stamp = broken.stat().st_size, broken.stat().st_mtime_ns
    with broken.open("r+b") as handle:  # damaged after it was indexed, unnoticed by size and time
        handle.seek(size // 4)
        handle.write(bytes(size - size // 4))
    os.utime(broken, ns=(stamp, stamp))
    rows = {s.slide_id: s for s in run(ForegroundConfig(corpus=corpus)).slides}
    assert rows["broken"].reason
    assert not (corpus / "masks" / "broken.png").exists()
    assert not rows["wide"].reason


def test_when_no_slide_has_tissue_the_run_fails_in_one_line(tmp_path, slide_files):
    _add(tmp_path, slide_files["empty"])
    with pytest.raises(PathfmError, match=r"none of 1 slides .* has tissue") as caught:
        run(ForegroundConfig(corpus=tmp_path))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "overlays.html").exists()
    assert not (tmp_path / "corpus.json").exists()


def test_otsu_can_make_the_mask_and_agreement_is_symmetric(corpus):
    by_model = {s.slide_id: s for s in run(ForegroundConfig(corpus=corpus)).slides}
    by_otsu = {s.slide_id: s for s in run(ForegroundConfig(corpus=corpus, method="otsu")).slides}
    assert by_otsu["wide"].baseline_iou == by_model["wide"].baseline_iou
    assert by_otsu["wide"].mask_digest != by_model["wide"].mask_digest


def test_a_large_slide_gets_a_coarser_mask_and_is_told(corpus, capsys):
    result = run(ForegroundConfig(corpus=corpus, max_side_px=100))
    row = {s.slide_id: s for s in result.slides}["wide"]
    mask = ForegroundMask.load(corpus / "masks" / "wide.png")
    assert (mask.width, mask.height) == (100, 73)
    assert row.mask_mpp == pytest.approx(1501 * 1.161 / 100)
    assert "coarser than 8 µm/px" in capsys.readouterr().out


def test_a_mask_is_never_finer_than_level_0(slide_files):
    index = read_slide_index(str(slide_files["coarse"]))
    assert mask_mpp(index, ForegroundConfig(mpp=4.0)) == pytest.approx(7.9)


def test_what_is_missing_is_named_with_the_remedy(tmp_path, corpus):
    with pytest.raises(PathfmError, match="pathfm index"):
        run(ForegroundConfig(corpus=tmp_path / "nowhere"))
    with pytest.raises(PathfmError, match=r"nothing\.safetensors"):
        run(ForegroundConfig(corpus=corpus, weights=tmp_path / "nothing.safetensors"))
    (tmp_path / "odd.safetensors").write_bytes(b"no weights")
    with pytest.raises(PathfmError, match=r"odd\.safetensors"):
        run(ForegroundConfig(corpus=corpus, weights=tmp_path / "odd.safetensors"))


def test_facts_beside_a_mask_tell_what_it_is(corpus):
    run(ForegroundConfig(corpus=corpus))
    facts = json.loads((corpus / "masks" / "wide.json").read_text())
    mask = ForegroundMask.load(corpus / "masks" / "wide.png")
    assert facts["mask_digest"] == mask.digest
    assert facts["tissue_mm2"] == pytest.approx(mask.tissue_area_um2 / 1e6)


def test_a_folder_that_is_still_being_indexed_is_refused(corpus):
    (corpus / "index.unfinished").touch()
    with pytest.raises(PathfmError, match="still writing there, or was stopped"):
        run(ForegroundConfig(corpus=corpus))


def test_of_many_slides_the_page_pictures_those_worth_a_look_and_the_table_its_first_rows(
    monkeypatch, capsys, tmp_path
):
    rows = [
        SlideForeground(f"s{k}", 1.0, 0.5, baseline_iou=k / 10, mask_mpp=8.0, reason="x" * (k == 7))
        for k in range(9)
    ]
    monkeypatch.setattr(telling, "MOST_PICTURED", 3)
    monkeypatch.setattr(telling, "_MOST_SHOWN", 2)
    config = ForegroundConfig(corpus=tmp_path)
    page = telling.page_of(config, rows)
    assert [f"<b>s{k}</b>" in page for k in range(9)] == [k in (7, 0, 1) for k in range(9)]
    assert "Pictured are the 3 to look at first" in page
    telling.show(config, rows, tmp_path / "overlays.html")
    said = capsys.readouterr().out
    assert "s1" in said
    assert "s2" not in said
    assert "... and 7 more" in said
