"""The page's part on the probe: its scores, and every seed's in one plot."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from pathfm.pictures import COLOURS, nice_ticks
from pathfm.report.stage_files import read_probe


def probe_part(folder: Path) -> dict[str, Any] | None:
    """What the probe measured, each confusion matrix also as `shares`; None without a probe."""
    probe = read_probe(folder)
    for backbone in probe["backbones"] if probe else ():
        for scores in backbone["probes"].values():
            scores["shares"] = _row_shares(scores["confusion"])
    return probe


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


def _row_shares(confusion: list[list[int]]) -> list[list[int]]:
    """Each row in percent."""
    return [[round(100 * n / max(1, sum(row))) for n in row] for row in confusion]
