"""``pathfm robustness``: how far a model's scores fall when slides are not as they should be.

A probe is fitted on clean training pictures of a labelled samples, and reports on test pictures as they
are and under every corruption at every severity: errors, mCE and relative mCE beside a reference model,
calibration, and accuracy after training on partly wrong labels; with a table of sites, PathoROB's index.
Writes ``robustness.json``, ``robustness.png`` and the features behind them; a rerun makes only what is
missing.

    settings.py  options        folds.py     rows that train, choose and report
    leaking.py   tested pictures that a model had seen in pretraining
    features.py  features of clean and corrupted pictures, on disk
    judging.py   probes         summing.py   counts -> errors, CE, intervals
    sites.py     CSV of sites   results.py, telling.py   what is written, printed and drawn
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from online_patching.stores.local import atomic_write_text
from pathfm.datasets import Benchmark
from pathfm.embeddings import Embeddings
from pathfm.measures import balanced_rows, best_k, neighbours, site_index
from pathfm.robustness.features import make_features
from pathfm.robustness.folds import Folds, known_groups, make_folds, open_samples
from pathfm.robustness.judging import Judged, judge
from pathfm.robustness.leaking import leaks_of
from pathfm.robustness.results import RobustnessResult, Site, model_result, site_result
from pathfm.robustness.settings import RobustnessConfig
from pathfm.robustness.sites import read_sites
from pathfm.robustness.summing import Summed, summed
from pathfm.robustness.telling import draw_curves, show
from pathfm.runtime import (
    as_dict,
    make_folder,
    pick_device,
    plan_precision,
    provenance,
    save_config,
)
from pathfm.tracking import Run, open_run

if TYPE_CHECKING:
    from pathfm.models import Embedder

__all__ = ["RESULT", "RobustnessConfig", "RobustnessResult", "run"]

RESULT = "robustness.json"
_SELECTS = (
    "This data set has no test split: validation chooses C and reports, so errors are too small."
)


def run(config: RobustnessConfig) -> RobustnessResult:
    """Measures every model, writes `<out>/robustness.json` and `.png`, prints the tables."""
    from pathfm.models import load_model  # late: it brings torch, which help texts do without

    samples = open_samples(config)
    places = read_sites(config.sites, samples.paths) if config.sites else None
    if places:
        balanced_rows(samples.labels, places[0], config.seed)  # refused before features are made
    plan = make_folds(samples, config)
    device = pick_device(config.device)
    models = {
        name: load_model(weights, config.backbone, config.input_px).to(device)
        for name, weights in config.named_models().items()
    }
    tested = np.unique(np.concatenate([fold.test for fold in plan.folds]))
    seen = leaks_of(models, samples, tested, config)
    save_config(config, make_folder(config.out), "robustness.yaml")
    tracking = config.tracking.filled(config.out, "robustness")
    facts = provenance() | {"stage": "robustness"}
    with open_run(tracking, config.out, as_dict(config), facts) as tracked:
        tracked.cohort(samples.name, samples.digest, "evaluation")
        result = _measured(models, samples, plan, tested, places, config)
        if plan.selected_on == plan.reported_on:
            result.caveats.insert(0, _SELECTS)
        result.caveats.extend(seen)
        path = config.out / RESULT
        atomic_write_text(path, json.dumps(asdict(result), indent=1, allow_nan=False) + "\n")
        draw_curves(result, path.with_suffix(".png"))
        _record(tracked, result, path)
    show(result)
    print(f"written: {path} and {path.with_suffix('.png')}")
    print(f"next: pathfm compare --results {shlex.quote(str(config.out))} --out page")
    return result


def _measured(
    models: Mapping[str, Embedder],
    samples: Benchmark,
    plan: Folds,
    tested: NDArray[np.int64],
    places: tuple[tuple[str, ...], tuple[str, ...]] | None,
    config: RobustnessConfig,
) -> RobustnessResult:
    files = make_features(models, samples, tested, config)
    judged = {name: _judged(files[name], samples, tested, plan, config) for name in models}
    reference = next(iter(models))
    labels = samples.labels[tested]
    known = known_groups(samples)
    groups = tuple(known[row] for row in tested) if known else ()
    sums = {
        name: summed(
            each,
            judged[reference],
            labels,
            len(samples.classes),
            groups,
            len(config.corruptions),
            config.intervals,
        )
        for name, each in judged.items()
    }
    sites = _sites(files, samples, places, config) if places else {}
    return RobustnessResult(
        data=samples.name,
        data_digest=samples.digest,
        classes=list(samples.classes),
        n=len(samples),
        n_groups=len(set(groups)) if groups else len(tested),
        interval_of="groups" if groups else "pictures",
        sizes=[[len(fold.final), len(fold.test)] for fold in plan.folds],
        n_tested=len(tested),
        n_splits=len(plan.folds),
        own_splits=plan.own,
        selected_on=plan.selected_on,
        reported_on=plan.reported_on,
        shots=plan.shots,
        seed=config.seed,
        input_px=config.input_px,
        precision=plan_precision(config.precision, pick_device(config.device)),
        severities=sorted(config.severities),
        reference=reference,
        models=[
            model_result(
                (name, model.name, model.digest, model.weights_note),
                judged[name],
                sums[name],
                config.corruptions,
                config.noise_shares,
                sites.get(name),
            )
            for name, model in models.items()
        ],
        caveats=_caveats(samples, sums, reference, config),
    )


def _judged(
    files: list[Path],
    samples: Benchmark,
    tested: NDArray[np.int64],
    plan: Folds,
    config: RobustnessConfig,
) -> Judged:
    clean, *corrupted = (Embeddings.load(file).features for file in files)
    n_classes = len(samples.classes)
    return judge(clean, corrupted, tested, samples.labels, n_classes, plan.folds, config)


def _sites(
    files: Mapping[str, list[Path]],
    samples: Benchmark,
    places: tuple[tuple[str, ...], tuple[str, ...]],
    config: RobustnessConfig,
) -> dict[str, Site]:
    """The site index of every model, all at one k, on as many pictures of each class from each site."""
    kept = balanced_rows(samples.labels, places[0], config.seed)
    slides = places[1] or known_groups(samples)
    sites, slides = (tuple(x[row] for row in kept) if x else () for x in (places[0], slides))
    labels = samples.labels[kept]
    nearest = {
        name: neighbours(Embeddings.load(paths[0]).features[kept], slides)
        for name, paths in files.items()
    }
    best = {name: best_k(found, labels) for name, found in nearest.items()}
    k = config.k or int(np.median(list(best.values())))
    return {
        name: site_result(site_index(found, labels, sites, k, slides), best[name])
        for name, found in nearest.items()
    }


def _caveats(
    samples: Benchmark, sums: Mapping[str, Summed], reference: str, config: RobustnessConfig
) -> list[str]:
    ce = sums[reference].ce
    told = []
    for used, what, why in (
        (ce.used, "mCE", "errs on less than 1 % there"),
        (ce.relative_used, "relative mCE", "errs hardly more there than on clean pictures"),
    ):
        left = [name for name, is_used in zip(config.corruptions, used, strict=True) if not is_used]
        if left:
            told.append(f"{what} leaves out {', '.join(left)}: {reference} {why}.")
    told += [f"{name}, {why}" for name, each in sums.items() for why in each.no_interval]
    if (found := sums[reference].clean_interval) is not None:
        told += found.caveats
    if len(set(config.severities)) < 5 or len(config.corruptions) < 9:
        told.append(
            "Not all corruptions and severities were used: compare mCE within this table only."
        )
    if not known_groups(samples):
        told.append(
            "No slide or patient ids: neighbouring patches can fall on both sides of a "
            "split and intervals take pictures as independent, so errors and intervals are too small."
        )
    return told


def _record(tracked: Run, result: RobustnessResult, path: Path) -> None:
    """Tells MLflow the summary of every model and the error at each severity as a step."""
    for model in result.models:
        at = model.name
        for name in ("clean_error", "mean_corrupted_error", "mce", "relative_mce"):
            figure = getattr(model, name)
            if figure is not None:
                tracked.summary(**{f"{at}/{name}": figure.value})
        tracked.summary(**{f"{at}/ece": model.clean_ece})
        if model.site is not None:
            tracked.summary(**{f"{at}/site_index": model.site.index})
        for corruption in model.corruptions:
            for severity, error in zip(result.severities, corruption.errors, strict=True):
                tracked.log(severity, **{f"{at}/error/{corruption.name}": error})
    tracked.artifact(path)
    tracked.picture(path.with_suffix(".png"))
