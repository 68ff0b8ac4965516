"""Verb `report`: one self-contained page of what a folder's stages have made.

Reads stage files only (corpus/, runs/, probe/), so it can be made again at any time, and of a run
that is still going on; a stage without files is named as missing. No script, no outside asset:
pictures are data URIs, text from files is escaped (slide names come from strangers).
"""

from __future__ import annotations

import csv
import html
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

from online_patching.errors import PatchingError
from online_patching.mask import ForegroundMask
from online_patching.stores.local import atomic_write_text
from pathfm.pictures import (
    COLOURS,
    Series,
    jpeg_data_uri,
    line_plot_svg,
    mpp_colour,
    nice_ticks,
    outline,
)
from pathfm.runtime import PathfmError, provenance
from pathfm.tracking import read_metrics

_MAX_PICTURED = 24  # slides with a thumbnail; the table lists all
_MAX_BOXES = 150  # rectangles on one thumbnail
_OUTLINE = "#1b1b1b"  # not one of the boxes' colours
_THUMBNAIL_PX, _PICTURE_PX = 640, 1600


class ReportConfig(BaseModel, frozen=True, extra="forbid"):
    """Which folder to report on."""

    folder: Path = Field(description="output folder of a demo: holds corpus/, runs/, probe/")


@dataclass(frozen=True)
class ReportResult:
    """Where the page is."""

    path: Path


def run(config: ReportConfig) -> ReportResult:
    """Writes `<folder>/report.html` and says where it is."""
    path = build_report(config.folder)
    print(f"report: {path.resolve().as_uri()} ({path.stat().st_size / 1e6:.1f} MB)")
    return ReportResult(path)


def build_report(folder: Path) -> Path:
    """Makes `<folder>/report.html` out of the stage files and returns its path.

    Raises `PathfmError` if the folder holds no stage's files, or a damaged one.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = collect(folder)
    environment = Environment(
        loader=PackageLoader("pathfm", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = _signed
    path = folder / "report.html"
    atomic_write_text(path, environment.get_template("report.html.j2").render(page=page))
    return path


@dataclass(frozen=True)
class SlideCard:
    """A thumbnail with its mask's outline, and the boxes sampled on it in level-0 pixels."""

    slide_id: str
    picture: str
    width_px0: int
    height_px0: int
    boxes: list[tuple[float, float, float, float, str]]
    n_sampled: int
    facts: str


@dataclass(frozen=True)
class RunPart:
    """What a pretraining run left behind."""

    name: str
    plots: list[tuple[str, str]]  # (title, svg)
    pictures: list[tuple[str, str]]  # (title, data URI)
    summary: list[tuple[str, str]]
    last: dict[str, float]
    n_steps: int


@dataclass(frozen=True)
class Page:
    """Everything the template shows."""

    title: str
    headline: str
    facts: list[tuple[str, str]]
    slides: list[dict[str, str]]
    skipped: list[dict[str, str]]
    outline: str
    mpp_colours: list[tuple[str, str]]
    mix: list[tuple[str, list[int], int, float]]  # slide, patches by mpp, total, share
    mix_total: list[int]
    mix_top: float  # the largest share, for the length of the bars
    cards: list[SlideCard]
    pretrain: RunPart | None
    probe: dict[str, Any] | None
    dots: str
    commands: list[str]
    configs: list[tuple[str, str]]
    provenance: dict[str, str]
    missing: list[str] = field(default_factory=list)
    made: str = ""


