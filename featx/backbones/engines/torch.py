"""How a frozen network is run: the choice among engines, and torch, the reference.

An engine takes batches of uint8 pixels and gives float32 embeddings, in order. All engines give the same
embeddings (cosine to plain torch >= 0.9999 at fp32, >= 0.999 at bf16); a network that is quantised (int8) is another
network, with a hash of its own. Short batches are padded, so every batch has the one shape, and an image's embedding
does not depend on what else is in its batch: bit for bit at fp32, and at bf16 for the convolutional networks that were
tried (a vision transformer on OpenVINO is not position-independent there).

``TorchEngine`` runs anywhere torch does, and on CUDA. :mod:`featx.backbones.engines.openvino` is 5 to 20 times faster
on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import importlib.util
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import PIXELS
from featx._system import available_cpus, has_int8
from featx.backbones.backbone import Backbone
from featx.backbones.catalogue import INT8, INT8_LOSS
from featx.backbones.engines.base import EXACT_START, Batch, Embeddings, Engine, fill, laid_out, sizes_of
from featx.errors import UsageError

if TYPE_CHECKING:
    import torch

ENGINES = ("auto", "torch", "openvino")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")

BATCH_SIZES = {"cpu": 16, "cuda": 256}
"""Images per batch, by device: large enough that larger ones gain nothing."""

LANES = 2
"""Batches that a torch engine has under way."""


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
        from featx.backbones.thumbnail import ThumbnailEngine

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


class TorchEngine(Engine):
    """Plain torch: the reference on a CPU, and the fast path on CUDA.

    On CUDA uint8 pixels travel from pinned memory on a stream of their own, are normalised on the device, and run
    channels-last under autocast, while the next batch is being prepared.
    """

    name = "torch"

    def __init__(
        self,
        backbone: Backbone,
        device: str,
        precision: str,
        batch_size: int,
        *,
        threads: int | None = None,
        pad: bool = True,
    ) -> None:
        import torch

        self.device, self.batch_size = device, batch_size
        self.precision = _cuda_precision(precision) if device == "cuda" else precision.replace("auto", "fp32")
        self._shape = (batch_size, *backbone.preprocess.crop, 3)
        self._sizes = sizes_of(batch_size, pad=pad)
        if threads is not None:
            torch.set_num_threads(threads)
        network = backbone.network()
        if device == "cuda" or self.precision == "bf16":  # a copy: the backbone's own stays as it is
            network = copy.deepcopy(network).to(device)
        if device == "cuda":
            network = network.to(memory_format=torch.channels_last)
        if self.precision == "bf16":
            _keep_start_exact(network, device)
        self._network = network
        # In the scale of uint8 pixels, so that one subtraction and one division normalise.
        self._mean = torch.tensor(backbone.preprocess.mean, device=device).mul(255).view(1, 3, 1, 1)
        self._std = torch.tensor(backbone.preprocess.std, device=device).mul(255).view(1, 3, 1, 1)

    def embed(self, batches: Iterable[Batch]) -> Iterator[Embeddings]:
        """See :meth:`Engine.embed`; two batches are under way, on CUDA at the same time."""
        # The same two lanes on a CPU, where each has ended before the next starts: one order of things to test.
        lanes = [_Lane(self._shape, cuda=self.device == "cuda") for _ in range(LANES)]
        busy: deque[_Lane] = deque()
        for number, batch in enumerate(batches):
            if len(busy) == LANES:  # the oldest is the one that is used again next
                yield busy.popleft().take()
            lane = lanes[number % LANES]
            size = next((size for size in self._sizes if size >= len(batch)), self.batch_size)
            lane.start(batch, size, self._run)
            busy.append(lane)
        while busy:
            yield busy.popleft().take()

    def maps(self, batch: Batch) -> list[tuple[NDArray[np.float32], list[NDArray[np.float32]]]]:
        """See :func:`featx.backbones.engines.base.feature_maps`: each layer's embeddings, and what they may be from.

        Whatever torch was asked to average on the way; which of it became the embedding, the numbers show.
        """
        import torch
        from torch.overrides import TorchFunctionMode

        averaged: list[torch.Tensor] = []
        averages = {
            torch.Tensor.mean, torch.mean, torch.nn.functional.adaptive_avg_pool2d, torch.nn.functional.avg_pool2d,
            torch.adaptive_avg_pool1d, torch.nn.functional.adaptive_avg_pool1d,
        }  # fmt: skip

        class Watch(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if function in averages:
                    averaged.append(args[0] if args else kwargs["input"])
                return function(*args, **kwargs or {})

        images = np.zeros((next(size for size in self._sizes if size >= len(batch)), *batch.shape[1:]), np.uint8)
        n = fill(images, batch)
        with Watch():
            embeddings = self._run(torch.from_numpy(images).to(self.device))
        found = []
        for embedding in (each[:n].cpu().numpy() for each in embeddings):
            tried = []
            for each in averaged:
                for place, rank, axis in (("first", 4, 1), ("last", 4, 3), ("tokens", 3, 2)):
                    if each.ndim == rank and each.shape[axis] == embedding.shape[1]:
                        tried.append(laid_out(each[:n].float().cpu().numpy(), place))
            found.append((embedding, tried))
        return found

    def _run(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Normalise uint8 (n, h, w, 3) on its device and run the network."""
        import torch

        # The permuted view of NHWC pixels is channels-last already; only the CPU reference is made contiguous.
        images = pixels.permute(0, 3, 1, 2).float().sub_(self._mean).div_(self._std)
        if self.device == "cpu":
            images = images.contiguous()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        # Without this, "fp32" convolutions on CUDA are TF32: ten bits of mantissa.
        exact: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.device == "cuda" and dtype is None:
            exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exact, torch.autocast(self.device, dtype=dtype, enabled=dtype is not None):
            outputs: tuple[torch.Tensor, ...] = self._network(images)
            return tuple(output.float() for output in outputs)


