"""``pathfm demo``: the whole way in one command, from slides to a probed model and a page about it.

index -> foreground -> pretrain -> embed (initial and pretrained weights) -> probe -> compare ->
report, in one MLflow experiment: a parent run with a child for each stage. Without arguments it
draws its own slides, and cuts the labelled patches of the probe from other slides, drawn from other
seeds, that pretraining never sees. Every stage skips what is done, so the same command goes on
where it was interrupted.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, field_validator, model_validator
from rich.table import Table

from pathfm.config import merge
from pathfm.foreground import ForegroundConfig
from pathfm.pretrain import PretrainConfig
from pathfm.probe import ProbeResult
from pathfm.runtime import as_dict, console, make_folder, progress, provenance, save_config, stage
from pathfm.tracking import Run, TrackingConfig, open_run, ui_command
from pathfm.tracking.journal import read_state

_HELD_OUT_SEEDS = 500  # the probe's slides are drawn from seeds so far from pretraining's
_HELD_OUT_SLIDES = 10
_SET_BY_DEMO = {
    "pretrain": ("corpus", "out", "tracking", "backbone", "weights"),
    "foreground": ("corpus",),
}


# Pretraining that two cores finish in minutes: 4,096 patches, small views (five times as many
# patches a second as at 224 and 96 px), a head in proportion (the paper's has 65,536 prototypes).
_PRETRAIN: dict[str, Any] = {
    "steps": 128,
    "batch_size": 32,
    "checkpoint_every_steps": 32,
    "monitor_patches": 256,
    "optim": {"warmup_steps": 10},
    "dino": {"out_dim": 2048, "hidden_dim": 1024},
    "views": {
        "global_1": {"size_px": 112},
        "global_2": {"size_px": 112},
        "local": {"size_px": 48},
        "n_local": 4,
    },
}


class DemoConfig(BaseModel, frozen=True, extra="forbid"):
    """What to run the whole way on."""

    out: Path = Field(Path("demo_out"), description="folder for everything")
    slides: tuple[str, ...] | None = Field(
        None, description="your slides, as `pathfm index` takes them; unset: synthetic ones"
    )
    mpp_overrides: Path | None = Field(
        None, description="CSV with columns file, mpp: µm/px where files carry none"
    )
    patches: Path | None = Field(
        None, description="labelled folder PATCHES/<class>/*.png for the probe; unset: synthetic"
    )
    backbone: str = Field("vit_tiny_patch16_224", description="timm name of the ViT")
    weights: str = Field(
        "random", description="where pretraining starts: random[:SEED], imagenet, or a .safetensors"
    )
    n_slides: int = Field(5, ge=1, le=100, description="synthetic slides to draw")
    per_class: int = Field(120, ge=4, description="synthetic labelled patches of each class")
    seed: int = Field(0, ge=0, description="seed of everything drawn")
    input_px: int = Field(224, ge=16, le=2048, description="input side of embeddings, px")
    n_seeds: int = Field(5, ge=1, le=1000, description="splits and heads of the probe")
    device: str = Field("auto", description="torch device of the embeddings: auto, cpu, cuda:N")
    tracking_uri: str | None = Field(
        None, description="MLflow store; unset: $MLFLOW_TRACKING_URI, else mlflow.db in OUT"
    )
    experiment: str = Field("pathfm-demo", min_length=1, description="MLflow experiment")
    foreground: ForegroundConfig = Field(ForegroundConfig(), description="the foreground stage")
    pretrain: PretrainConfig = Field(
        default_factory=lambda: PretrainConfig.model_validate(_PRETRAIN),
        description="the pretraining stage; small enough for two cores",
    )

    @field_validator("slides", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (str(value),) if isinstance(value, (str, Path)) else value

    @field_validator("pretrain", mode="before")
    @classmethod
    def _over_the_demo_s_own(cls, given: Any) -> Any:
        """What is not said is the demo's, not the default of a run on a GPU."""
        if not isinstance(given, Mapping):
            return given
        values = copy.deepcopy(_PRETRAIN)
        merge(values, given)
        return values

    @model_validator(mode="after")
    def _paths_are_the_demo_s(self) -> DemoConfig:
        for part, names in _SET_BY_DEMO.items():
            for name in names:
                if name in getattr(self, part).model_fields_set:
                    raise ValueError(
                        f"{part}.{name} follows from the demo's own options: leave it out"
                    )
        return self


