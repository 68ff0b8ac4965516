"""Does remembering entropy-decoder states pay? The native decoder with it warm, cold, and off, in turns.

    python benchmarks/restart_states.py SLIDE[=MPP] ... [--side 224] [--blocks 15] [--core N] [--out FILE]

The same patches of a slide's tissue through `native.read`, the call that the loader's decode threads make:
off; from states that earlier touches left (a state every 32, 64 and 128 px); and cold, where every tile
is new, so that each is decoded and scanned. One core; rates are compared within a block. Pixels must be equal.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import (
    about_this_run,
    in_turns,
    last_core,
    paired,
    pin,
    tissue,
    write_out,
)
from numpy.typing import NDArray

from online_patching import PatchSampler, Slide, native, read_slide_index
from online_patching.batch_plan import BatchPlan, plan_batch

BLOCK = 128
STEPS_PX = (32, 64, 128)
ROOM_BYTES = 2**30


def main() -> None:
    """Measure every slide, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="+", help="SLIDE, or SLIDE=MPP where the file carries none")
    parser.add_argument("--side", type=int, default=224, help="of a patch, in level-0 px")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--core", type=int, default=last_core())
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    pin(args.core)
    lines = [f"{about_this_run('pillow')}; core {args.core}; {args.side} px patches"]
    for given in args.slides:
        lines += ["", *Reads(given, args.side, args.blocks).measured(args.blocks)]
    write_out(lines, args.out)


class Reads:
    """Blocks of patches of one local slide, as the plans that decode threads get."""

    def __init__(self, given: str, side: int, blocks: int) -> None:
        path, _, mpp = given.partition("=")
        index = read_slide_index(path, mpp=float(mpp) if mpp else None)
        with Slide(index) as slide:
            sampler = PatchSampler([index], [tissue(slide)], size_px=side, mpp=index.mpp, seed=1)
        self.name, self.side = Path(path).name, side
        self.file = os.open(path, os.O_RDONLY)
        self.tile_px = index.levels[0].tile_width_px
        self.plans = [self.plan(sampler, k) for k in range(blocks + 1)]
        self.next_key = 1

    def plan(self, sampler: PatchSampler, block: int) -> BatchPlan:
        """The reads of a block."""
        draws = sampler.draw_batch(np.arange(block * BLOCK, (block + 1) * BLOCK))
        plan = plan_batch(sampler.corpus, draws, self.side, np.arange(BLOCK))
        plan.files["fd"] = self.file
        return plan

    def read(self, block: int, keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """A block's patches, under these names of the slide."""
        plan = self.plans[block]
        out = np.empty((BLOCK, self.side, self.side, 3), np.uint8)
        plan.canvases["key"] = keys
        native.read(
            plan.canvases, plan.tiles, plan.outputs, plan.files, plan.tables, (), out, 0, len(plan)
        )
        if plan.canvases["status"].any():
            raise SystemExit(f"{self.name}: {set(plan.canvases['message'].tolist())}")
        return out

    def measured(self, blocks: int) -> list[str]:
        """The slide's lines."""
        works: dict[str, Callable[[int], NDArray[np.uint8]]] = {
            "off": lambda k: self.read(k, _keys(0))
        }
        notes = {"off": ""}
        native.remember(0)
        for key, step in enumerate(STEPS_PX, 1):
            name = f"warm, every {step} px"
            works[name], notes[name] = self.warm(key, step)
        works["cold"] = self.cold
        notes["cold"] = f"every tile new, every {native.STEP_PX} px"
        native.remember(ROOM_BYTES)
        series = in_turns(works, blocks)
        if native.remembered()["failed"] or native.remembered()["refused"]:
            raise SystemExit(f"{self.name}: {native.remembered()}")
        tiles = np.concatenate([plan.tiles for plan in self.plans])
        lengths = tiles["length"][np.unique(tiles["start"], return_index=True)[1]]
        touches = len(tiles) / len(self.plans) / BLOCK
        lines = [
            f"{self.name}: tiles of {self.tile_px} px, {lengths.mean():,.0f} bytes; {touches:.2f} a patch"
        ]
        off = series["off"].rates
        for name, one in series.items():
            ratio = "" if name == "off" else f" {paired(one.rates, off)}  {notes[name]}"
            lines.append(f"  {name:20s}{statistics.median(one.rates):7,.0f} patches/s{ratio}")
        # A first touch in microseconds a tile, as long as the rest of a read is the same.
        first = [1e6 / c - 1e6 / o for c, o in zip(series["cold"].rates, off, strict=True)]
        plain = [1e6 / rate / touches for rate in off]
        lines.append(
            f"  a first touch costs {statistics.median(first) / touches:,.0f} µs more a tile, "
            f"which plainly takes {statistics.median(plain):,.0f} µs"
        )
        return lines

    def warm(self, key: int, step: int) -> tuple[Callable[[int], NDArray[np.uint8]], str]:
        """Blocks read from states of one step, all remembered now; what they take, and whether they are right."""
        native.remember(ROOM_BYTES, step)  # from here on; what is there stays
        before = native.remembered()
        for k in range(len(self.plans)):
            self.read(k, _keys(key))
        now = native.remembered()
        tiles, size = (now[name] - before[name] for name in ("tiles", "bytes"))
        same = all(
            np.array_equal(self.read(k, _keys(key)), self.read(k, _keys(0)))
            for k in range(len(self.plans))
        )
        return lambda k: self.read(
            k, _keys(key)
        ), f"{size / tiles:6,.0f} bytes a tile; equal {same}"

    def cold(self, block: int) -> NDArray[np.uint8]:
        """A block under names never used before: a new one a canvas, so that no tile is known."""
        n = len(self.plans[block])
        self.next_key += n
        fresh = np.arange(self.next_key, self.next_key + n, dtype=np.uint64)
        return self.read(block, fresh << np.uint64(20))


def _keys(key: int) -> NDArray[np.uint64]:
    return np.asarray(key, np.uint64)


if __name__ == "__main__":
    main()
