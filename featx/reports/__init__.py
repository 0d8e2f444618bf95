"""Reports: tables, figures and HTML pages of what others computed. Computes nothing itself.

matplotlib is imported here only.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
