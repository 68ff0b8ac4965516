"""The page holds what the stages wrote, asks nothing of the network, and trusts no name."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from online_patching.mask import ForegroundMask
from pathfm.pictures import mosaic
from pathfm.probe import run as run_probe
from pathfm.report import ReportConfig, build_report, collect, run
from pathfm.runtime import PathfmError
from tests.test_probe import config as probe_config
from tests.test_probe import made_up

HOSTILE = "x<img src=y onerror=alert(1)>&\"'"
SLIDES = {"plain": (4000, 2000), HOSTILE: (1000, 3000)}


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Stage files of a small demo, slide names included that try to be HTML."""
    corpus, run_folder = tmp_path / "corpus", tmp_path / "runs" / "dino"
    for folder in (corpus / "thumbnails", corpus / "masks", run_folder / "pictures"):
        folder.mkdir(parents=True)
    rows: list[dict[str, object]] = []
    for slide_id, (width, height) in SLIDES.items():
        facts = {"mpp_x": 0.25, "mpp_y": 0.25, "mpp_source": "vendor tag", "levels": 3}
        facts |= {"container": "svs", "codec": "jpeg", "tiles": 1234}
        rows.append({"slide_id": slide_id, "width_px": width, "height_px": height, **facts})
        thumbnail = np.full((height // 32, width // 32, 3), 200, np.uint8)
        Image.fromarray(thumbnail).save(corpus / "thumbnails" / f"{slide_id}.jpg")
        tissue = np.zeros(thumbnail.shape[:2], bool)
        tissue[5:20, 5:25] = True
        mask = ForegroundMask.from_array(tissue, (width, height), (0.25, 0.25))
        mask.save(corpus / "masks" / f"{slide_id}.png")
    write_csv(corpus / "slides.csv", rows)
    skipped = {"uri": f"/secret/folder/{HOSTILE}.svs", "reason": "no µm/px <in> the file"}
    write_csv(corpus / "skipped.csv", [skipped])
    (run_folder / "config.yaml").write_text("lr: 0.1 # </code><script>alert(2)</script>\n")
    box = {"x_px0": 100, "y_px0": 200, "width_px0": 512, "height_px0": 512}
    sampled = [
        {"draw": i, "slide_id": slide, **box, "mpp": mpp}
        for i, (slide, mpp) in enumerate([("plain", 0.5), ("plain", 1.0), (HOSTILE, 0.5)])
    ]
    lines = "".join(json.dumps(row) + "\n" for row in sampled)
    (run_folder / "sampled.jsonl").write_text(lines + '{"torn')
    steps = [
        {"step": i, "loss": 8.0 - i / 100, "teacher_entropy": 8.1, "lr": 1e-4} for i in range(80)
    ]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (run_folder / "summary.json").write_text(json.dumps({"patches_per_s": 27.25}))
    mosaic([np.zeros((8, 8, 3), np.uint8)]).save(run_folder / "pictures" / "mosaic.jpg")
    made_up("init").save(tmp_path / "e" / "init.safetensors")
    made_up("pretrained", noise=0.5).save(tmp_path / "e" / "pretrained.safetensors")
    run_probe(probe_config(tmp_path / "e", out=tmp_path / "probe", n_seeds=2))
    return tmp_path


class Tags(HTMLParser):
    """Collects tags, attributes and text, and checks that what opens is closed."""

    void = frozenset({"meta", "img", "input", "link", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(path: Path) -> Tags:
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    assert not tags.open
    return tags


def test_hostile_names_stay_text_and_nothing_outside_is_asked_for(results: Path) -> None:
    page = parse(build_report(results))
    assert not [tag for tag, _ in page.found if tag in ("script", "link", "iframe", "object")]
    for tag, attributes in page.found:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset"):
            assert (attributes.get(name) or "data:image/jpeg;base64,").startswith(
                "data:image/jpeg"
            ), tag
    assert HOSTILE in page.text
    assert not re.search(r"url\(|@import", (results / "report.html").read_text())
    assert "/secret/folder" not in (results / "report.html").read_text()


def test_the_page_holds_what_the_stages_wrote(results: Path) -> None:
    page = parse(build_report(results))
    rectangles = [a for tag, a in page.found if tag == "rect" and a.get("x") == "100"]
    assert len(rectangles) == 3
    assert [a["viewbox"] for tag, a in page.found if a.get("class") == "boxes"] == [
        "0 0 4000 2000",
        "0 0 1000 3000",
    ]
    for words in ("66.7 %", "vendor tag", "4,000 × 2,000", "no µm/px <in> the file", "µm/px from"):
        assert words in page.text
    assert "Teacher entropy" in page.text
    assert "optimistic" in page.text
    assert "27.25" in page.text
    dots = [a for tag, a in page.found if tag == "circle"]
    assert len(dots) == 2 * 2 * 2  # probes x backbones x seeds


def test_the_headline_is_honest_whichever_way_it_went(results: Path) -> None:
    path = results / "probe" / "probe.json"
    probe = json.loads(path.read_text())
    pair = next(p for p in probe["paired"] if p["probe"] == "logistic")
    for mean, interval, words in (
        (0.05, None, "5.0 points higher"),
        (-0.05, None, "5.0 points lower"),
        (0.001, None, "no clear difference (+0.1 ± 1.0 points)"),
        (0.05, [-0.01, 0.11], "no clear difference (+5.0 ± 1.0 [\u22121.0, +11.0] points)"),
        (0.005, [0.002, 0.008], "0.5 points higher"),
    ):
        pair["mean"], pair["sd"], pair["interval"] = mean, 0.01, interval
        path.write_text(json.dumps(probe))
        assert words in collect(results).headline


def test_one_repeat_has_no_spread_and_without_an_interval_no_clear_difference(
    results: Path,
) -> None:
    path = results / "probe" / "probe.json"
    probe = json.loads(path.read_text())
    for pair in probe["paired"]:
        pair |= {"differences": [0.05], "mean": 0.05, "sd": 0.0, "interval": None}
    for backbone in probe["backbones"]:
        for scores in backbone["probes"].values():
            scores |= {"values": scores["values"][:1], "mean": scores["values"][0], "sd": 0.0}
    path.write_text(json.dumps(probe))
    assert "no clear difference (+5.0 points)" in collect(results).headline
    page = parse(build_report(results))
    assert "±" not in page.text.split("logistic probe, %")[1].split("Every seed")[0]
    assert "minus one sd" not in page.text


def test_stages_that_have_not_run_are_named(tmp_path: Path, results: Path) -> None:
    (results / "probe" / "probe.json").unlink()
    page = collect(results)
    assert page.missing == ["foreground", "probe"]
    assert "not probed yet" in page.headline
    parse(build_report(results))


def test_a_folder_without_results_and_a_damaged_one_are_errors(
    tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PathfmError, match=r"no corpus/slides\.csv"):
        build_report(tmp_path / "corpus")
    run(ReportConfig(folder=results))
    assert "report: file://" in capsys.readouterr().out
    (results / "probe" / "probe.json").write_text("{")
    with pytest.raises(PathfmError, match="damaged"):
        build_report(results)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("probe/probe.json", "{}", r"probe\.json: damaged"),
        ("runs/r/sampled.jsonl", '{"draw": 0}\n', r"sampled\.jsonl, line 1: damaged"),
        ("runs/r/sampled.jsonl", '{"dra\n', r"sampled\.jsonl, line 1: damaged"),
    ],
)
def test_a_damaged_stage_file_is_named(tmp_path: Path, name: str, text: str, reason: str) -> None:
    for path, content in (("runs/r/metrics.jsonl", ""), (name, text)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    with pytest.raises(PathfmError, match=reason):
        build_report(tmp_path)
