"""Heads: classifiers on embeddings, their normalisers, exact solvers, and their choice inside the support.

Arrays in, scores out. Knows nothing of images or networks, and of files only stores (``layers``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
