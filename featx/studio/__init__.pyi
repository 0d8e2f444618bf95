from .app import Studio as Studio
from .server import run as run
from .session import Setup as Setup
