from .child import start_process as start_process
from .dicom import rules_of as rules_of
from .grouping import TAKEN as TAKEN
from .listing import list_refs as list_refs
from .origin import (
    IMAGE_SUFFIXES as IMAGE_SUFFIXES,
    MAX_BYTES as MAX_BYTES,
    Held as Held,
    ImageRef as ImageRef,
    Origin as Origin,
    Unreadable as Unreadable,
    file_ref as file_ref,
    labels_from_folders as labels_from_folders,
)
from .phash import (
    HASH_BYTES as HASH_BYTES,
    THUMBNAIL_SIDE as THUMBNAIL_SIDE,
    mirrored_hashes as mirrored_hashes,
    mirrored_thumbnails as mirrored_thumbnails,
)
from .pixels import (
    REASONS as REASONS,
    Preprocess as Preprocess,
    as_rgb as as_rgb,
    decode as decode,
    decode_settings as decode_settings,
    decoder_version as decoder_version,
    encode as encode,
    is_image as is_image,
    resize_crop as resize_crop,
    save_png as save_png,
    written as written,
)
from .pool import (
    TIMEOUT as TIMEOUT,
    Decoded as Decoded,
    DecoderPool as DecoderPool,
    NoDecoder as NoDecoder,
    TooHeavy as TooHeavy,
)
from .sample_photos import PHOTOGRAPHS as PHOTOGRAPHS, photographs as photographs
from .source import (
    ImageSet as ImageSet,
    count_names as count_names,
    finder as finder,
    is_local as is_local,
    walk_folder as walk_folder,
)
from .thumbnails import (
    THUMBNAIL as THUMBNAIL,
    Originals as Originals,
    Thumbnails as Thumbnails,
    whole_pictures as whole_pictures,
)
from .views import (
    CENTER as CENTER,
    VIEWS as VIEWS,
    Looks as Looks,
    View as View,
    parse_views as parse_views,
)
