"""The service: models over HTTP, on the loopback interface unless told otherwise.

FastAPI, uvicorn and prometheus_client are imported here only.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
