"""The tables that ``pathfm robustness`` prints, and curves to look at."""

from __future__ import annotations

import io
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from online_patching.stores.local import atomic_write_bytes
from pathfm.pictures import COLOURS
from pathfm.robustness.results import Figure, RobustnessResult
from pathfm.runtime import console


def show(result: RobustnessResult) -> None:
    """Prints the summary, CE of each corruption, wrong labels, and the caveats."""
    out, names = console(), [escape(model.name) for model in result.models]
    out.print(
        f"{result.data}: {result.n:,} pictures, {len(result.classes)} classes, input {result.input_px} px; "
        f"{_judging(result)}; {result.n_tested:,} pictures reported in all. "
        f"Fitted on clean pictures; only reported ones are corrupted. Errors are 1 - balanced accuracy, %, with "
        f"95 % intervals over {_over(result)}; reference: {result.reference}",
        markup=False,
        highlight=False,
    )
    summary = Table("model")
    heads = ["clean error", "mean corrupted error", "mCE", "relative mCE", "ECE clean, corrupted"]
    site = result.models[0].site
    for head in (*heads, *([f"site index, k={site.k}"] if site else [])):
        summary.add_column(head, justify="right", no_wrap=head != heads[1])
    for name, model in zip(names, result.models, strict=True):
        summary.add_row(
            name,
            _told(model.clean_error, 100.0),
            _told(model.mean_corrupted_error, 100.0),
            _told(model.mce),
            _told(model.relative_mce),
            f"{100 * model.clean_ece:.1f}, {100 * model.mean_corrupted_ece:.1f}",
            *([f"{model.site.index:.3f}"] if model.site else []),
        )
    out.print(summary)
    if site:
        out.print(
            f"site index: {site.n:,} pictures, equally many of each class from each site; 1 is biology alone, "
            f"{site.chance:.3f} is features that tell nothing",
            markup=False,
            highlight=False,
        )
    out.print("CE (relative CE), % of the reference's error:")
    table = Table("corruption")
    table.add_column(f"error of {escape(result.reference)} by severity, %", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for i, corruption in enumerate(result.models[0].corruptions):
        found = [model.corruptions[i] for model in result.models]
        table.add_row(
            corruption.name,
            " ".join(f"{100 * error:.1f}" for error in corruption.errors),
            *(f"{_plain(each.ce)} ({_plain(each.relative_ce)})" for each in found),
        )
    out.print(table)
    if result.models[0].noisy_labels:
        out.print("error on right labels after training with wrong ones, % (± sd over splits):")
        out.print(_of_labels(result, names))
    for caveat in result.caveats:
        out.print(f"note: {caveat}", markup=False, highlight=False)


def _judging(result: RobustnessResult) -> str:
    """How many are fitted on, who chose C, who is reported."""
    train, test = (_range([size[i] for size in result.sizes]) for i in (0, 1))
    if not result.own_splits:
        splits = "1 split" if result.n_splits == 1 else f"{result.n_splits} splits"
        return f"{splits} of {train} train (a part of it chose C) / {test} test (reported)"
    few = f" ({result.shots} of each class, drawn anew for each of {result.n_splits} runs)"
    train += f" train{few if result.shots else ''}"
    if result.selected_on == result.reported_on:
        return f"{train} / {test} val (chose C and reports), its own split"
    chose = (
        "val chose C" if result.selected_on == "val" else "a part of it chose C, as it has no val"
    )
    return f"{train}, {chose} / {test} test (reported), its own split"


def _over(result: RobustnessResult) -> str:
    """What intervals draw anew, and how many there are."""
    if result.interval_of == "groups":
        return f"{result.n_groups:,} patients or slides"
    return f"{result.n_groups:,} pictures, each taken as a patient"


def _range(sizes: list[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _of_labels(result: RobustnessResult, names: list[str]) -> Table:
    """Errors after training on wrong labels, clean ones first."""
    table = Table("wrong labels")
    for name in names:
        table.add_column(name, justify="right")
    clean = [(model.clean_error.value, model.clean_error.sd) for model in result.models]
    rows = [(0.0, clean)]
    for i, noisy in enumerate(result.models[0].noisy_labels):
        found = [model.noisy_labels[i] for model in result.models]
        rows.append((noisy.share, [(each.error, each.sd) for each in found]))
    for share, errors in rows:
        told = (f"{100 * e:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}") for e, sd in errors)
        table.add_row(f"{100 * share:g} %", *told)
    return table


def draw_curves(result: RobustnessResult, path: Path) -> None:
    """Writes a PNG: error of every model against severity, one panel a corruption, clean at 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    kinds = [corruption.name for corruption in result.models[0].corruptions]
    columns = min(5, len(kinds))
    rows = -(-len(kinds) // columns)
    drawing = Drawing(figsize=(2.6 * columns, 2.4 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for i, (panel, kind) in enumerate(zip(panels, kinds, strict=False)):
        for n, model in enumerate(result.models):
            errors = [model.clean_error.value, *model.corruptions[i].errors]
            panel.plot(
                [0, *result.severities],
                [100 * error for error in errors],
                marker="o",
                markersize=3,
                color=COLOURS[n % len(COLOURS)],
                linestyle=("-", "--", ":")[n // len(COLOURS) % 3],
                label=model.name,
            )
        chance = 100 * (1 - 1 / len(result.classes))
        panel.axhline(chance, color="#8a8a8a", linewidth=0.8, linestyle=":")
        panel.set_title(kind, fontsize=9)
        panel.set_ylim(0, 100)
        panel.grid(alpha=0.3)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    drawing.supxlabel("severity (0: as they are; dotted: chance)", fontsize=9)
    drawing.supylabel("1 - balanced accuracy, %", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=6, fontsize=8)
    stored = io.BytesIO()
    drawing.savefig(stored, format="png", dpi=110, metadata={"Software": None})
    atomic_write_bytes(path, stored.getvalue())


def _told(figure: Figure | None, scale: float = 1.0) -> str:
    if figure is None:
        return "none"
    told = f"{scale * figure.value:.1f}"
    if figure.low is None or figure.high is None:
        return told
    return f"{told} [{scale * figure.low:.1f}, {scale * figure.high:.1f}]"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{round(value)}"
