from .autoencoder_network import (
    CHANNELS as CHANNELS,
    FORMAT as FORMAT,
    FORMAT_VERSION as FORMAT_VERSION,
    SIDE as SIDE,
    Encoder as Encoder,
    check_shape as check_shape,
    preprocess_of as preprocess_of,
)
from .backbone import (
    DEFAULT_BACKBONE as DEFAULT_BACKBONE,
    Backbone as Backbone,
    BackboneInfo as BackboneInfo,
    list_backbones as list_backbones,
    load_backbone as load_backbone,
)
from .catalogue import ADVICE as ADVICE, NETWORKS as NETWORKS
from .cut import (
    Halves as Halves,
    Tail as Tail,
    Trunk as Trunk,
    Unfreeze as Unfreeze,
    cut_network as cut_network,
    tail_bytes as tail_bytes,
    tuned as tuned,
)
from .engines.base import (
    Engine as Engine,
    feature_maps as feature_maps,
    for_views as for_views,
    layer_place as layer_place,
    of_layer as of_layer,
)
from .engines.choice import (
    BATCH_SIZES as BATCH_SIZES,
    cuda_devices as cuda_devices,
    is_for_openvino as is_for_openvino,
    make_engine as make_engine,
)
from .engines.graph import (
    Graph as Graph,
    carried as carried,
    check_network as check_network,
    quantised as quantised,
)
from .frozen import describe_layers as describe_layers, seeded as seeded
from .hub import cache_folder as cache_folder
from .pixels_baseline import thumbnail_preprocess as thumbnail_preprocess
from .pretrained import pretrained_classes as pretrained_classes
from .provenance import provenance_of as provenance_of
from .provider import (
    Own as Own,
    Provider as Provider,
    import_provider as import_provider,
    is_own as is_own,
    named as named,
)
from .recipes import RECIPES as RECIPES
from .speed import Speed as Speed, measure_speed as measure_speed, measured_speeds as measured_speeds
from .weights import (
    Carried as Carried,
    add_weights as add_weights,
    fetch_weights as fetch_weights,
    list_weights as list_weights,
    pack_weights as pack_weights,
)
