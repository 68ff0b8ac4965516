"""What a run sees of itself: probe, RankMe, feature std, collapse, memory, pictures.

The loop calls `Watch` on every rank; features are gathered, files and MLflow are the first rank's.
Nothing here changes what is learnt: no gradient, no random number, every module's mode put back.

In MLflow the run is the parent. The probe is a child of it, with its own params (folder, split, k,
C) and its own series over optimizer steps done, so that probes of several runs compare at a glance.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from pathfm.metrics import rankme
from pathfm.pretrain.collapse import CollapseWatch, Expected, feature_std
from pathfm.pretrain.curves import Curves
from pathfm.pretrain.embedding import Patches, Watched, embed_patches
from pathfm.pretrain.probing import InTrainingProbe, ProbeScores, open_probe
from pathfm.pretrain.records import save_mosaic
from pathfm.pretrain.showing import save_batch, save_classes, save_view_rows
from pathfm.pretrain.watch_settings import WatchConfig
from pathfm.ranks import Ranks
from pathfm.runtime import PathfmError, one_line
from pathfm.tracking import Run, open_run, read_metrics, unfinished_run

PROBE_FOLDER = "probe"
_MOST_CLASSES = 50  # whose recall is a series of its own
_CONNECT_S = 5.0
_MEMORY_EVERY_STEPS = 20


class Watch:
    """Measures, draws and warns; `state` goes into checkpoints, `facts` to the progress line."""

    def __init__(
        self,
        config: WatchConfig,
        folder: Path,
        run: Run | None,
        ranks: Ranks,
        state: Mapping[str, Any] | None = None,
        probe: InTrainingProbe | None = None,
    ) -> None:
        """On every rank, once in a process's life. run: the tracked run, None but on the first.

        state: what `state` was in the checkpoint that the run goes on from. probe: what `open_probe`
        gave, opened here where it is left out. Raises PathfmError for a probe folder that cannot be used.
        """
        given = dict(state or {})
        self.config, self.folder, self.ranks = config, folder, ranks
        self._run = run if ranks.first else None
        self._probe = probe or open_probe(config, ranks)
        digest = self._probe.data.digest if self._probe else ""
        same_probe = given.get("probe_digest") == digest
        self._probe_run_id: str | None = given.get("probe_run_id") if same_probe else None
        self._numbers: dict[str, dict[str, float]] = {
            name: _known(given.get(name, {}), probes=same_probe) for name in ("start", "last")
        }
        self._best: dict[str, float] = dict(given.get("best", {})) if same_probe else {}
        self._collapse = CollapseWatch(config.collapse, given.get("collapse"))
        self._child: Run | None = None
        self._curves, self._curves_stale, self._title = Curves(), False, ""
        self._monitor: Patches | None = None
        self._gpu_gb = math.nan
        self._expected = Expected()

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from; JSON, equal on every rank but for the child's id."""
        return {
            **self._numbers,
            "best": self._best,
            "collapse": self._collapse.state,
            "probe_digest": self._probe.data.digest if self._probe else "",
            "probe_run_id": self._child.run_id if self._child else self._probe_run_id,
        }

    def begin(self, trainer: Watched, monitor: Patches) -> None:
        """Before a life's first step, on every rank: pictures and all measures at step 0.

        monitor: the run's first patches, the same on every rank. A run that goes on (`trainer.done`)
        measures nothing again. The tracked run has been cut back to its checkpoint before.
        """
        self._monitor, done = monitor, int(trainer.done.step)
        config = trainer.config
        self._expected = Expected.of(config)
        name = self.folder.resolve().name
        said = [word for word in (config.method, config.backbone) if word not in name]
        self._title = ", ".join([name, *said])
        self._open_child(trainer, done)
        if done:
            if self.ranks.first:
                self._curves.add(-1, self._numbers["start"])
                for row in read_metrics(self.folder):
                    self._curves.add(int(row["step"]), row)
            return
        self._numbers["start"] = self._measure(trainer) | self._score(trainer, 0)
        self._numbers["last"] = dict(self._numbers["start"])
        self._curves.add(-1, self._numbers["start"])
        if self._run is not None:
            start = self._numbers["start"]
            self._run.summary(**{f"{key}_start": value for key, value in start.items()})
        self._keep(
            {"mosaic.jpg": self._save_monitor, "views.jpg": self._save_views(monitor, config)}
        )

    def after_step(
        self, step: int, trainer: Watched, batch: Patches, metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """What there is to log beside `metrics` of the step just done; call it on every rank.

        step counts from 0. rankme, feature_std, probe_knn and probe_logistic come every so many
        steps, measured after the step's update; on a GPU also gpu_memory_gb and its peak (10^9
        bytes), every 20 steps, for asking takes a fraction of a millisecond.
        """
        done, config = step + 1, self.config
        last = done == trainer.config.steps
        found: dict[str, float] = {}
        if last or done % config.every_steps == 0:
            found |= self._measure(trainer)
        if self._probe and (last or done % config.probe_every_steps == 0):
            found |= self._score(trainer, done)
        self._numbers["last"] |= found
        numbers, start = {**metrics, **found}, self._numbers["start"]
        new = self._collapse.see(done, numbers, start, self._expected)
        memory = gpu_memory(trainer.device) if last or step % _MEMORY_EVERY_STEPS == 0 else {}
        self._gpu_gb = memory.get("gpu_memory_peak_gb", self._gpu_gb)
        if self._run is not None:
            self._curves.add(step, numbers)
            for finding in new:
                print(f"pretrain: WARNING {finding.line}", flush=True)
                self._run.tag(f"collapse.{finding.rule}", f"step {done}: {finding.words}")
            if new:
                self._run.tag("collapsed_at_step", self._collapse.first_step)
            self._curves_stale = True
            if done % config.pictures_every_steps == 0:
                self._show(done, trainer, batch)
                self._draw()
        return found | memory

    def facts(self) -> dict[str, str]:
        """Words for the progress line: the newest of what is measured seldom."""
        last = self._numbers["last"]
        words = {}
        if "rankme" in last:
            words["rankme"] = f"{last['rankme']:.3g}"
        for name in ("knn", "logistic"):
            if f"probe_{name}" in last:
                words[name] = f"{100 * last[f'probe_{name}']:.1f}%"
        if math.isfinite(self._gpu_gb):
            words["gpu"] = f"{self._gpu_gb:.1f}GB"
        if self._collapse.first_step is not None:
            words["collapsed_at"] = f"{self._collapse.first_step:,}"
        return words

    def end(self, trainer: Watched) -> dict[str, Any]:
        """After the run's last step, on every rank: its start, its end, its best, its collapse."""
        start, last = self._numbers["start"], self._numbers["last"]
        self._draw()
        return {
            **{f"{key}_start": value for key, value in start.items()},
            **{f"{key}_end": value for key, value in last.items()},
            **{f"{key}_best": value for key, value in self._best.items()},
            "collapsed_at_step": self._collapse.first_step,
        }

    def close(self, status: str = "FINISHED") -> None:
        """Draws the curves, ends the probe's child run and ships what is left of it; again: nothing."""
        self._draw()
        if self._child is not None:
            self._probe_run_id = self._child.run_id
            self._child.close(status)
            self._child = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(self._run.ending(kind) if self._run is not None else "FINISHED")

    def _measure(self, trainer: Watched) -> dict[str, float]:
        assert self._monitor is not None, "begin() comes first"
        features = embed_patches(trainer, self._monitor, self.ranks, self.config.batch_size)
        if not np.isfinite(features).all():
            return {"rankme": math.nan, "feature_std": math.nan}  # found to have collapsed
        return {"rankme": rankme(features), "feature_std": feature_std(features)}

    def _score(self, trainer: Watched, done: int) -> dict[str, float]:
        """The probe, where there is one; its child run gets a row at `done` optimizer steps."""
        if self._probe is None:
            return {}
        scores = self._probe.score(trainer)
        found = {"probe_knn": scores.knn, "probe_logistic": scores.logistic}
        for key, value in found.items():
            self._best[key] = max(value, self._best.get(key, -math.inf))
        if self._child is not None:
            self._child.log(done, **found, **self._recall(scores))
            self._child.sync()
        return found

    def _recall(self, scores: ProbeScores) -> dict[str, float]:
        assert self._probe is not None
        classes = self._probe.data.folder.classes[:_MOST_CLASSES]
        names = [re.sub(r"[^\w./ :-]", "_", name) for name in classes]
        pairs = zip(names, scores.recall, strict=False)
        return {f"recall/{name}": value for name, value in pairs if math.isfinite(value)}

    def _open_child(self, trainer: Watched, done: int) -> None:
        if self._run is None or self._probe is None:
            return
        folder, data = self.folder / PROBE_FOLDER, self._probe.data
        tracking = trainer.config.tracking
        config = tracking.model_copy(
            update={
                "uri": tracking.store(self.folder),
                "parent_run_id": self._run.run_id,
                "run_name": f"{tracking.run_name or self.folder.resolve().name} probe",
            }
        )
        own = self.config.model_dump(mode="json")
        params = {key: value for key, value in own.items() if key.startswith("probe_")}
        params |= {"pictures_to_fit": len(data.fit), "pictures_to_score": len(data.validation)}
        run_id = self._probe_run_id or unfinished_run(folder, params)
        tags = {"stage": "probe in training", "probe_digest": data.digest}
        self._child = open_run(config, folder, params, tags, run_id, _CONNECT_S, done or -1)
        self._child.cohort(data.folder.root.name, data.digest, "evaluation")
        print(f"pretrain: probe every {self.config.probe_every_steps:,} steps: {data.words}")

    def _save_monitor(self, path: Path) -> None:
        monitor = self._monitor
        assert monitor is not None
        if any("/" in ref.slide_id for ref in monitor.refs):  # of a folder of classes
            save_classes(path, monitor)
        elif any(ref.mpp for ref in monitor.refs):
            save_mosaic(path, monitor)  # type: ignore[arg-type]
        else:  # of a folder of patches: no slides to make columns of
            save_batch(path, monitor)

    def _save_views(self, batch: Patches, config: Any) -> Callable[[Path], None]:
        return lambda path: save_view_rows(path, batch, config.views.specs, config.seed)

    def _show(self, done: int, trainer: Watched, batch: Patches) -> None:
        """Patches and views of this step's batch (the first rank's part), kept by step."""
        self._keep(
            {
                f"steps/mosaic_{done:08d}.jpg": lambda path: save_batch(path, batch),
                f"steps/views_{done:08d}.jpg": self._save_views(batch, trainer.config),
            }
        )

    def _keep(self, pictures: Mapping[str, Callable[[Path], None]]) -> None:
        """Draws under `pictures/` and tells MLflow; a disk that refuses costs the picture only."""
        if self._run is None:
            return
        for name, save in pictures.items():
            path = self.folder / "pictures" / name
            try:
                save(path)
            except (OSError, PathfmError) as error:
                print(f"pretrain: WARNING {path} could not be drawn: {one_line(error)}", flush=True)
            else:
                self._run.picture(path)

    def _draw(self) -> None:
        """curves.png, where steps have been done since it was drawn: it costs half a second."""
        if self._run is None or not self._curves_stale or not self.config.curves:
            return
        found, title = self._collapse.found, self._title
        self._keep({"curves.png": lambda path: self._curves.draw(path, title, found)})
        self._curves_stale = False


def gpu_memory(device: torch.device) -> dict[str, float]:
    """10^9 bytes that tensors hold on our GPU now, and held at most; {} on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "gpu_memory_gb": torch.cuda.memory_allocated(device) / 1e9,
        "gpu_memory_peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
    }


def _known(numbers: Mapping[str, Any], *, probes: bool) -> dict[str, float]:
    """Numbers of a checkpoint's state, without those of another probe."""
    kept = json.loads(json.dumps(dict(numbers)))
    return {key: float(v) for key, v in kept.items() if probes or not key.startswith("probe_")}
