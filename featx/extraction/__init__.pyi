from .embedder import Embedder as Embedder, Seen as Seen, network_like as network_like
from .lanes import Lane as Lane
from .parts import Part as Part, finish_parts as finish_parts
from .run import (
    UNREAD as UNREAD,
    ExtractSummary as ExtractSummary,
    extract_features as extract_features,
    extract_lanes as extract_lanes,
)
from .runners.local import Job as Job, parse_devices as parse_devices, run_local as run_local
from .runners.ray import joblib_on_ray as joblib_on_ray, run_ray as run_ray
from .transformer import (
    FeatureExtractor as FeatureExtractor,
    ImageTransformer as ImageTransformer,
    items_of as items_of,
    pixels_of as pixels_of,
)
