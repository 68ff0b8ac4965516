"""A quick look: the whole loader against OpenSlide, tiffslide and whoever else is installed, in one run.

    python benchmarks/patches_per_second.py [SLIDE] [--mpp MPP] [--out benchmarks/results/FILE.txt]

Without a slide it draws a synthetic one. At level 0's own µm/px, and at 1.6 x that. The full comparison,
with the bare C loop, is reader_peers.py; how readers take turns is told there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import about_this_run, last_core, pin, write_out
from reader_peers import against_peers, opened

from online_patching.testing import SyntheticSlide, write_tiff


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "slide",
        type=Path,
        nargs="?",
        help="a slide that OpenSlide and tiffslide open too; unset: a synthetic one",
    )
    parser.add_argument("--mpp", type=float, help="µm/px of level 0, where the file carries none")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    pin(last_core())
    with tempfile.TemporaryDirectory() as scratch:
        if args.slide is None:
            args.slide = write_tiff(Path(scratch) / "synthetic.svs", SyntheticSlide(1, 9000, 7000))
        subject = opened(f"{args.slide}={args.mpp or ''}", None, Path(scratch))
        lines = [about_this_run(), ""]
        for times in (1.0, 1.6):
            lines += [*against_peers(subject, times, args.blocks, bare=False), ""]
    write_out(lines, args.out)


if __name__ == "__main__":
    main()
