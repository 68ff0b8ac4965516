"""A probing's tables, as a person reads them."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from pathfm.probing.result import ProbeResult, by_model
from pathfm.probing.scoring import Scores, sd_of
from pathfm.runtime import console, titled

_NAMES = {"logistic": "logistic", "eva": "eva's head"}


def show(result: ProbeResult) -> None:
    """Prints the scores, the per-class recall, few-shot, the verdict and the caveats."""
    out = console()
    out.print(about(result), markup=False, highlight=False)
    out.print(score_table(result))
    if any(s.ece for b in result.backbones for s in b.probes.values()):
        out.print(calibration_table(result))
    for table in mpp_tables(result):
        out.print(table)
    out.print(recall_table(result))
    if any(b.few_shot for b in result.backbones):
        out.print(shot_table(result))
    if result.paired:
        out.print(f"baseline: {result.paired[0].baseline}", markup=False, highlight=False)
        out.print(result.verdict, markup=False, highlight=False)
    for caveat in result.caveats:
        out.print(f"note: {caveat}", markup=False, highlight=False)


def about(result: ProbeResult) -> str:
    """What was measured on what, and what chose."""
    return (
        f"{result.data}: {result.n:,} pictures, {len(result.classes)} classes, input {result.input_px} px, "
        f"{_sizes(result)}. Balanced accuracy, %, mean{_spread(result)}, [95 % interval{_over(result)}]:"
    )


def _sizes(result: ProbeResult) -> str:
    """How many are fitted on, what chooses, what is reported."""
    if not result.own_splits:
        train, test = (_range([size[i] for size in result.sizes], n) for i, n in _given(result))
        return f"{result.n_seeds} splits of {train} train (a part of it chooses) / {test} test (reported)"
    few = f" ({result.shots} of each class, drawn anew for each of {result.n_seeds} runs)"
    train = f"{result.n_train:,} train{few if result.shots else ''}"
    if result.reported_on == "val":
        return f"{train} / {result.n_val:,} val (chooses and reports), its own split"
    chooses = "chooses; cut out of its train, as it has none" if result.carved else "chooses"
    return f"{train} / {result.n_val:,} val ({chooses}) / {result.n_test:,} test (reported), its own split"


def _given(result: ProbeResult) -> list[tuple[int, int]]:
    return [(0, result.n_train), (1, result.n_test)]


def _range(sizes: list[int], otherwise: int) -> str:
    low, high = (min(sizes), max(sizes)) if sizes else (otherwise, otherwise)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _spread(result: ProbeResult) -> str:
    """What the ± is over; "" where every probe has one repeat."""
    several = any(len(s.values) > 1 for b in result.backbones for s in b.probes.values())
    return f" ± sd over {'runs' if result.own_splits else 'splits'}" if several else ""


def _over(result: ProbeResult) -> str:
    """What an interval draws anew, and how many there are."""
    scores = next(iter(result.backbones[0].probes.values()))
    if not scores.n_groups:  # of an earlier version
        return ""
    kind = (
        "patients or slides"
        if scores.interval_of == "groups"
        else "pictures, each taken as a patient"
    )
    return f" over {scores.n_groups:,} {kind}"


def score_table(result: ProbeResult) -> Table:
    """One row a backbone, one column a probe."""
    probes = list(result.backbones[0].probes)
    mixed = len({b.precision for b in result.backbones}) > 1
    table = Table("backbone")
    for probe in probes:
        name = f"kNN, k={result.k}" if probe == "knn" else _NAMES[probe]
        if probe == "eva":
            name += f", {len(result.backbones[0].probes[probe].values)} runs"
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("RankMe", justify="right", no_wrap=True)
    for b in result.backbones:
        table.add_row(
            escape(f"{b.name} ({b.precision})" if mixed else b.name),
            *(_told(b.probes[probe]) for probe in probes),
            f"{b.rankme:.1f} of {b.dim}",
        )
    return table


def calibration_table(result: ProbeResult) -> Table:
    """Calibration error of each probe, and which way it errs."""
    title = "calibration error (ECE, 15 bins), % (confidence minus accuracy: + too sure)"
    table = titled(title, "backbone")
    probes = list(result.backbones[0].probes)
    for probe in probes:
        table.add_column(_NAMES.get(probe, "kNN, shares of votes"), justify="right", no_wrap=True)
    for b in result.backbones:
        table.add_row(escape(b.name), *(_calibrated(b.probes[probe]) for probe in probes))
    return table


def _calibrated(scores: Scores) -> str:
    if not scores.ece:
        return "not known"
    sure = sum(scores.overconfidence) / len(scores.overconfidence)
    spread = f" ± {100 * sd_of(scores.ece):.1f}" if len(scores.ece) > 1 else ""
    return f"{100 * scores.mean_ece:.1f}{spread} ({100 * sure:+.1f})"


def mpp_tables(result: ProbeResult) -> list[Table]:
    """Scores by µm/px of the input: a table for models of several, one for data whose rows differ in it."""
    made = []
    models = [m for m in by_model(result.backbones) if len(m.at) > 1]
    if models:
        rows = [(m.name, {b.mpp: (result.n_test, b.probes) for b in m.at}) for m in models]
        made.append(_mpp_table("each µm/px a probe of its own, same pictures", rows))
    mixed = [b for b in result.backbones if b.by_mpp]
    if mixed:
        rows = [(b.name, {at.mpp: (at.n, at.probes) for at in b.by_mpp}) for b in mixed]
        made.append(_mpp_table("one probe for all, other pictures at each", rows))
    return made


def _mpp_table(
    how: str, rows: list[tuple[str, dict[float, tuple[int, dict[str, Scores]]]]]
) -> Table:
    title = f"balanced accuracy by µm/px of the input, %; {how}"
    every = sorted({mpp for _, at in rows for mpp in at})
    table = titled(title, "model", "probe")
    for mpp in every:
        table.add_column(f"{mpp:g} µm/px", justify="right", no_wrap=True)
    for name, at in rows:
        ns = (f"{at[mpp][0]:,}" if mpp in at else "" for mpp in every)
        table.add_row(escape(name), "pictures reported", *ns, style="dim")
        for probe in next(iter(at.values()))[1]:
            cells = (_told(at[mpp][1][probe]) if mpp in at else "" for mpp in every)
            table.add_row(escape(name), _NAMES.get(probe, "kNN"), *cells)
    return table


def recall_table(result: ProbeResult) -> Table:
    """Recall of each class by the logistic probe."""
    table = titled("recall of each class, %, logistic", "backbone")
    for name in result.classes:
        table.add_column(escape(name), justify="right")
    for b in result.backbones:
        values = b.probes["logistic"].recall
        table.add_row(escape(b.name), *("-" if v is None else f"{100 * v:.0f}" for v in values))
    return table


def shot_table(result: ProbeResult) -> Table:
    """One row a backbone and method, one column a number of shots."""
    first = next(b for b in result.backbones if b.few_shot)
    some = next(iter(first.few_shot.values()))
    title = f"few-shot, balanced accuracy, %, mean ± sd over {len(some.values[0])} draws"
    table = titled(title, "backbone", "method")
    for k in some.shots:
        table.add_column(f"k={k}", justify="right", no_wrap=True)
    for b in result.backbones:
        for method, scores in b.few_shot.items():
            cells = zip(scores.mean, scores.sd, strict=True)
            told = (f"{100 * mean:.1f} ± {100 * sd:.1f}" for mean, sd in cells)
            table.add_row(escape(b.name), method, *told)
    return table


def _told(scores: Scores) -> str:
    text = f"{100 * scores.mean:.1f}"
    if len(scores.values) > 1:
        text += f" ± {100 * scores.sd:.1f}"
    if scores.interval:
        low, high = (100 * x for x in scores.interval)
        return text + escape(f" [{low:.1f}, {high:.1f}]")
    return text + escape(" [none]")
