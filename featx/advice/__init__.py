"""Advice: strategies measured on the same draws, learning curves, distance from the pretraining, and labels.

Says what to do next with a set of images, from numbers that were measured on it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
