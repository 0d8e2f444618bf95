"""Evaluation: splits, statistics, the sweep that compares heads, its journal, and the ledger of test sets.

Decides what is measured on which images, so that numbers are honest. Knows nothing of how they are shown.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
