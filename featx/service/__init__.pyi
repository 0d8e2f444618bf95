from .batcher import BATCH_SIZES as BATCH_SIZES
from .evidence import Evidence as Evidence
from .guard import Limits as Limits
from .work import Model as Model, Repository as Repository
