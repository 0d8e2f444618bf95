"""The command line: one module for each group of commands. The only room that puts the other rooms together."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
