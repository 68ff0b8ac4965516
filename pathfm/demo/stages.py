"""The demo's stages: what each verb is called with, and the runs of those that do not track."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathfm import compare, embed, foreground, index, pretrain, probe, report
from pathfm.demo import SET_BY_DEMO, DemoConfig, DemoResult
from pathfm.demo.inputs import find_inputs, refuse_missing
from pathfm.runtime import (
    PathfmError,
    as_dict,
    console,
    make_folder,
    provenance,
    save_config,
    stage,
    titled,
    without_secrets,
)
from pathfm.tracking import Run, TrackingConfig, open_run, ui_command
from pathfm.tracking.journal import read_state


def run_stages(config: DemoConfig) -> DemoResult:
    """The story of a demo, from slides to the pages about it."""
    began_s = time.monotonic()
    demo = Demo(config)
    _check_backbone(demo)
    refuse_missing(config)
    make_folder(config.out)
    leave_out = {part: set(names) for part, names in SET_BY_DEMO.items()}
    save_config(config, config.out, "demo.yaml", leave_out)
    with demo.open("demo", _own_params(config)) as parent:
        demo.parent_id = parent.run_id
        with demo.stage("slides and labelled patches"):
            slides, patches = find_inputs(config)
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
            page = _report(demo, parent)
        parent.summary(**{f"seconds/{name}": s for name, s in demo.seconds.items()})
    with demo.stage("compare"):
        compared = _compare(demo)
    _show(demo, page, compared, probed, time.monotonic() - began_s)
    return DemoResult(config.out, page, compared, demo.seconds, probed.verdict)


@dataclass
class Demo:
    """The paths and the tracking of one demo, shared by its stages."""

    config: DemoConfig
    parent_id: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def init(self) -> str:
        """Where pretraining starts, and what its outcome is compared with: the very same weights."""
        weights = self.config.weights
        return f"random:{self.config.pretrain.seed}" if weights == "random" else weights

    @property
    def store(self) -> str:
        """URI of the MLflow store of all its runs."""
        return TrackingConfig(uri=self.config.tracking_uri).store(self.config.out)

    def folder(self, *names: str) -> Path:
        """A path below the demo's folder."""
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


def _check_backbone(demo: Demo) -> None:
    """Raises PathfmError for a backbone or sizes that stages would refuse minutes from now."""
    from pathfm.backbone import load_backbone
    from pathfm.pretrain.trainer import check_views_fit

    backbone = load_backbone(demo.config.backbone, demo.init)
    backbone.check_input(demo.config.input_px, "input_px")
    check_views_fit(demo.config.pretrain, backbone)


def _own_params(config: DemoConfig) -> dict[str, Any]:
    """The demo's options, without those of its stages: each stage logs its own."""
    stages = tuple(f"{name}." for name in SET_BY_DEMO)
    return {k: v for k, v in as_dict(config).items() if not k.startswith(stages)}


def _index(demo: Demo, slides: tuple[str, ...]) -> None:
    config = index.IndexConfig(
        slides=slides, out=demo.folder("corpus"), mpp_overrides=demo.config.mpp_overrides
    )
    with demo.open("index", as_dict(config)) as tracked:
        result = index.run(config)
        tracked.cohort("slides", result.cohort_digest, "indexing")
        tracked.summary(
            slides=result.slides, skipped=sum(result.skipped.values()), tiles=result.tiles
        )
        for name in ("slides.csv", "skipped.csv"):
            tracked.artifact(config.out / name)


def _foreground(demo: Demo) -> None:
    config = demo.config.foreground.model_copy(update={"corpus": demo.folder("corpus")})
    with demo.open("foreground", as_dict(config)) as tracked:
        result = foreground.run(config)
        tracked.summary(
            usable=len(result.usable), tissue_mm2=sum(row.tissue_mm2 for row in result.slides)
        )
        tracked.artifact(config.corpus / "foreground.csv")
        for row in result.usable:
            tracked.picture(config.corpus / "overlays" / f"{row.slide_id}.jpg")


def _pretrain(demo: Demo) -> Path:
    out = demo.folder("runs", "pretrain")
    result = pretrain.run(
        demo.config.pretrain.model_copy(
            update={
                "corpus": demo.folder("corpus"),
                "out": out,
                "backbone": demo.config.backbone,
                "weights": demo.init,
                "tracking": demo.tracking("pretrain"),
            }
        )
    )
    if result.exit_code == 128 + signal.SIGINT:
        raise KeyboardInterrupt  # of the whole demo
    if not result.finished:
        raise PathfmError(
            f"pretraining stopped after {result.steps:,} of {demo.config.pretrain.steps:,} steps, as "
            "it was told to; the same command goes on, with the stages after it too"
        )
    return out


def _embed(demo: Demo, patches: Path, run_folder: Path) -> None:
    """Features before and after, of the same pictures at the same input size."""
    for name, weights in (("init", demo.init), ("pretrained", str(run_folder))):
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


def _probe(demo: Demo, parent: Run) -> probe.ProbeResult:
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


def _report(demo: Demo, parent: Run) -> Path:
    path = report.run(report.ReportConfig(folder=demo.config.out)).path
    parent.artifact(path)
    return path


def _compare(demo: Demo) -> Path:
    """Its page, of what the demo's runs keep in the store; runs of other demos in the experiment too."""
    out = demo.folder("compare")
    compare.run(compare.CompareConfig(uri=demo.store, experiment=demo.config.experiment, out=out))
    return out / "compare.html"


def _show(
    demo: Demo, page: Path, compared: Path, probed: probe.ProbeResult, total_s: float
) -> None:
    out, config = console(), demo.config
    table = titled(f"stages, {total_s:.0f} s in all")
    table.add_column("stage")
    table.add_column("s", justify="right")
    for name, seconds in demo.seconds.items():
        table.add_row(name, f"{seconds:.1f}")
    out.print(table)
    out.rule("[bold]what came out", align="left")
    probe.show(probed)
    run_folder = demo.folder("runs", "pretrain")
    run_word, store_word = shlex.quote(str(run_folder)), shlex.quote(without_secrets(demo.store))
    experiment_word = shlex.quote(config.experiment)
    lines = [
        f"(init: {probed.backbones[0].weights_note})",
        "",
        f"the run:      {page.resolve().as_uri()}",
        "              (slides and their masks, what was drawn from them, curves, the probe)",
        f"the results:  {compared.resolve().as_uri()}",
        "              (a leaderboard of the backbones with intervals, before against after, maps of the features)",
        f"MLflow:       {ui_command(demo.store)}",
        f"go on with:   pathfm pretrain {shlex.quote(f'{run_folder}/config.yaml')} --help",
        f"              pathfm compare --uri {store_word} --experiment {experiment_word}",
        f"              pathfm embed --data YOUR_PATCHES --weights {run_word} --name mine",
    ]
    out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
