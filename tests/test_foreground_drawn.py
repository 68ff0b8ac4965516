"""Masks drawn by hand, outlines for QuPath, and runs of many slides that are stopped half-way."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from online_patching import Corpus, ForegroundMask, read_slide_index
from online_patching.testing import SyntheticSlide, write_tiff
from pathfm.foreground import ForegroundConfig, pipeline, run
from pathfm.geojson import rasterise, read_geojson
from pathfm.runtime import PathfmError

WIDE = SyntheticSlide(seed=21, width_px0=1501, height_px0=1103, mpp=1.161, pen=False)
BOX = [[300, 200], [1203, 200], [1203, 700], [300, 700], [300, 200]]
HOLE = [[500, 300], [500, 500], [800, 500], [800, 300], [500, 300]]


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory) -> Path:
    return write_tiff(tmp_path_factory.mktemp("slides") / "wide.svs", WIDE)


@pytest.fixture
def corpus(tmp_path: Path, slide_file: Path) -> Path:
    """Three slides of the same pixels."""
    index = read_slide_index(str(slide_file))
    for name in ("a", "b", "c"):
        replace(index, slide_id=name).save(tmp_path / "corpus" / "slides" / f"{name}.index")
    return tmp_path / "corpus"


def _draw(folder: Path, slide_id: str, *rings: list, name: str = "", extra: tuple = ()) -> Path:
    folder.mkdir(exist_ok=True)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": list(drawn)},
            "properties": {"classification": {"name": called}} if called else {},
        }
        for called, drawn in ((name, rings), *extra)
    ]
    path = folder / f"{slide_id}.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def _rows(config: ForegroundConfig) -> dict:
    return {row.slide_id: row for row in run(config).slides}


def test_a_drawing_is_taken_instead_and_slides_without_one_get_the_models_mask(corpus, tmp_path):
    drawn = tmp_path / "drawn"
    _draw(drawn, "b", BOX, HOLE, name="Tissue")
    rows = _rows(ForegroundConfig(corpus=corpus, drawn=drawn))
    assert [rows[name].source for name in "abc"] == ["model", "drawn", "model"]
    mask = ForegroundMask.load(corpus / "masks" / "b.png")
    um2 = (903 * 500 - 300 * 200) * 1.161**2  # by hand: the box less its hole
    assert mask.tissue_area_um2 == pytest.approx(um2, rel=0.03)
    assert mask.fraction(310, 210, 880, 80) == pytest.approx(1)
    assert mask.fraction(510, 310, 280, 180) == 0
    assert mask.fraction(0, 0, 290, 1103) == 0
    assert set(Corpus.open(corpus).slide_ids) == {"a", "b", "c"}


def test_a_rerun_notices_a_drawing_that_is_new_changed_or_gone(corpus, tmp_path):
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    config = ForegroundConfig(corpus=corpus, drawn=drawn)
    run(config)

    def made_anew() -> set[str]:
        return {name for name, row in _rows(config).items() if not row.reused}

    assert made_anew() == set()
    path = _draw(drawn, "b", BOX)
    assert made_anew() == {"b"}
    assert made_anew() == set()
    _draw(drawn, "b", BOX, HOLE)
    assert made_anew() == {"b"}
    path.unlink()
    assert made_anew() == {"b"}


def test_classes_say_what_is_tissue_and_what_is_cut_away(corpus, tmp_path):
    drawn = tmp_path / "drawn"
    _draw(drawn, "a", BOX, extra=(("Ignore*", [HOLE]), ("Tumor", [[[0, 0], [200, 0], [0, 200]]])))
    _draw(drawn, "b", BOX, HOLE, name="tissue")
    run(ForegroundConfig(corpus=corpus, drawn=drawn))
    masks = [ForegroundMask.load(corpus / "masks" / f"{name}.png") for name in "ab"]
    assert (masks[0].bits == masks[1].bits).all()


def test_a_bad_drawing_leaves_out_its_slide_alone_and_is_told(corpus, tmp_path, capsys):
    drawn = tmp_path / "drawn"
    _draw(drawn, "a", BOX, name="Tumor")
    _draw(drawn, "b", [[0, 0], [1, 1]])
    _draw(drawn, "typo", BOX)
    rows = _rows(ForegroundConfig(corpus=corpus, drawn=drawn))
    assert "none of its 1 areas is tissue (classes: Tumor)" in rows["a"].reason
    assert "feature 1: ring 0 has 2 vertices" in rows["b"].reason
    assert not rows["c"].reason
    assert not (corpus / "masks" / "b.png").exists()
    assert "named after no slide: typo" in capsys.readouterr().err


def test_a_folder_of_drawings_that_cannot_be_meant_is_refused(corpus, tmp_path):
    with pytest.raises(PathfmError, match="no folder"):
        run(ForegroundConfig(corpus=corpus, drawn=tmp_path / "none"))
    run(ForegroundConfig(corpus=corpus))
    with pytest.raises(PathfmError, match="would be replaced"):
        run(ForegroundConfig(corpus=corpus, drawn=corpus / "contours"))
    assert (corpus / "contours" / "a.geojson").exists()


def test_contours_are_the_mask_and_can_come_back_as_a_drawing(corpus, tmp_path):
    run(ForegroundConfig(corpus=corpus))
    mask = ForegroundMask.load(corpus / "masks" / "a.png")
    scale = (mask.width / 1501, mask.height / 1103)
    polygons = read_geojson(corpus / "contours" / "a.geojson")
    assert (rasterise(polygons, (mask.height, mask.width), scale) == mask.bits).all()
    assert max(ring[:, 0].max() for p in polygons for ring in p.rings) > mask.width  # level-0 px
    (corpus / "contours").rename(tmp_path / "kept")
    rows = _rows(ForegroundConfig(corpus=corpus, drawn=tmp_path / "kept"))
    assert rows["a"].source == "drawn"
    assert rows["a"].mask_digest == mask.digest
    run(ForegroundConfig(corpus=corpus, contour_tolerance_px=2.0))
    fewer = sum(p.vertices for p in read_geojson(corpus / "contours" / "a.geojson"))
    assert 0 < fewer < 0.6 * sum(p.vertices for p in polygons)


def test_a_damaged_index_leaves_out_one_slide(corpus):
    (corpus / "slides" / "b.index").write_bytes(b"no index")
    rows = _rows(ForegroundConfig(corpus=corpus))
    assert rows["b"].reason
    assert not rows["a"].reason
    assert not rows["c"].reason


def test_batches_and_one_at_a_time_give_the_same_files_in_the_same_order(corpus, monkeypatch):
    first = run(ForegroundConfig(corpus=corpus))
    for path in (corpus / "masks").iterdir():
        path.unlink()
    monkeypatch.setattr(pipeline, "_batch_of", lambda _: 2)
    again = run(ForegroundConfig(corpus=corpus, threads=3))
    assert [row.slide_id for row in again.slides] == ["a", "b", "c"]
    assert not any(row.reused for row in again.slides)
    assert [r.mask_digest for r in again.slides] == [r.mask_digest for r in first.slides]


def test_a_mask_by_another_model_is_made_from_its_weights(corpus, tmp_path):
    from pathfm.segmentation.models import build_model, save_model

    path = tmp_path / "other.safetensors"
    save_model(build_model("unet_stem4"), "unet_stem4", path, {})
    shipped, other = _rows(ForegroundConfig(corpus=corpus)), run_or_none(corpus, path)
    assert other is None or other["a"].made_from != shipped["a"].made_from
    save_model(build_model("unet", classes=2), "unet", path, {})
    with pytest.raises(PathfmError, match="one class"):
        run(ForegroundConfig(corpus=corpus, weights=path))


def run_or_none(corpus: Path, weights: Path) -> dict | None:
    """Untrained weights may find nothing anywhere, which is an error of its own."""
    try:
        return _rows(ForegroundConfig(corpus=corpus, weights=weights))
    except PathfmError as error:
        assert "has tissue" in str(error)  # noqa: PT017
        return None


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, slide_file):
    index = read_slide_index(str(slide_file))
    for folder in ("killed", "whole"):
        for number in range(120):
            name = f"s{number:03d}"
            replace(index, slide_id=name).save(tmp_path / folder / "slides" / f"{name}.index")
    words = [sys.executable, "-m", "pathfm", "foreground", str(tmp_path / "killed"), "--mpp", "32"]
    facts = tmp_path / "killed" / "masks"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while len(list(facts.glob("*.json"))) < 20 and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()  # a write may be under way
    done = len(list(facts.glob("*.json")))
    assert 20 <= done < 120
    resumed = run(ForegroundConfig(corpus=tmp_path / "killed", mpp=32))
    whole = run(ForegroundConfig(corpus=tmp_path / "whole", mpp=32))
    assert sum(row.reused for row in resumed.slides) == done
    assert [r.mask_digest for r in resumed.slides] == [r.mask_digest for r in whole.slides]


@pytest.mark.slow
def test_never_more_than_a_few_thumbnails_wait_whatever_the_number_of_slides(tmp_path, monkeypatch):
    from pathfm.foreground import SlideForeground
    from pathfm.foreground.masking import Seen

    class Counting:
        """A worker that only counts what is alive between its steps."""

        config, device = ForegroundConfig(threads=4), "cpu"
        alive = most = 0

        def see(self, path: Path) -> Seen:
            self.alive += 1
            self.most = max(self.most, self.alive)
            return Seen(None, path.stem, 8.0, np.zeros((1, 1, 3), np.uint8), None)

        def probabilities(self, seen):
            return [None] * len(seen)

        def write(self, seen: Seen, _: object) -> SlideForeground:
            time.sleep(0.001)
            self.alive -= 1
            return SlideForeground(seen.made_from, 1.0, 0.5, 1.0, 8.0)

    worker = Counting()
    names = [f"s{k:04d}" for k in range(1000)]
    rows = list(pipeline.masked(worker, [Path(f"{name}.index") for name in names]))
    assert [row.slide_id for row in rows] == names
    assert worker.most <= 3 * pipeline.AHEAD + 2
