"""Frozen features on disk, written once and found again by what they were made of.

info.py        what features depend on, and the key that follows from it
container.py   one safetensors file: written as a stream of blocks, read in place
table.py       Embeddings: features with labels, paths, groups and splits
bags.py        the features of one slide as HDF5, in the form of CLAM and TRIDENT
"""

from pathfm.embeddings.info import EmbeddingsInfo
from pathfm.embeddings.table import Embeddings, read_header, stored_key

__all__ = ["Embeddings", "EmbeddingsInfo", "read_header", "stored_key"]
