"""evaluation.html: every drawn picture with its outlines and errors, worst first. No script."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pathfm.foreground_evaluate.measuring import Row, Subject
from pathfm.foreground_evaluate.summing import Summary
from pathfm.foreground_evaluate.telling import LABELS, share
from pathfm.pictures import jpeg_data_uri, outline
from pathfm.segmentation.truth import INSIDE, OUTSIDE

Mask = NDArray[np.bool_]
MOST_PICTURED = 100
TRUTH, MODEL, THRESHOLD = "#00a03c", "#e100c8", "#ff8c00"
_MISSED, _WRONG, _IGNORED = (213, 40, 0), (0, 90, 220), (255, 210, 0)
_MAX_PX = 800

_STYLE = f"""body{{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1500px;padding:0 1rem;
color:#222;background:#fff}}h1{{font-size:1.5rem}}h2{{font-size:1.1rem;margin:2.2rem 0 .3rem;
overflow-wrap:anywhere}}table{{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88rem}}
td,th{{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}}
td:first-child,th:first-child{{text-align:left}}.wide{{overflow-x:auto}}.row{{display:grid;gap:.6rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr))}}figure{{margin:0}}
img{{width:100%;display:block;background:#f4f4f4}}figcaption,p small{{color:#555;font-size:.85rem}}
.no{{color:#b00020;font-weight:600}}.yes{{color:#00735a}}i{{display:inline-block;width:.8em;height:.8em;
margin:0 .3em 0 .8em}}.truth{{background:{TRUTH}}}.model{{background:{MODEL}}}
.threshold{{background:{THRESHOLD}}}.missed{{background:rgb{_MISSED}}}.wrong{{background:rgb{_WRONG}}}
.ignored{{background:rgb{_IGNORED}}}"""


def page_of(
    subjects: Sequence[Subject],
    masks: Mapping[tuple[str, str], Mask],
    rows: Sequence[Row],
    summary: Summary,
) -> str:
    """The page: one table, the targets, then the pictures by the first model's Dice, worst first.

    `masks` are keyed by (method, picture). Text from files is escaped.
    """
    model = next(name for name, method in summary.methods.items() if method.is_model)
    best = summary.best_threshold
    by_key = {(row.method, row.picture): row for row in rows}
    worst_first = sorted(subjects, key=lambda s: by_key[model, s.name].scores.dice)
    figures = [_picture(s, model, best, masks, by_key) for s in worst_first[:MOST_PICTURED]]
    key = f'<i class="truth"></i>drawn<i class="model"></i>{_told(model)}'
    if best:
        key += f'<i class="threshold"></i>{_told(best)}, the best threshold'
    key += '<i class="missed"></i>missed<i class="wrong"></i>wrongly taken<i class="ignored"></i>ignored'
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>Masks against drawn truth</title><style>{_STYLE}</style>"
        f"<h1>Masks of {summary.pictures} pictures against drawn truth: {_told(model)} has a mean Dice of "
        f"{summary.methods[model].scores['dice'].mean:.3f}</h1>"
        f'<div class="wide">{_table(summary)}</div>{_targets(summary)}<p>{key}</p>\n'
        + "\n".join(figures)
        + "</html>\n"
    )


def _told(text: str) -> str:
    return html.escape(text, quote=True)


def _table(summary: Summary) -> str:
    """A line a method: means with the worst picture's value, kinds."""
    heads = [*LABELS.values(), *(f"{k} outside" for k in OUTSIDE), *(f"{k} inside" for k in INSIDE)]
    lines = ["<tr><th>mean (worst)</th>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for name, method in summary.methods.items():
        cells = []
        for score in LABELS:
            s = method.scores[score]
            cells.append("–" if math.isnan(s.mean) else f"{s.mean:.3f} ({s.worst:.3f})")
        cells += [share(1 - method.inside[kind]) for kind in OUTSIDE]
        cells += [share(method.inside[kind]) for kind in INSIDE]
        lines.append(
            f"<tr><td>{_told(name)}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
        )
    return f"<table>{''.join(lines)}</table>"


def _targets(summary: Summary) -> str:
    lines = []
    for target in summary.targets:
        word = "not judged" if target.met is None else "yes" if target.met else "no"
        css = "" if target.met is None else word
        text = _told(f"{target.method}: {target.name}: ")
        lines.append(
            f'<li>{text}<span class="{css}">{word}</span> <small>{_told(target.said)}</small></li>'
        )
    if summary.agreement:
        lines.append(
            f"<li>The drawer with themself: mean Dice {summary.agreement_mean:.4f} over "
            f"{len(summary.agreement)} pictures drawn twice</li>"
        )
    return f"<ul>{''.join(lines)}</ul>"


def _picture(
    subject: Subject,
    model: str,
    best: str,
    masks: Mapping[tuple[str, str], Mask],
    by_key: Mapping[tuple[str, str], Row],
) -> str:
    mine = masks[model, subject.name]
    row = by_key[model, subject.name]
    views = [
        ("drawn", _lined(subject.rgb, (subject.truth.tissue, TRUTH))),
        (f"drawn and {model}", _lined(subject.rgb, (subject.truth.tissue, TRUTH), (mine, MODEL))),
        (f"errors of {model}", error_map(subject, mine)),
    ]
    if best:
        other = masks[best, subject.name]
        theirs = by_key[best, subject.name].scores.dice
        lined = _lined(subject.rgb, (subject.truth.tissue, TRUTH), (other, THRESHOLD))
        views.append((f"drawn and {best}, Dice {theirs:.3f}", lined))
    figures = "".join(
        f'<figure><img alt="{_told(caption)} on {_told(subject.name)}" '
        f'src="{jpeg_data_uri(picture, 75, _MAX_PX)}"><figcaption>{_told(caption)}</figcaption></figure>'
        for caption, picture in views
    )
    told = ", ".join(f"{label} {getattr(row.scores, n):.3f}" for n, label in LABELS.items())
    return (
        f"<h2>{_told(subject.name)}</h2><p><small>{_told(subject.group)}: {told}</small></p>"
        f'<div class="row">{figures}</div>'
    )


def _lined(rgb: NDArray[np.uint8], *lines: tuple[Mask, str]) -> NDArray[np.uint8]:
    """The picture with the masks' outlines, wide enough to be seen when the page shrinks it."""
    width_px = max(2, max(rgb.shape) // 350)
    for mask, colour in lines:
        rgb = np.asarray(outline(rgb, mask, colour, width_px))
    return rgb


def error_map(subject: Subject, mask: Mask) -> NDArray[np.uint8]:
    """The picture in pale grey, missed tissue red, glass taken blue, ignored yellow: (h, w, 3) uint8."""
    grey = subject.rgb.mean(axis=2, keepdims=True) * 0.5 + 127
    shown = np.repeat(grey, 3, axis=2).astype(np.uint8)
    judged, truth = ~subject.truth.ignore, subject.truth.tissue
    shown[truth & ~mask & judged] = _MISSED
    shown[~truth & mask & judged] = _WRONG
    shown[~judged] = _IGNORED
    return shown
