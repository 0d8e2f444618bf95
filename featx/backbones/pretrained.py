"""The classification layer that a pretrained network came with, which a frozen network has had taken off.

Its rows are directions of the classes that the network was trained to tell apart: all that is left, offline, of the
images it was trained on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from featx.backbones.backbone import Backbone, CatalogueNetwork
from featx.backbones.checkpoint import load_checkpoint
from featx.errors import UsageError


def pretrained_classes(backbone: Backbone) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight (c, d) and bias (c,) of the layer that names the classes of the pretraining, from penultimate embeddings.

    Raises
    ------
    UsageError
        The weights are random; or the network is none of the catalogue, or its layer is no linear one.
    WeightsError
        The file has no such layer, or one of another size than the published weights.
    """
    if backbone.weights == "none":
        raise UsageError("random weights have not been pretrained on anything", where=backbone.name)
    provider = backbone.provider
    if not isinstance(provider, CatalogueNetwork) or backbone.file is None:
        raise UsageError("the classes of its pretraining are not known", where=backbone.name)
    body = provider.build()
    name = provider.classification_layer(body)
    layer = body.get_submodule(name or "")
    if not isinstance(layer, nn.Linear):
        raise UsageError("its classification layer is not linear", where=backbone.name, found=type(layer).__name__)
    load_checkpoint(body, backbone.file, network=backbone.name, classifiers=())
    weight = layer.weight.detach().double().numpy()
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().numpy()
    return weight, bias
