"""Which engine runs a frozen network, on which device and at which precision.

An engine takes batches of uint8 pixels and gives float32 embeddings, in order. All engines give the same
embeddings (cosine to plain torch >= 0.9999 at fp32, >= 0.999 at bf16); a network that is quantised (int8) is another
network, with a hash of its own. Short batches are padded, so every batch has the one shape, and an image's embedding
does not depend on what else is in its batch: bit for bit at fp32, and at bf16 for the convolutional networks that were
tried (a vision transformer on OpenVINO is not position-independent there).

:mod:`featx.backbones.engines.torch` runs anywhere, and on CUDA; :mod:`featx.backbones.engines.openvino` is 5 to 20
times faster on a CPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping

from featx._arrays import PIXELS
from featx._system import available_cpus, has_int8
from featx.backbones.backbone import Backbone
from featx.backbones.catalogue import INT8, INT8_LOSS
from featx.backbones.engines.base import Engine
from featx.errors import UsageError

ENGINES = ("auto", "torch", "openvino")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")

BATCH_SIZES = {"cpu": 16, "cuda": 256}
"""Images per batch, by device: large enough that larger ones gain nothing."""


def make_engine(
    backbone: Backbone,
    *,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | Mapping[str, int] | None = None,
    threads: int | None = None,
    pad: bool = True,
    network: bytes | None = None,
) -> Engine:
    """Choose and start an engine.

    Parameters
    ----------
    backbone : the network to run.
    engine : "auto" is torch on CUDA if there is a GPU, else OpenVINO if it is installed, else torch.
    device : "auto" is a GPU if there is one that torch can use and the engine can too.
    precision : "auto" is bf16 on a GPU that has it; on a CPU with instructions for it int8, where the catalogue says
        that the backbone bears it (:data:`featx.backbones.catalogue.INT8`); else fp32.
    batch_size : images per batch, or that by device ("cpu", "cuda"); None takes :data:`BATCH_SIZES`.
    threads : of the CPU; None takes as many as this process may use.
    pad : whether short batches are filled up to ``batch_size``. False computes them at the next power of two, which
        answers a lone image much sooner; an embedding may then differ in its last bits by the size of its batch.
    network : the graph that a model brought along, for OpenVINO.

    Raises
    ------
    UsageError
        For a combination that is impossible here; the message says what to do.
    WeightsError
        If the backbone's weights do not fit its network.
    """
    if backbone.name == PIXELS:
        from featx.backbones.pixels_baseline import ThumbnailEngine

        return ThumbnailEngine()
    choices = ((engine, ENGINES, "engine"), (device, DEVICES, "device"), (precision, PRECISIONS, "precision"))
    for value, allowed, what in choices:
        if value not in allowed:
            raise UsageError("not one of the choices", where=what, expected=" or ".join(allowed), found=value)
    if batch_size is None:
        batch_size = BATCH_SIZES
    sizes = batch_size if isinstance(batch_size, Mapping) else dict.fromkeys(BATCH_SIZES, batch_size)
    for number, what in (*((size, "batch size") for size in sizes.values()), (threads, "threads")):
        if number is not None and number < 1:
            raise UsageError("must be 1 or more", where=what, found=number)
    if engine == "openvino" and device == "cuda":
        raise UsageError("the engine openvino runs on the CPU", where="device", hint="Use --engine torch for CUDA.")
    if engine == "openvino" and not _installed("openvino"):
        raise UsageError(
            "OpenVINO is not installed",
            where="engine",
            hint="Install it (pip install openvino), or use --engine torch.",
        )
    if precision == "int8" and (device == "cuda" or engine == "torch" or not _installed("openvino")):
        raise UsageError("int8 is for OpenVINO on a CPU", where="precision", hint="Use bf16, or fp32.")
    if engine != "openvino" and device != "cpu" and precision != "int8" and _cuda():
        from featx.backbones.engines.torch import TorchEngine

        return TorchEngine(backbone, "cuda", precision, sizes["cuda"], threads=threads, pad=pad)
    if device == "cuda":
        raise UsageError(
            "torch finds no CUDA device here",
            where="device",
            hint="Use --device cpu, or install a torch and a driver that match the GPU.",
        )
    if precision == "fp16":
        raise UsageError("fp16 is for CUDA", where="precision", hint="On a CPU use fp32 or bf16.")
    if engine == "torch" or not _installed("openvino"):
        from featx.backbones.engines.torch import TorchEngine

        return TorchEngine(backbone, "cpu", precision, sizes["cpu"], threads=threads, pad=pad)
    from featx.backbones.engines.openvino import OpenVINOEngine

    return OpenVINOEngine(
        backbone,
        precision=_cpu_precision(backbone) if precision == "auto" else precision,
        batch_size=sizes["cpu"],
        threads=threads or available_cpus(),
        pad=pad,
        network=network,
    )


def is_for_openvino(engine: str, device: str) -> bool:
    """Whether :func:`make_engine` takes OpenVINO for these."""
    return _installed("openvino") and (
        engine == "openvino" or (engine == "auto" and device != "cuda" and (device == "cpu" or not _cuda()))
    )


def _cpu_precision(backbone: Backbone) -> str:
    """What "auto" is for OpenVINO here: int8 where what it costs is known and small, and nothing has to be made.

    Without torch nothing can be made: what comes with featx at int8 is all there is.
    """
    row = INT8.get(backbone.name)
    if row is None or (_installed("torch") and (row.loss > INT8_LOSS or not has_int8())):
        return "fp32"
    from featx.backbones.engines.graph import carried

    return "fp32" if carried(backbone) is None else "int8"


def cuda_devices() -> int:
    """How many GPUs torch can use here. Where there is no driver, torch (seconds to import) is not asked."""
    if not _has_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def _cuda() -> bool:
    return cuda_devices() > 0


def _has_driver() -> bool:
    for name in ("libcuda.so.1", "libamdhip64.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
