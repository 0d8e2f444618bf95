"""Images: which ones there are, where their bytes lie, and how bytes become upright RGB pixels.

Sources (folders, lists, tar files, tables, remote storage), decoding in processes of their own, views and thumbnails.
Knows nothing of networks, stores or labels' meaning. Pillow, pyarrow (reading) and fsspec are imported here only.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
