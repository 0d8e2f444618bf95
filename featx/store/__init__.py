"""The store: embeddings kept in HDF5, keyed by the content of the images, and tables made from them.

The wall between pixels and arrays. Knows nothing of networks and of what is done with embeddings. h5py is imported here
only.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
