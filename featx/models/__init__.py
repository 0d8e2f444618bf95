"""Models: one head fitted for keeps, calibrated, bundled without pickle, used for predictions, and exported.

Knows nothing of HTTP or of the command line.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
