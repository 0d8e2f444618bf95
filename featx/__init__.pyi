from .adaptation import finetune_episodes as finetune_episodes
from .backbones import (
    Provider as Provider,
    list_backbones as list_backbones,
    load_backbone as load_backbone,
    make_engine as make_engine,
)
from .errors import FeatxError as FeatxError
from .evaluation import (
    GroupKShotSplit as GroupKShotSplit,
    KShotSplit as KShotSplit,
    PixelExtractor as PixelExtractor,
    make_pixels_baseline as make_pixels_baseline,
    sweep_heads as sweep_heads,
)
from .extraction import FeatureExtractor as FeatureExtractor, extract_features as extract_features
from .heads import make_head as make_head
from .images import ImageSet as ImageSet, Preprocess as Preprocess
from .retrieval import GalleryIndex as GalleryIndex
from .store import FeatureSet as FeatureSet, iter_features as iter_features, read_features as read_features
