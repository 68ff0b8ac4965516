"""Many slides on disk, opened without reading them.

corpus.py    Corpus: columns, look-ups, one slide's index and mask
records.py   the fixed-size records, and the checks before one is followed
packing.py   writes a corpus as a stream of slides
paging.py    asks for the pages of a batch before they are read
views.py     CorpusView: rows of a corpus with other masks, such as regions
"""

from online_patching.corpus.corpus import Corpus, TileRows
from online_patching.corpus.views import CorpusView

__all__ = ["Corpus", "CorpusView", "TileRows"]
