from .metrics import RetrievalResult as RetrievalResult, evaluate_retrieval as evaluate_retrieval
from .neighbours import GalleryIndex as GalleryIndex
from .search import (
    DuplicateGroup as DuplicateGroup,
    ImageSearch as ImageSearch,
    Match as Match,
    count_duplicates as count_duplicates,
    duplicate_groups as duplicate_groups,
    label_of as label_of,
)