class _Lane:
    """Buffers of one batch on its way through torch; on CUDA they are pinned and everything is asynchronous."""

    def __init__(self, shape: tuple[int, ...], *, cuda: bool) -> None:
        import torch

        self._cuda = cuda
        self._input = torch.zeros(shape, dtype=torch.uint8, pin_memory=cuda)
        self._outputs: tuple[torch.Tensor, ...] = ()
        self._n = 0
        cuda_module: Any = torch.cuda  # partly annotated
        if cuda:
            self._copying, self._done = cuda_module.Stream(), cuda_module.Event()

    def start(self, batch: Batch, size: int, run: Any) -> None:
        """Begin to embed a batch, filled up to ``size``; the lane must be free."""
        import torch

        images = self._input[:size]
        self._n = fill(images.numpy(), batch)
        if not self._cuda:
            self._outputs = run(images)
            return
        with torch.cuda.stream(self._copying):
            pixels = images.to("cuda", non_blocking=True)
        compute = torch.cuda.current_stream()
        compute.wait_stream(self._copying)
        pixels.record_stream(compute)  # or the copy stream could reuse its memory too early
        outputs = run(pixels)
        if not self._outputs:
            shapes = [(len(self._input), *output.shape[1:]) for output in outputs]
            self._outputs = tuple(torch.empty(shape, pin_memory=True) for shape in shapes)
        for host, output in zip(self._outputs, outputs, strict=True):
            host[:size].copy_(output, non_blocking=True)
        self._done.record(compute)

    def take(self) -> Embeddings:
        """Wait for the batch, and return copies of its embeddings."""
        if self._cuda:
            self._done.synchronize()
        return tuple(output[: self._n].numpy().copy() for output in self._outputs)


def _keep_start_exact(network: torch.nn.Module, device: str) -> None:
    """Take the first convolutions out of autocast; what follows them stays fp32 up to the next convolution."""
    import torch

    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    if not any(1 < module.groups == module.in_channels for module in convolutions):
        return

    def exact(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(images: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device, enabled=False):
                return forward(images.float())

        return run

    for module in convolutions[: math.ceil(EXACT_START * len(convolutions))]:
        setattr(module, "forward", exact(module.forward))  # noqa: B010 - an instance's method, which mypy refuses


def _cuda_precision(precision: str) -> str:
    import torch

    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if precision == "bf16" and not has_bf16:
        raise UsageError("this GPU has no bf16", where="precision", hint="Use --precision fp16 or fp32.")
    return precision


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
