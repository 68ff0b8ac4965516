"""Everything the page shows, made out of the stages' files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pathfm.pictures import mpp_colour, told_mpps
from pathfm.report.scores import dot_plot_svg, probe_part
from pathfm.report.slides import OUTLINE, SlideCard, patch_mix, slide_cards
from pathfm.report.stage_files import config_files, newest_run, read_csv, read_jsonl, read_text
from pathfm.report.training import RunPart, run_part
from pathfm.runtime import PathfmError, counted, provenance, without_secrets

SAMPLED_FIELDS = frozenset(("draw", "slide_id", "x_px0", "y_px0", "width_px0", "height_px0", "mpp"))


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
    missing: list[str]  # stages without files
    made: str


def collect(folder: Path) -> Page:
    """Reads every stage file under `folder` into what the page shows."""
    slides = read_csv(folder / "corpus" / "slides.csv")
    skipped = read_csv(folder / "corpus" / "skipped.csv")
    masks = {row["slide_id"]: row for row in read_csv(folder / "corpus" / "foreground.csv")}
    run_folder = newest_run(folder)
    sampled = read_jsonl(run_folder / "sampled.jsonl", SAMPLED_FIELDS) if run_folder else []
    for row, mpp in zip(sampled, told_mpps([float(row["mpp"]) for row in sampled]), strict=True):
        row["mpp"] = mpp
    pretrain = run_part(run_folder) if run_folder else None
    probe = probe_part(folder)
    if not (slides or run_folder or probe):
        raise PathfmError(
            f"{folder}: no corpus/slides.csv, runs/*/metrics.jsonl or probe.json here: give the "
            "folder that holds corpus/ and runs/"
        )
    every_mpp = sorted({float(row["mpp"]) for row in sampled})
    mix = patch_mix(sampled, every_mpp)
    configs = config_files(folder)
    parts = {"index": slides, "foreground": masks, "pretrain": pretrain, "probe": probe}
    return Page(
        title=folder.resolve().name,
        headline=headline(slides, sampled, pretrain, probe),
        facts=_facts(slides, masks, sampled, pretrain, probe),
        slides=[
            row | {"tissue": masks.get(row["slide_id"], {}).get("tissue_mm2", "")} for row in slides
        ],
        skipped=[{**row, "name": Path(row["uri"]).name} for row in skipped],
        outline=OUTLINE,
        mpp_colours=[(f"{mpp:g}", mpp_colour(mpp, every_mpp)) for mpp in every_mpp],
        mix=mix,
        mix_total=[sum(row[1][i] for row in mix) for i in range(len(every_mpp))],
        mix_top=max((row[3] for row in mix), default=1.0),
        cards=slide_cards(folder / "corpus", slides, masks, sampled, every_mpp),
        pretrain=pretrain,
        probe=probe,
        dots=dot_plot_svg(probe) if probe else "",
        commands=[f"pathfm {verb} {shlex.quote(path.as_posix())}" for verb, path in configs],
        configs=[
            (str(path.relative_to(folder)), without_secrets(read_text(path))) for _, path in configs
        ],
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
        if _unclear(pair):
            judged = f"no clear difference ({difference(pair)})"
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
    return f"{counted(len(slides), 'slide')} indexed; nothing is trained yet."


def _unclear(pair: dict[str, Any]) -> bool:
    """Whether 0 lies in the difference's interval; without one, within its sd over repeats."""
    if pair.get("interval"):
        low, high = pair["interval"]
        return bool(low <= 0 <= high)
    return len(pair["differences"]) < 2 or abs(pair["mean"]) <= pair["sd"]


def difference(pair: dict[str, Any]) -> str:
    """A paired difference in points, its sd over repeats where there are several, its interval where there is one."""
    told = signed(pair["mean"])
    if len(pair["differences"]) > 1:
        told += f" ± {100 * pair['sd']:.1f}"
    if pair.get("interval"):
        told += f" [{', '.join(map(signed, pair['interval']))}]"
    return f"{told} points"


def _percent(scores: dict[str, Any]) -> str:
    return f"{score(scores)}\u00a0%"


def score(scores: dict[str, Any]) -> str:
    """A mean in per cent; ± its sd over repeats where there are several."""
    told = f"{100 * scores['mean']:.1f}"
    if len(scores["values"]) > 1:
        told += f"\u00a0±\u00a0{100 * scores['sd']:.1f}"
    return told


def signed(share: float) -> str:
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
        facts.append(
            (f"{len(slides):,}", "slide indexed" if len(slides) == 1 else "slides indexed")
        )
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
