"""Retrieval: nearest neighbours in a store, an index for large ones, duplicates, and how good the search is.

faiss is imported here only.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
