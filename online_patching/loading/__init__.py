"""Draws -> batches of pixels, in order, in threads or processes, resumable.

loader.py     PatchLoader: the stream                 batch.py   what a loader and its engines share
threads.py, turn.py  the engine in one process        processes.py, ring.py  the engine in several
ledger.py     failures, quarantine, when to stop      state.py   a stream as JSON
"""

from online_patching.loading.batch import Failure, PatchBatch
from online_patching.loading.loader import PatchLoader

__all__ = ["Failure", "PatchBatch", "PatchLoader"]