def collect(folder: Path) -> Page:
    """Reads every stage file under `folder` into what the page shows."""
    slides = _read_csv(folder / "corpus" / "slides.csv")
    skipped = _read_csv(folder / "corpus" / "skipped.csv")
    masks = {row["slide_id"]: row for row in _read_csv(folder / "corpus" / "foreground.csv")}
    run_folder = newest_run(folder)
    sampled = _read_jsonl(run_folder / "sampled.jsonl") if run_folder else []
    pretrain = _run_part(run_folder) if run_folder else None
    probe = _read_probe(folder)
    if not (slides or run_folder or probe):
        raise PathfmError(
            f"{folder}: no corpus/slides.csv, runs/*/metrics.jsonl or probe.json here"
        )
    every_mpp = sorted({float(row["mpp"]) for row in sampled})
    mix = _mix(sampled, every_mpp)
    parts = {"index": slides, "foreground": masks, "pretrain": pretrain, "probe": probe}
    return Page(
        title=folder.resolve().name,
        headline=headline(slides, sampled, pretrain, probe),
        facts=_facts(slides, masks, sampled, pretrain, probe),
        slides=[
            row | {"tissue": masks.get(row["slide_id"], {}).get("tissue_mm2", "")} for row in slides
        ],
        skipped=[{**row, "name": Path(row["uri"]).name} for row in skipped],
        outline=_OUTLINE,
        mpp_colours=[(f"{mpp:g}", mpp_colour(mpp, every_mpp)) for mpp in every_mpp],
        mix=mix,
        mix_total=[sum(row[1][i] for row in mix) for i in range(len(every_mpp))],
        mix_top=max((row[3] for row in mix), default=1.0),
        cards=_cards(folder / "corpus", slides, masks, sampled, every_mpp),
        pretrain=pretrain,
        probe=probe,
        dots=dot_plot_svg(probe) if probe else "",
        commands=_commands(folder),
        configs=_configs(folder),
        provenance=provenance(),
        missing=[name for name, part in parts.items() if not part],
        made=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
    )


def headline(
    slides: Sequence[dict[str, str]],
    sampled: Sequence[dict[str, Any]],
    pretrain: RunPart | None,
    probe: dict[str, Any] | None,
) -> str:
    """The result in one sentence, whichever way it went."""
    if probe and probe["paired"]:
        pair = next(p for p in probe["paired"] if p["probe"] == "logistic")
        a, b = (
            next(x for x in probe["backbones"] if x["name"] == pair[who])["probes"]["logistic"]
            for who in ("baseline", "other")
        )
        points = f"{abs(100 * pair['mean']):.1f} points"
        if abs(pair["mean"]) <= pair["sd"]:
            judged = (
                f"no clear difference ({_signed(pair['mean'])} ± {100 * pair['sd']:.1f} points)"
            )
        else:
            judged = f"{points} {'higher' if pair['mean'] > 0 else 'lower'}"
        return (
            f"Linear probe on frozen features: {pair['other']} {_percent(b)}, "
            f"{pair['baseline']} {_percent(a)} balanced accuracy: {judged}."
        )
    if probe:
        best = probe["backbones"][0]
        reached = _percent(best["probes"]["logistic"])
        return f"Linear probe on frozen features: {best['name']} {reached} balanced accuracy."
    if pretrain:
        return f"Pretraining {pretrain.name}: {pretrain.n_steps:,} steps so far; not probed yet."
    return f"{len(slides):,} slides indexed; nothing is trained yet."


def _percent(scores: dict[str, Any]) -> str:
    return f"{100 * scores['mean']:.1f}\u00a0±\u00a0{100 * scores['sd']:.1f}\u00a0%"


def _signed(share: float) -> str:
    """A share in points with a true minus sign."""
    return f"{100 * share:+.1f}".replace("-", "\u2212")


def _facts(
    slides: Sequence[dict[str, str]],
    masks: dict[str, dict[str, str]],
    sampled: Sequence[dict[str, Any]],
    pretrain: RunPart | None,
    probe: dict[str, Any] | None,
) -> list[tuple[str, str]]:
    """Numbers for the top of the page: (value with unit, what it is)."""
    facts = []
    if slides:
        facts.append((f"{len(slides):,}", "slides indexed"))
    tissue = sum(float(row["tissue_mm2"]) for row in masks.values() if row.get("tissue_mm2"))
    if masks:
        facts.append((f"{tissue:,.0f} mm²", "of tissue found"))
    if sampled:
        keys = {(r["slide_id"], r["x_px0"], r["y_px0"], r["mpp"]) for r in sampled}
        facts.append((f"{len(keys):,}", "distinct patches sampled"))
    if pretrain:
        facts.append((f"{pretrain.n_steps:,}", "optimizer steps"))
    if probe:
        ranks = " → ".join(f"{b['rankme']:.0f}" for b in probe["backbones"])
        facts.append((ranks, f"RankMe, of {probe['backbones'][0]['dim']}"))
    return facts


