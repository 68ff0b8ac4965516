"""Any model that makes features of patches, behind one face.

embedder.py       Embedder: uint8 pixels -> features, pooled from CLS or patch tokens
loading.py        a text that names a model -> Embedder: our backbones, or one of these
hugging_face.py   a folder that transformers wrote, safetensors only
callables.py      a Python function of yours, or a name of kaiko-eva's registry
"""

from pathfm.models.embedder import POOLINGS, Embedder
from pathfm.models.loading import WEIGHTS_HELP, load_model

__all__ = ["POOLINGS", "WEIGHTS_HELP", "Embedder", "load_model"]
