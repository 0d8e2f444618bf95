"""The engine that runs anywhere torch does, and on CUDA: the reference for all others."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featx.backbones.backbone import Backbone
from featx.backbones.engines.base import EXACT_START, Batch, Embeddings, Engine, fill, laid_out, sizes_of
from featx.errors import UsageError

if TYPE_CHECKING:
    import torch

LANES = 2
"""Batches that a torch engine has under way."""


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