def _mix(
    sampled: Sequence[dict[str, Any]], every_mpp: Sequence[float]
) -> list[tuple[str, list[int], int, float]]:
    counts = Counter((row["slide_id"], float(row["mpp"])) for row in sampled)
    rows = []
    for slide in sorted({slide for slide, _ in counts}):
        by_mpp = [counts[slide, mpp] for mpp in every_mpp]
        rows.append((slide, by_mpp, sum(by_mpp), sum(by_mpp) / len(sampled)))
    return rows


def _cards(
    corpus: Path,
    slides: Sequence[dict[str, str]],
    masks: dict[str, dict[str, str]],
    sampled: Sequence[dict[str, Any]],
    every_mpp: Sequence[float],
) -> list[SlideCard]:
    by_slide: dict[str, list[dict[str, Any]]] = {}
    for row in sampled:
        by_slide.setdefault(row["slide_id"], []).append(row)
    cards = []
    for slide in slides[:_MAX_PICTURED]:
        slide_id = slide["slide_id"]
        picture = _thumbnail(corpus, slide_id)
        if picture is None:
            continue
        rows = by_slide.get(slide_id, [])
        shown = rows[:: max(1, -(-len(rows) // _MAX_BOXES))]
        reason = masks.get(slide_id, {}).get("reason", "")
        tissue = masks.get(slide_id, {}).get("tissue_mm2", "")
        facts = reason or (f"{float(tissue):.1f} mm² tissue" if tissue else "")
        cards.append(
            SlideCard(
                slide_id=slide_id,
                picture=jpeg_data_uri(picture, quality=76),
                width_px0=int(slide["width_px"]),
                height_px0=int(slide["height_px"]),
                # large boxes first, so that they do not hide the small ones
                boxes=[
                    (
                        r["x_px0"],
                        r["y_px0"],
                        r["width_px0"],
                        r["height_px0"],
                        mpp_colour(float(r["mpp"]), every_mpp),
                    )
                    for r in sorted(shown, key=lambda r: -float(r["mpp"]))
                ],
                n_sampled=len(rows),
                facts=facts,
            )
        )
    return cards


def _thumbnail(corpus: Path, slide_id: str) -> Image.Image | None:
    """The slide's thumbnail at page size, the mask's border drawn on it; None if there is none."""
    try:
        with Image.open(corpus / "thumbnails" / f"{slide_id}.jpg") as image:
            small = image.convert("RGB")
    except OSError:
        return None
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS)
    try:
        mask = ForegroundMask.load(corpus / "masks" / f"{slide_id}.png").bits
    except (OSError, PatchingError):
        return small
    return outline(np.asarray(small), mask, _OUTLINE)


def newest_run(folder: Path) -> Path | None:
    """The run folder whose metrics were written last."""
    found = list((folder / "runs").glob("*/metrics.jsonl"))
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def _run_part(folder: Path) -> RunPart:
    rows = read_metrics(folder)
    names = {name for row in rows for name in row}
    summary = json.loads(_text(folder / "summary.json") or "{}")
    log_k = summary.get("log_k")
    uniform = f" (uniform: log K = {log_k:.2f} nats)" if isinstance(log_k, float) else ""
    wanted = (
        ("Loss", "loss", "loss"),
        (f"Teacher entropy{uniform}", "nats", "entropy"),
        ("Learning rate", "learning rate", "lr"),
        ("Speed", "patches/s", "patches_per_s"),
    )
    plots = []
    for title, unit, name in wanted:
        chosen = sorted(n for n in names if n == name or (name == "entropy" and name in n))
        if chosen:
            plots.append((title, _plot(rows, chosen, unit)))
    titles = {"mosaic": "Patches as sampled", "views": "The views of one patch"}
    pictures = []
    for path in sorted(
        (folder / "pictures").glob("*.jpg"), key=lambda p: (p.stem not in titles, p.stem)
    ):
        with Image.open(path) as image:
            title = titles.get(path.stem, path.stem)
            pictures.append((title, jpeg_data_uri(image.convert("RGB"), 82, _PICTURE_PX)))
    return RunPart(
        name=folder.name,
        plots=plots,
        pictures=pictures,
        # shares by slide and resolution have a table of their own
        summary=[(k, _shown(v)) for k, v in summary.items() if not isinstance(v, dict)],
        last=rows[-1] if rows else {},
        n_steps=int(rows[-1]["step"]) + 1 if rows else 0,
    )


def _plot(rows: Sequence[dict[str, float]], names: Sequence[str], unit: str) -> str:
    series = []
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        series.append(Series(name.replace("_", " "), *map(list, zip(*points, strict=True))))
    smooth = 9 if unit in ("loss", "patches/s") and len(rows) >= 60 else 0
    return line_plot_svg(series, "optimizer step", unit, 520, 250, smooth)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def dot_plot_svg(probe: dict[str, Any]) -> str:
    """Every seed's balanced accuracy as a dot, mean ± sd as a bar; one row a probe and backbone."""
    rows = [
        (f"{kind if kind != 'knn' else 'kNN'} · {b['name']}", b["probes"][kind], COLOURS[i % 7])
        for kind in ("logistic", "knn")
        for i, b in enumerate(probe["backbones"])
    ]
    values = [v for _, scores, _ in rows for v in scores["values"]]
    low, high = 100 * min(values), 100 * max(values)
    pad = max(1.0, 0.08 * (high - low))
    low, high = low - pad, high + pad
    left, width, step = 170, 640, 34
    height = step * len(rows) + 40

    def x(value: float) -> float:
        return left + (width - left - 14) * float((100 * value - low) / (high - low))

    parts = []
    for tick in _ticks(low, high):
        at = x(tick / 100)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{height - 30}" stroke="currentColor" '
            f'opacity=".12"/><text x="{at:.1f}" y="{height - 14}" text-anchor="middle" '
            f'fill="currentColor" opacity=".75">{tick:g}</text>'
        )
    for i, (label, scores, colour) in enumerate(rows):
        y = 22 + i * step
        mean, sd = scores["mean"], scores["sd"]
        parts.append(
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end" fill="currentColor">'
            f"{html.escape(label)}</text>"
            f'<line x1="{x(mean - sd):.1f}" x2="{x(mean + sd):.1f}" y1="{y}" y2="{y}" '
            f'stroke="{colour}" stroke-width="10" opacity=".25" stroke-linecap="round"/>'
            f'<line x1="{x(mean):.1f}" x2="{x(mean):.1f}" y1="{y - 9}" y2="{y + 9}" '
            f'stroke="{colour}" stroke-width="2.5"/>'
        )
        parts.extend(
            f'<circle cx="{x(value):.1f}" cy="{y}" r="4" fill="{colour}" fill-opacity=".75"/>'
            for value in scores["values"]
        )
    return (
        f'<svg class="dots" viewBox="0 0 {width} {height}" role="img" font-size="12" '
        f'xmlns="http://www.w3.org/2000/svg" aria-label="balanced accuracy of every seed, percent">'
        f"{''.join(parts)}</svg>"
    )


def _ticks(low: float, high: float) -> list[float]:
    ticks: list[float] = nice_ticks(low, high, 6)
    return [tick for tick in ticks if low <= tick <= high]


def _read_probe(folder: Path) -> dict[str, Any] | None:
    for path in (folder / "probe" / "probe.json", folder / "probe.json"):
        text = _text(path)
        if text:
            try:
                found: dict[str, Any] = json.loads(text)
            except ValueError:
                raise PathfmError(f"{path}: damaged; make it again with `pathfm probe`") from None
            for backbone in found["backbones"]:
                for scores in backbone["probes"].values():
                    scores["shares"] = _row_shares(scores["confusion"])
            return found
    return None


def _row_shares(confusion: list[list[int]]) -> list[list[int]]:
    """Each row in percent."""
    return [[round(100 * n / max(1, sum(row))) for n in row] for row in confusion]


def _config_files(folder: Path) -> list[tuple[str, Path]]:
    """(verb, resolved config) of every stage that saved one, in the order of the stages."""
    patterns = (
        ("demo", "demo.yaml"),
        ("index", "corpus/index.yaml"),
        ("foreground", "corpus/foreground.yaml"),
        ("pretrain", "runs/*/config.yaml"),
        ("embed", "embeddings/*.yaml"),
        ("probe", "probe/probe.yaml"),
    )
    return [(verb, path) for verb, pattern in patterns for path in sorted(folder.glob(pattern))]


def _commands(folder: Path) -> list[str]:
    return [f"pathfm {verb} {path.as_posix()}" for verb, path in _config_files(folder)]


def _configs(folder: Path) -> list[tuple[str, str]]:
    return [(str(path.relative_to(folder)), _text(path)) for _, path in _config_files(folder)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a run that is going on may be in the middle of one."""
    lines = _text(path).splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
