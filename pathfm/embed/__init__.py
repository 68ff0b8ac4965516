"""Verb `embed`: a model and labelled pictures, or slides -> frozen features, written once.

Pictures are resized so that the shorter side is `input_px` (bilinear, antialiased), cropped in the
centre and normalised with the model's own mean and standard deviation, as eva does. Decoding
and resizing happen in threads while the model works. The features lie in a store by a key of all they
depend on; `<out>/<name>.safetensors` is the same file by another name.

settings.py    what to embed, with what, and how
running.py     one run: what is there already, what is left, what is recorded
samples.py     labelled pictures -> input, a few batches ahead
computing.py   input -> features, part by part, on one rank or many
parts.py       files of 1,024 rows: what a killed run goes on from
slides.py      the slides of a corpus -> a bag of features each, for MIL tools
slide_tasks.py which slides, which patches of each, whose task
"""

from __future__ import annotations

from pathfm.datasets.preparing import prepare, read_batches
from pathfm.embed.settings import EmbedConfig, EmbedResult, SlideOptions

__all__ = ["EmbedConfig", "EmbedResult", "SlideOptions", "prepare", "read_batches", "run"]


def run(config: EmbedConfig) -> EmbedResult:
    """Writes `<out>/<name>.safetensors`, unless it holds exactly these features already.

    Of a corpus the bags `<out>/<name>/h5_files/<slide_id>.h5`. Under torchrun the ranks share the
    work; they must see one file system. Raises PathfmError.
    """
    from pathfm.embed.running import embed  # torch comes with it

    return embed(config)
