"""Networks with eight-bit weights and activations, by NNCF, calibrated on pictures that come with a package.

What is measured on the pictures are the ranges of activations. They are crops of scikit-image's photographs and never
a user's own, so that a network does not depend on whose photos came first. On five sets of photos the embeddings were
as close to those of single precision as when calibrated on photos of these sets (``scripts/bench_precision.py``).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._files import canonical_json
from featx.backbones.backbone import Backbone
from featx.backbones.engines.base import without_telemetry
from featx.errors import UsageError
from featx.images import CENTER, Looks, Preprocess, photographs

CROPS = 19
"""Of each photograph, that ranges are measured on."""


def quantise(backbone: Backbone, model: Any) -> Any:
    """OpenVINO's model of a network with eight-bit numbers.

    Weights are quantised symmetrically for each channel, activations for each tensor, and biases are corrected layer
    by layer for the mean error that this makes ("full bias correction", Nagel et al. 2019). Weights use seven of their
    eight bits ("overflow fix"), so that the sums of two products fit into sixteen bits: CPUs without VNNI instructions
    add in sixteen, and saturate. With eight bits they gave other embeddings (cosine 0.96 in the median); with seven
    the same on AVX2, AVX-512 and VNNI, to the last bit.

    Parameters
    ----------
    backbone : the network.
    model : of it, in single precision and for batches of any size; it is changed.

    Raises
    ------
    UsageError
        NNCF or scikit-image is not installed, or NNCF cannot quantise this network.
    """
    nncf = _import_nncf()
    pictures = list(_pictures(backbone.preprocess))
    try:
        model.reshape(pictures[0].shape)
        with _on_stderr():
            model = nncf.quantize(
                model,
                nncf.Dataset(pictures),
                subset_size=len(pictures),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                target_device=nncf.TargetDevice.CPU,
                fast_bias_correction=False,
                advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
            )
        model.reshape([-1, *pictures[0].shape[1:]])
    except Exception as error:  # whatever NNCF says of a network that it was not made for
        raise UsageError(
            "the network cannot be quantised",
            where=backbone.name,
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            hint="Use --precision fp32.",
        ) from error
    about = {
        "weights_sha256": backbone.weights_sha256,
        "preprocess": canonical_json(backbone.preprocess.to_json()).decode(),
        "layers": ",".join(backbone.layers),
        "made_by": f"nncf {nncf.__version__}",
    }
    for name, value in about.items():
        model.set_rt_info(value, ["featx", name])
    return model


def _pictures(preprocess: Preprocess) -> Iterator[NDArray[np.uint8]]:
    """Pixels (1, h, w, 3) of squares of 0.3 to 1 of a photograph's shorter side, always the same; half are mirrored."""
    rng = np.random.default_rng(0)
    pictures = photographs("quantising a network", "int8").values()
    for number in range(CROPS):
        looks = Looks(preprocess, ("flip",) if number % 2 else CENTER)
        for picture in pictures:
            side = int(min(picture.size) * rng.uniform(0.3, 1.0))
            left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
            yield looks.cut(picture.crop((left, top, left + side, top + side)))[None]


def _import_nncf() -> Any:
    # It asks torch for its extensions, which warns where CUDA's tools are there and no GPU is.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        with without_telemetry():
            import nncf
    except ImportError as error:
        raise UsageError(
            "NNCF, which quantises networks, is not installed",
            where="precision int8",
            hint="Install it with: pip install 'featx[int8]', or use --precision fp32.",
        ) from error
    return nncf


@contextlib.contextmanager
def _on_stderr() -> Iterator[None]:
    """NNCF's progress on stderr, for stdout is the answer's; of its log only errors."""
    log = logging.getLogger("nncf")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(level)
