"""Extraction: images through an engine into a store, in one process, in parts, or on many machines.

The last room that sees pixels: it joins images, backbones and store. Knows nothing of heads. Ray is imported here only.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
