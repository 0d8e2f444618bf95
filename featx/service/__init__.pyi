from .batcher import BATCH_SIZES as BATCH_SIZES
from .counts import Counted as Counted, Counts as Counts, read_counts as read_counts
from .evidence import Evidence as Evidence
from .feedback import Feedback as Feedback, Refitter as Refitter
from .guard import (
    LOOPBACK_NAMES as LOOPBACK_NAMES,
    SAFE_HEADERS as SAFE_HEADERS,
    Limits as Limits,
    Refusal as Refusal,
    answer_errors as answer_errors,
)
from .label_studio import LabelStudio as LabelStudio
from .label_studio_host import LabelStudioHost as LabelStudioHost
from .server import listen as listen
from .work import Model as Model, Repository as Repository
