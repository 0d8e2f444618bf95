from .hdf5 import MAX_STRING as MAX_STRING
from .index import (
    PARTS as PARTS,
    Index as Index,
    Refused as Refused,
    longest_id as longest_id,
    read_index as read_index,
    read_quarantine as read_quarantine,
)
from .manifest import (
    Manifest as Manifest,
    backbones_of as backbones_of,
    check_backbones as check_backbones,
    check_same as check_same,
    fingerprint as fingerprint,
    layers_of as layers_of,
    name_of as name_of,
    read_manifest as read_manifest,
    title_of as title_of,
)
from .reader import (
    Alike as Alike,
    FeatureReader as FeatureReader,
    FeatureSet as FeatureSet,
    Pictures as Pictures,
    is_packed as is_packed,
    iter_features as iter_features,
    read_features as read_features,
    source_of as source_of,
    steady as steady,
    stored_backbones as stored_backbones,
)
from .shards import ShardReader as ShardReader, digest_bytes as digest_bytes, digest_keys as digest_keys
from .tables import export_table as export_table
from .tools import content_hash as content_hash, info as info, pack as pack, verify as verify
from .writer import SHARD_ROWS as SHARD_ROWS, StoreWriter as StoreWriter
