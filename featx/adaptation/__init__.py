"""Adaptation: what trains a network, by fine-tuning its last blocks or as an autoencoder on the user's images."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
