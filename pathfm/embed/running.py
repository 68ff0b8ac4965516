"""One run of `embed`, on one rank or many: what is there already, what is left, what is recorded."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathfm.datasets import Benchmark, open_dataset
from pathfm.datasets.folder import DamagedPictureError
from pathfm.datasets.labelled import open_folder
from pathfm.embed.computing import Plan, choose_precision, compute_parts
from pathfm.embed.parts import Parts
from pathfm.embed.samples import Rows, input_mpp, make_input, scales_to, some_of
from pathfm.embed.settings import EmbedConfig, EmbedResult, refuse_without_effect
from pathfm.embed.slides import embed_slides, is_corpus
from pathfm.embeddings import Embeddings, EmbeddingsInfo, stored_key
from pathfm.embeddings.info import RESIZED, describe_transform
from pathfm.embeddings.table import save_streamed
from pathfm.leakage import check_beside, salt_at_hand
from pathfm.metrics import rankme_of_some
from pathfm.models import Embedder, load_model
from pathfm.models.naming import names_its_architecture
from pathfm.ranks import PeerError, Ranks, gather_objects, open_ranks, together
from pathfm.runtime import (
    PathfmError,
    as_dict,
    make_folder,
    pick_device,
    plan_precision,
    provenance,
    save_config,
)
from pathfm.tracking import Run, open_run


def embed(config: EmbedConfig) -> EmbedResult:
    """What `pathfm.embed.run` does."""
    with open_ranks(pick_device(config.device).type) as ranks:
        try:
            return _run(config, ranks)
        except PeerError:
            if ranks.first:
                raise
            return EmbedResult(config.out, True, 0.0, 0.0, exit_code=2)  # told by its own rank


def _run(config: EmbedConfig, ranks: Ranks) -> EmbedResult:
    of_slides = is_corpus(config.data)
    with together():
        refuse_without_effect(config, of_slides, names_its_architecture(config.weights))
        if ranks.first:
            save_config(config, make_folder(config.out), f"{config.name}.yaml")
        mean, std, named = config.mean, config.std, config.backbone
        model = load_model(config.weights, named, config.input_px, mean, std)
        model = model.to(pick_device(config.device))
    if of_slides:
        return embed_slides(config, model, ranks)
    try:
        return _embed_pictures(config, model, ranks)
    except DamagedPictureError as error:
        remedy = f"`pathfm check-data {config.data} --read True` names all"
        raise PathfmError(f"{error}. {remedy}") from None


def _embed_pictures(config: EmbedConfig, model: Embedder, ranks: Ranks) -> EmbedResult:
    plan = plan_precision(config.precision, model.device)
    info: EmbeddingsInfo | None = None
    with together():
        samples = _open(config)
        scales = scales_to(samples, config.mpp, config.data_mpp)
        if ranks.first:
            info = _info(config, model, samples, scales)
            if told := samples.copies():
                print(f"embed {config.name}: WARNING {told}")
    info = gather_objects(info)[0]
    assert info is not None
    make = partial(_input, samples, config.input_px, scales)
    usable = {plan} | ({"fp32"} if config.precision == "auto" else set())
    found = None
    with together():
        if ranks.first:
            found = _find(config, [replace(info, precision=p) for p in usable])
    if (there := gather_objects(found)[0]) is not None:
        if ranks.first:
            print(f"embed {config.name}: {there.path} is up to date ({len(samples):,} pictures)")
        _look_for_leaks(config, samples, there.path, ranks)
        return EmbedResult(there.path, True, 0.0, there.rankme)
    with together():
        first_batch = range(min(config.batch_size, len(samples)))
        chosen = plan
        if ranks.first:
            chosen = choose_precision(
                config, model, plan, lambda: np.stack([make(i) for i in first_batch])
            )
    info = replace(info, precision=gather_objects(chosen)[0])
    made = _compute(config, model, samples, make, info, ranks)
    _look_for_leaks(config, samples, made.path, ranks)
    return made


def _look_for_leaks(config: EmbedConfig, samples: Benchmark, path: Path, ranks: Ranks) -> None:
    """Writes beside the features which pictures the backbone had seen, for `probe` to refuse or mark."""
    with together():
        if ranks.first:
            key, ids = str(stored_key(path)), salt_at_hand(config.out)
            found = check_beside(path, key, config.weights, samples, config.threads, ids)
            if found.mask().any():
                print(f"embed {config.name}: WARNING {found.told()}")


def _input(
    samples: Benchmark, input_px: int, scales: NDArray[np.float64] | None, i: int
) -> NDArray[np.uint8]:
    return make_input(samples, i, input_px, None if scales is None else float(scales[i]))


def _open(config: EmbedConfig) -> Benchmark:
    """The data, of which `per_class` may choose some of each class and split."""
    if config.data.is_dir():
        found = open_folder(config.data)
    else:
        is_table = config.data.suffix.lower() == ".csv"
        mpp = config.mpp if is_table else None
        found = open_dataset(str(config.data), mpp=mpp, size_px=config.input_px)
    _refuse_other_tasks(found)
    return found if config.per_class is None else some_of(found, config.per_class, config.seed)


def _refuse_other_tasks(samples: Benchmark) -> None:
    if samples.facts.task != "classification":
        raise PathfmError(
            f"{samples.name}: a {samples.facts.task} data set is not embedded picture by picture. "
            "Slides: index them, find their foreground, and give the corpus as data"
        )


def _info(
    config: EmbedConfig,
    model: Embedder,
    samples: Benchmark,
    scales: NDArray[np.float64] | None,
) -> EmbeddingsInfo:
    """What the features will have been made of; reads all the data once, for its digest."""
    geometry = RESIZED
    if scales is not None:
        own = hashlib.sha256(scales.tobytes()).hexdigest()[:16]  # labels of µm/px may be mended
        geometry = (
            f"resized to {config.mpp:g} um/px (by {own}), centre cropped, bilinear, antialiased"
        )
    return EmbeddingsInfo(
        name=config.name,
        backbone=model.name,
        backbone_digest=model.digest,
        weights_note=model.weights_note,
        data=samples.name,
        data_digest=samples.digest,
        input_px=config.input_px,
        pooling=config.pooling,
        transform=describe_transform(geometry, config.input_px, model.mean, model.std),
        storage=config.storage,
        mpp=config.mpp or _only(input_mpp(samples, config.input_px)),
    )


def _only(mpp: NDArray[np.float32]) -> float:
    """The one µm/px that all rows have; 0 where they differ or it is not known."""
    told = np.unique(mpp)
    return round(float(told[0]), 4) if len(told) == 1 and np.isfinite(told[0]) else 0.0


def _find(config: EmbedConfig, infos: list[EmbeddingsInfo]) -> EmbedResult | None:
    """Features that are there already, under their name or in the store; None otherwise."""
    path = config.out / f"{config.name}.safetensors"
    keys = [info.key for info in infos]
    if stored_key(path) not in keys:
        kept = [_kept(config, key) for key in keys]
        there = [at for at, key in zip(kept, keys, strict=True) if stored_key(at) == key]
        if not there:
            return None
        _name(there[0], path)
    return EmbedResult(path, True, 0.0, rankme_of_some(Embeddings.load(path, mmap=True).features))


def _kept(config: EmbedConfig, key: str) -> Path:
    return config.store_folder / f"{key}.safetensors"


def _name(kept: Path, path: Path) -> None:
    """Gives a file of the store another name: a hard link, a copy where there are none."""
    hidden = path.with_name(f".{path.name}.link")
    try:
        hidden.unlink(missing_ok=True)
        try:
            os.link(kept, hidden)
        except OSError:
            shutil.copyfile(kept, hidden)
        hidden.replace(path)
    except OSError as error:
        raise PathfmError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)


def _compute(
    config: EmbedConfig,
    model: Embedder,
    samples: Benchmark,
    make: partial[NDArray[np.uint8]],
    info: EmbeddingsInfo,
    ranks: Ranks,
) -> EmbedResult:
    parts = Parts(config.store_folder / f"{info.key}.parts", len(samples), config.storage)
    path = config.out / f"{config.name}.safetensors"
    precision: Plan = "bf16" if info.precision == "bf16" else "fp32"
    with _recorded(config, info, ranks) as tracked:
        began_s = time.monotonic()
        with together():
            differ = None if info.mpp else input_mpp(samples, config.input_px)
            rows = Rows.of(samples, None if differ is None or np.isnan(differ).all() else differ)
            made = compute_parts(config, model, make, parts, precision, ranks)
        rate = sum(gather_objects(made)) / (time.monotonic() - began_s)
        rank = 0.0
        with together():
            if tracked is not None:
                kept = _kept(config, info.key)
                save_streamed(kept, rows, replace(info, name=""), parts.shape(), parts.blocks())
                _name(kept, path)
                parts.remove()
                features = Embeddings.load(path, mmap=True).features
                rank = rankme_of_some(features)
                tracked.summary(pictures_per_s=rate, rankme=rank, pictures=len(samples))
                tracked.tag("embeddings.key", info.key)
                print(
                    f"embed {config.name}: {len(samples):,} pictures at {config.input_px} px -> "
                    f"{path}, {rate:.1f} pictures/s ({info.precision}), RankMe {rank:.1f} of "
                    f"{features.shape[1]}"
                )
                print(
                    f"next: pathfm probe --embeddings {shlex.quote(str(path))} [OTHERS.safetensors ...]"
                )
        return EmbedResult(path, False, rate, gather_objects(rank)[0])


@contextmanager
def _recorded(config: EmbedConfig, info: EmbeddingsInfo, ranks: Ranks) -> Iterator[Run | None]:
    """The run that MLflow shows, on rank 0; None on the others."""
    if not ranks.first:
        yield None
        return
    params = as_dict(config) | {"weights_note": info.weights_note}
    record, tags = config.out / "tracking" / config.name, provenance() | {"stage": "embed"}
    with open_run(config.own_tracking, record, params, tags) as tracked:
        tracked.cohort(info.data, info.data_digest, "evaluation")
        yield tracked
