"""pathfm: patches in, a measured model out.

Read in this order: ``cli`` (the verbs and how a command line becomes a config), ``index``,
``foreground``, ``pretrain``, ``embed``, ``probe``, ``compare``, ``export`` (the verbs; none imports another),
then what they share: ``backbone``, ``views``, ``methods``, ``checkpoint``, ``embeddings``,
``metrics``, ``tracking``, ``runtime``. ``demo``, ``report`` and ``doctor`` compose them.

Importing this package is cheap: torch, timm and MLflow come in with the function that needs them.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
