"""The demo's inputs: what the user gives, or synthetic slides and patches of known class."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

from online_patching.testing import demo_slides, write_demo_slides, write_labelled_patches
from pathfm.cohorts import absent, write_csv
from pathfm.demo import DemoConfig
from pathfm.runtime import PathfmError, counted, progress

_HELD_OUT_SEEDS = 500  # the probe's slides are drawn from seeds so far from pretraining's
_HELD_OUT_SLIDES = 28  # five splits test 20 of them or more: of fewer an interval is too short


def refuse_missing(config: DemoConfig) -> None:
    """PathfmError, before anything is drawn, for what was given and is not there."""
    given = {"mpp-overrides": config.mpp_overrides, "patches": config.patches}
    gone = [f"--{name} {path}" for name, path in given.items() if path and not path.exists()]
    gone += [f"--slides {source}" for source in absent(config.slides or ())]
    if gone:
        raise PathfmError(f"demo: {', '.join(gone)}: not there")


def find_inputs(config: DemoConfig) -> tuple[tuple[str, ...], Path]:
    """The slides to index and the labelled folder to probe, drawn where none are given."""
    slides = config.slides
    if slides is None:
        slides = _draw_slides(config)
        print(f"{counted(len(slides), 'synthetic slide')} in {config.out / 'slides'}")
    patches = config.patches
    if patches is None:
        patches = _draw_patches(config)
        print(
            f"labelled patches in {patches}: {config.per_class} of each class, cut from "
            f"{_HELD_OUT_SLIDES} synthetic slides that pretraining does not see"
        )
    return slides, patches


def _draw_slides(config: DemoConfig) -> tuple[str, ...]:
    folder = config.out / "slides"
    with progress(100, "%", "drawing slides") as bar:  # of all of them

        def tell(number: int, share: float) -> None:
            bar.advance(int(100 * (number + share) / config.n_slides) - bar.done)

        written = write_demo_slides(folder, config.n_slides, config.seed, tell)
    return tuple(str(slide.path) for slide in written)


def _draw_patches(config: DemoConfig) -> Path:
    """The labelled folder, made aside and renamed when it is whole; kept while the recipe is."""
    folder = config.out / "patches"
    recipe = json.dumps({"seed": config.seed, "per_class": config.per_class, "rules": 2})
    done = folder / "recipe.json"
    if done.exists() and done.read_text(errors="replace") == recipe:
        return folder
    _refuse_if_not_ours(folder)
    draft = config.out / ".patches.draft"
    for old in (draft, folder):
        shutil.rmtree(old, ignore_errors=True)
    slides = demo_slides(_HELD_OUT_SLIDES, config.seed + _HELD_OUT_SEEDS)
    write_labelled_patches(draft, slides, per_class=config.per_class, seed=config.seed)
    pictures = sorted(path.relative_to(draft) for path in draft.glob("*/*.png"))
    # the slide a patch comes from: no slide is on both sides of a split
    groups = [(path.as_posix(), path.name.partition("_")[0]) for path in pictures]
    write_csv(draft / "groups.csv", ("path", "group"), groups)
    (draft / "recipe.json").write_text(recipe)
    os.replace(draft, folder)
    return folder


def _refuse_if_not_ours(folder: Path) -> None:
    """Raises PathfmError when the folder holds anything but patches an earlier demo drew."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        ours = {"seed", "per_class", "rules"} == set(
            json.loads((folder / "recipe.json").read_text())
        )
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise PathfmError(
            f"{folder} was not made by the demo, which would replace it by synthetic patches: give "
            f"--patches {shlex.quote(str(folder))} to probe on it, or another --out"
        )
