"""The labelling loop in a browser: photos, labels with suggestions, how good it is, and a model to take along.

It puts together what the other rooms do, and keeps its own state in plain files. It must not know how embeddings are
computed or how a head is fitted, and never writes to the folder of photos.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
