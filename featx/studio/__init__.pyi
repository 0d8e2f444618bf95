from .app import Studio as Studio
from .quality import sample_of as sample_of
from .server import run as run
from .session import Setup as Setup
from .suggest import suggest as suggest