@dataclass(frozen=True)
class DemoResult:
    """Where everything is, how long it took, and the verdict."""

    out: Path
    report: Path
    seconds: dict[str, float]
    verdict: str


@dataclass
class _Demo:
    """The paths and the tracking of one demo, shared by its stages."""

    config: DemoConfig
    parent_id: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def store(self) -> str:
        return TrackingConfig(uri=self.config.tracking_uri).store(self.config.out)

    def folder(self, *names: str) -> Path:
        return self.config.out.joinpath(*names)

    def tracking(self, name: str) -> TrackingConfig:
        """The tracking of a child run."""
        return TrackingConfig(
            uri=self.store,
            experiment=self.config.experiment,
            run_name=name,
            parent_run_id=self.parent_id or None,
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A headline before, the time after."""
        console().rule(f"[bold]{name}", align="left")
        with stage(name, self.seconds):
            yield
        print(f"{name}: {self.seconds[name]:.1f} s", flush=True)

    def open(self, name: str, params: dict[str, Any]) -> Run:
        """The run of the whole, or of a stage that does not track itself; an old one goes on."""
        folder = self.folder("stages", name)
        state = read_state(folder)
        run_id = (state.run_id or f"pending-{state.key}") if state else None
        tags = provenance() | {"stage": name}
        return open_run(self.tracking(name), folder, params, tags, run_id)


def run(config: DemoConfig) -> DemoResult:
    """Runs every stage that is not done yet and prints the table, the page and what to type next."""
    began_s = time.monotonic()
    demo = _Demo(config)
    make_folder(config.out)
    save_config(config, config.out, "demo.yaml")
    with demo.open("demo", _own_params(config)) as parent:
        demo.parent_id = parent.run_id
        with demo.stage("slides and labelled patches"):
            slides, patches = _inputs(demo)
        with demo.stage("index"):
            _index(demo, slides)
        with demo.stage("foreground"):
            _foreground(demo)
        with demo.stage("pretrain"):
            run_folder = _pretrain(demo)
        with demo.stage("embed"):
            _embed(demo, patches, run_folder)
        with demo.stage("probe"):
            probed = _probe(demo, parent)
        with demo.stage("report"):
            report = _report(demo, parent)
        parent.summary(**{f"seconds/{_key(name)}": s for name, s in demo.seconds.items()})
    with demo.stage("compare"):
        _compare(demo)
    _show(demo, report, probed, time.monotonic() - began_s)
    return DemoResult(config.out, report, demo.seconds, probed.verdict)


def _own_params(config: DemoConfig) -> dict[str, Any]:
    """The demo's options, without those of its stages: each stage logs its own."""
    stages = tuple(f"{name}." for name in _SET_BY_DEMO)
    return {k: v for k, v in as_dict(config).items() if not k.startswith(stages)}


def _inputs(demo: _Demo) -> tuple[tuple[str, ...], Path]:
    """The slides to index and the labelled folder to probe, drawn where none are given."""
    config = demo.config
    slides = config.slides
    if slides is None:
        slides = _draw_slides(demo)
        print(f"{len(slides)} synthetic slides in {demo.folder('slides')}")
    patches = config.patches
    if patches is None:
        patches = _draw_patches(demo)
        print(
            f"labelled patches in {patches}: {config.per_class} of each class, cut from "
            f"{_HELD_OUT_SLIDES} synthetic slides that pretraining does not see"
        )
    return slides, patches


def _draw_slides(demo: _Demo) -> tuple[str, ...]:
    from online_patching.testing import write_demo_slides

    config, folder = demo.config, demo.folder("slides")
    with progress(100 * config.n_slides, "%", "drawing slides") as bar:

        def tell(number: int, share: float) -> None:
            bar.advance(round(100 * (number + share)) - bar.done)

        written = write_demo_slides(folder, config.n_slides, config.seed, tell)
    return tuple(str(slide.path) for slide in written)


def _draw_patches(demo: _Demo) -> Path:
    """The labelled folder, made aside and renamed when it is whole; kept while the recipe is."""
    from online_patching.testing import demo_slides, write_labelled_patches
    from pathfm.cohort import write_csv

    config, folder = demo.config, demo.folder("patches")
    recipe = json.dumps({"seed": config.seed, "per_class": config.per_class, "rules": 1})
    done = folder / "recipe.json"
    if done.exists() and done.read_text() == recipe:
        return folder
    draft = demo.folder(".patches.draft")
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


def _index(demo: _Demo, slides: tuple[str, ...]) -> None:
    from pathfm import index

    config = index.IndexConfig(
        slides=slides, out=demo.folder("corpus"), mpp_overrides=demo.config.mpp_overrides
    )
    with demo.open("index", as_dict(config)) as tracked:
        result = index.run(config)
        tracked.cohort("slides", result.cohort_digest, "indexing")
        tracked.summary(
            slides=len(result.slides),
            skipped=len(result.skipped),
            tiles=sum(slide.n_tiles for slide in result.slides),
        )
        for name in ("slides.csv", "skipped.csv"):
            tracked.artifact(config.out / name)


def _foreground(demo: _Demo) -> None:
    from pathfm import foreground

    config = demo.config.foreground.model_copy(update={"corpus": demo.folder("corpus")})
    with demo.open("foreground", as_dict(config)) as tracked:
        result = foreground.run(config)
        tracked.summary(
            usable=len(result.usable), tissue_mm2=sum(row.tissue_mm2 for row in result.slides)
        )
        tracked.artifact(config.corpus / "foreground.csv")
        for row in result.usable:
            tracked.picture(config.corpus / "overlays" / f"{row.slide_id}.jpg")


def _pretrain(demo: _Demo) -> Path:
    from pathfm import pretrain

    out = demo.folder("runs", "pretrain")
    pretrain.run(
        demo.config.pretrain.model_copy(
            update={
                "corpus": demo.folder("corpus"),
                "out": out,
                "backbone": demo.config.backbone,
                "weights": demo.config.weights,
                "tracking": demo.tracking("pretrain"),
            }
        )
    )
    return out


def _embed(demo: _Demo, patches: Path, run_folder: Path) -> None:
    """Features before and after, of the same pictures at the same input size."""
    from pathfm import embed

    for name, weights in (("init", demo.config.weights), ("pretrained", str(run_folder))):
        embed.run(
            embed.EmbedConfig(
                data=patches,
                weights=weights,
                backbone=demo.config.backbone,
                name=name,
                out=demo.folder("embeddings"),
                input_px=demo.config.input_px,
                device=demo.config.device,
                tracking=demo.tracking(f"embed {name}"),
            )
        )


def _probe(demo: _Demo, parent: Run) -> ProbeResult:
    from pathfm import probe

    files = [demo.folder("embeddings", f"{name}.safetensors") for name in ("init", "pretrained")]
    result = probe.run(
        probe.ProbeConfig(
            embeddings=files,
            out=demo.folder("probe"),
            n_seeds=demo.config.n_seeds,
            seed=demo.config.seed,
            tracking=demo.tracking("probe"),
        )
    )
    for backbone in result.backbones:
        for kind, scores in backbone.probes.items():
            at = f"{backbone.name}/{kind}"
            parent.summary(**{f"{at}.mean": scores.mean, f"{at}.sd": scores.sd})
    return result


def _report(demo: _Demo, parent: Run) -> Path:
    from pathfm import report

    path = report.run(report.ReportConfig(folder=demo.config.out)).path
    parent.artifact(path)
    return path


def _compare(demo: _Demo) -> None:
    from pathfm import compare

    compare.run(compare.CompareConfig(uri=demo.store, experiment=demo.config.experiment))


def _key(name: str) -> str:
    return name.replace(" ", "_")


def _show(demo: _Demo, report: Path, probed: ProbeResult, total_s: float) -> None:
    from pathfm import probe

    out, config = console(), demo.config
    table = Table(title=f"stages, {total_s:.0f} s in all", title_justify="left")
    table.add_column("stage")
    table.add_column("s", justify="right")
    for name, seconds in demo.seconds.items():
        table.add_row(name, f"{seconds:.1f}")
    out.print(table)
    out.rule("[bold]what came out", align="left")
    probe.show(probed)
    run_folder = demo.folder("runs", "pretrain")
    lines = [
        f"(init: {probed.backbones[0].weights_note})",
        "",
        f"the page:     {report.resolve().as_uri()}",
        f"MLflow:       {ui_command(demo.store)}",
        f"go on with:   pathfm pretrain {run_folder}/config.yaml --help",
        f"              pathfm compare --uri {demo.store} --experiment {config.experiment}",
        f"              pathfm embed --data YOUR_PATCHES --weights {run_folder} --name mine",
    ]
    out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
