"""Frozen networks: the catalogue, weights and where they come from, preprocessing, layers, and engines that run them.

Pixels in, embeddings out. Knows nothing of where images come from or where embeddings are kept.
torch, timm and OpenVINO are imported here (and torch also where networks or heads are trained).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
