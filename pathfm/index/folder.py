"""The .index files of a corpus folder."""

from __future__ import annotations

import os
from pathlib import Path

from online_patching import SlideIndex
from pathfm.index.journal import Journal, Known


class Folder:
    """The .index files of a corpus folder. Its packed corpus goes before the first of them changes."""

    def __init__(self, corpus: Path) -> None:
        self.corpus, self.path = corpus, corpus / "slides"
        self.sizes: dict[str, int] = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith(".index"):
                    self.sizes[entry.name.removesuffix(".index")] = entry.stat().st_size
                elif entry.name.endswith(".tmp") and entry.name.startswith("."):
                    os.unlink(entry.path)  # half-written by a run that was killed

    def has(self, known: Known) -> bool:
        """Whether the file that a journal line speaks of is there, whole."""
        return self.sizes.get(known.slide_id) == known.index_bytes

    def load(self, slide_id: str) -> SlideIndex:
        """The index of a slide."""
        return SlideIndex.load(self.path / f"{slide_id}.index")

    def save(self, index: SlideIndex, journal: Journal) -> int:
        """Write an index; returns its size in bytes."""
        self._changes()
        if index.slide_id in self.sizes:
            journal.void(index.slide_id)
        path = self.path / f"{index.slide_id}.index"
        index.save(path)
        self.sizes[index.slide_id] = size = path.stat().st_size
        return size

    def keep_only(self, slide_ids: set[str]) -> None:
        """Delete the indexes of all other slides."""
        for slide_id in self.sizes.keys() - slide_ids:
            self._changes()
            (self.path / f"{slide_id}.index").unlink(missing_ok=True)
            del self.sizes[slide_id]

    def _changes(self) -> None:
        """What is packed is of other slides from now on: not to be trained on."""
        (self.corpus / "corpus.json").unlink(missing_ok=True)
