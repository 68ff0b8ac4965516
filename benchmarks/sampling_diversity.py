"""What `patches_per_read` saves in tiles, and what it costs in different places seen.

    python benchmarks/sampling_diversity.py SLIDE[=MPP] ... [--mpp F] [--out FILE]

224 px patches on tissue, `--mpp` times the slide's own µm/px (1 by default), at 1, 2, 4 and 8 patches a
read. No pixel is read but the overview that tissue is found on. Columns:

tiles         different tiles a patch, when the draws of a group share what they read
new area      level-0 area that the first 256 draws cover, over 256 patches' area
tissue seen   share of the slide's tissue that the first N draws cover, N patches having its area
apart         mean distance between centres: of draws of one group, of all draws of a batch of 256
groups        in a batch of 256: different anchors, and so at most so many different slides
µs            a draw, in batches of 256
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from common import about_this_run, tissue, write_out
from numpy.typing import NDArray

from online_patching import Corpus, ForegroundMask, PatchSampler, Slide, read_slide_index
from online_patching.plan import plan_patch
from online_patching.sampling.draws import Draws

SIZE_PX, BATCH, KS, BATCHES = 224, 256, (1, 2, 4, 8), 8
CELL_PX0 = 4
"""Areas are counted in squares of so many level-0 pixels."""
HEADER = (
    f"{'a read':>8}{'tiles':>8}{'new area':>10}{'tissue seen':>13}"
    f"{'apart: group':>15}{'batch':>10}{'groups':>8}{'µs':>7}"
)


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="+", help="SLIDE, or SLIDE=MPP where the file carries none")
    parser.add_argument("--mpp", type=float, nargs="+", default=[1.0], help="times the slide's own")
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    lines = [
        about_this_run(),
        f"{SIZE_PX} px patches; means of {BATCHES} batches of {BATCH} draws",
        "",
    ]
    for given in args.slides:
        path, _, own = given.partition("=")
        index = read_slide_index(path, mpp=float(own) if own else None)
        with Slide(index) as slide:
            mask = tissue(slide)
        for times in args.mpp:
            tile = index.levels[0].tile_width_px
            what = f"tiles of {tile} px, {times:g} x its µm/px"
            lines.append(
                f"{index.slide_id[:44]}, {what}, {mask.tissue_area_um2 / 1e6:.1f} mm² of tissue"
            )
            lines.append(HEADER)
            corpus = Corpus.from_slides([index], [mask])
            options = {"size_px": SIZE_PX, "mpp": times * index.mpp, "seed": 1}
            samplers = (PatchSampler(corpus, patches_per_read=k, **options) for k in KS)
            lines += [row(corpus, mask, sampler) for sampler in samplers]
            lines.append("")
    write_out(lines, args.out)


def row(corpus: Corpus, mask: ForegroundMask, sampler: PatchSampler) -> str:
    """One line of the table."""
    k = sampler.patches_per_read
    batches, seconds = [], []
    for b in range(BATCHES):
        began = time.perf_counter()
        batches.append(sampler.draw_batch(np.arange(b * BATCH, (b + 1) * BATCH)))
        seconds.append(time.perf_counter() - began)
    new = [covered(corpus, sampler, draws).sum() for draws in batches]
    width, height = (float(side[0]) for side in sampler.box_px0([0], batches[0].mpp[:1]))
    patch = width * height / CELL_PX0**2
    n = int(mask.tissue_fraction * np.prod(mask.size_px0) / (width * height) / k) * k
    seen = covered(corpus, sampler, sampler.draw_batch(np.arange(n)))
    is_tissue = at_cells(mask, seen.shape)
    group, whole = zip(*(apart(sampler, draws, k) for draws in batches), strict=True)
    return (
        f"{k:8d}{np.mean([tiles(corpus, sampler, d, k) for d in batches[:2]]):8.2f}"
        f"{np.mean(new) / (BATCH * patch):10.2f}{seen[is_tissue].mean():13.2f}"
        f"{np.mean(group):12.0f} µm{np.mean(whole):7.0f} µm{BATCH // k:8d}"
        f"{min(seconds) / BATCH * 1e6:7.1f}"
    )


def tiles(corpus: Corpus, sampler: PatchSampler, draws: Draws, k: int) -> float:
    """Different tiles a patch, shared within groups."""
    index, total = corpus.index(0), 0
    refs = sampler.refs(draws)
    for start in range(0, len(refs), k):
        plans = [plan_patch(index, ref) for ref in refs[start : start + k]]
        total += len({(plan.level, tile.number) for plan in plans for tile in plan.tiles})
    return total / len(refs)


def covered(corpus: Corpus, sampler: PatchSampler, draws: Draws) -> NDArray[np.bool_]:
    """Which squares of the slide some patch covers."""
    record = corpus.records[0]
    shape = int(record["height_px0"]) // CELL_PX0 + 1, int(record["width_px0"]) // CELL_PX0 + 1
    out = np.zeros(shape, bool)
    width, height = sampler.box_px0(draws.slide, draws.mpp)
    edges = (draws.x_px0, draws.y_px0, draws.x_px0 + width, draws.y_px0 + height)
    for x0, y0, x1, y1 in np.stack([np.round(edge / CELL_PX0) for edge in edges], 1).astype(int):
        out[max(y0, 0) : y1, max(x0, 0) : x1] = True
    return out


def at_cells(mask: ForegroundMask, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask, square by square."""
    rows = np.minimum(
        np.arange(shape[0]) * CELL_PX0 * mask.height // mask.size_px0[1], mask.height - 1
    )
    columns = np.minimum(
        np.arange(shape[1]) * CELL_PX0 * mask.width // mask.size_px0[0], mask.width - 1
    )
    return np.asarray(mask.bits[np.ix_(rows, columns)])


def apart(sampler: PatchSampler, draws: Draws, k: int) -> tuple[float, float]:
    """Mean distance in µm between two draws of a group (0 alone), and of the batch."""
    width, height = sampler.box_px0(draws.slide, draws.mpp)
    record = sampler.corpus.records[0]
    at = np.stack([(draws.x_px0 + width / 2) * record["mpp_x"],
                   (draws.y_px0 + height / 2) * record["mpp_y"]], axis=1)  # fmt: skip

    def mean(points: NDArray[np.float64]) -> float:
        distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
        return float(distance[np.triu_indices(len(points), 1)].mean()) if len(points) > 1 else 0.0

    return float(np.mean([mean(at[i : i + k]) for i in range(0, len(at), k)])), mean(at)


if __name__ == "__main__":
    main()
