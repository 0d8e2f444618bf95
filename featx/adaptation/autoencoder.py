"""A small convolutional autoencoder that learns from the user's own images, without their labels.

It squeezes an image through a short code and learns to draw it again; the code is then an embedding like any other:
``featx extract --backbone autoencoder --weights FILE``. It is what can be had without any pretraining, and so the
control beside it: where photos resemble those of ImageNet, pretrained embeddings are far ahead.
"""

from __future__ import annotations

import copy
import io
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from featx._files import publish_bytes
from featx.backbones import CHANNELS, FORMAT, FORMAT_VERSION, SIDE, Encoder, check_shape, preprocess_of, seeded
from featx.errors import ImageError, UsageError
from featx.images import DecoderPool, ImageSet

MIN_IMAGES = 10
HELD_OUT = 0.1
IMAGE_PASSES = 60_000
"""Without a number of epochs: as many as it takes to see so many images, and at least :data:`MIN_EPOCHS`."""

MIN_EPOCHS = 5
_BATCH = 32
_RATE = 2e-3

Tick = Callable[[int, int, str], None]


class Decoder(nn.Sequential):
    """Codes (n, dim) to images (n, 3, size, size), values from -1 to 1."""

    def __init__(self, dim: int, size: int) -> None:
        side = size // SIDE
        layers: list[nn.Module] = [nn.Linear(dim, CHANNELS[-1] * side**2), nn.Unflatten(1, (CHANNELS[-1], side, side))]
        for before, channels in zip(CHANNELS[::-1], (*CHANNELS[-2::-1], 3), strict=True):
            layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.Upsample(scale_factor=2.0)]
            layers += [nn.Conv2d(before, channels, 3, 1, 1)]
        super().__init__(*layers, nn.Tanh())


@dataclass(frozen=True)
class Autoencoder:
    """A trained one.

    Attributes
    ----------
    encoder, decoder : in eval mode, on the CPU.
    dim, size : length of a code; pixels a side of an image.
    error : mean squared error of held-out images, of values from 0 to 1.
    baseline : that of drawing the mean image every time.
    errors : held-out error by epoch; the best of them was kept, so ``error`` is a little too good.
    images, held_out : how many it learnt from, and was judged on.
    epochs : that were run, of ``planned``.
    """

    encoder: Encoder
    decoder: Decoder
    dim: int
    size: int
    error: float
    baseline: float
    errors: tuple[float, ...]
    images: int
    held_out: int
    planned: int
    random_state: int
    seconds: float

    @property
    def epochs(self) -> int:
        """Epochs that were trained."""
        return len(self.errors)

    def facts(self) -> dict[str, Any]:
        """All that is not a network, as plain types."""
        return {
            "dim": self.dim, "size": self.size, "reconstruction_error": self.error,
            "mean_image_error": self.baseline, "explained": 1 - self.error / self.baseline if self.baseline else 0.0,
            "errors": list(self.errors), "images": self.images, "held_out": self.held_out, "epochs": self.epochs,
            "planned_epochs": self.planned, "random_state": self.random_state, "seconds": round(self.seconds, 2),
        }  # fmt: skip

    def save(self, path: Path) -> Path:
        """Publish the checkpoint, whole or not at all."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": {"dim": self.dim, "size": self.size, "preprocess": asdict(preprocess_of(self.size))},
            "training": self.facts(),
            "state_dict": dict(self.encoder.state_dict()),
            "decoder": dict(self.decoder.state_dict()),
        }
        out = io.BytesIO()
        torch.save(content, out)
        return publish_bytes(path, out.getvalue())


def held_out_rows(digests: NDArray[np.uint8], random_state: int) -> NDArray[np.bool_]:
    """Which of the images (n, 32 bytes each) are held out: a tenth of the different ones, with all their copies."""
    groups = np.unique(digests, axis=0, return_inverse=True)[1].reshape(-1)
    n = int(groups.max()) + 1 if len(groups) else 0
    if n < MIN_IMAGES:
        raise UsageError(
            "too few images to learn from", expected=f"at least {MIN_IMAGES} different ones", found=n,
            hint="A pretrained backbone needs none: featx extract SOURCE --out STORE",
        )  # fmt: skip
    chosen = np.random.default_rng(random_state).permutation(n)[: max(1, round(HELD_OUT * n))]
    return np.isin(groups, chosen)


@dataclass(frozen=True)
class Pixels:
    """Images ready to learn from.

    Attributes
    ----------
    pixels : uint8 (n, size, size, 3), in a temporary file that goes with the last reference to it.
    digests : uint8 (n, 32).
    refused : id and refusal of each image that cannot be read.
    """

    pixels: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    refused: tuple[tuple[str, ImageError], ...]


def read_pixels(
    images: ImageSet, size: int, *, workers: int, progress: Callable[[int, int], None] | None = None
) -> Pixels:
    """Decode every image once at ``size`` pixels a side; ``progress`` is called as ``progress(done, total)``."""
    n, shape = len(images), (size, size, 3)
    with tempfile.TemporaryFile() as file:
        file.truncate(n * math.prod(shape))
        pixels = np.memmap(file, dtype=np.uint8, mode="r+", shape=(n, *shape))
    digests: list[bytes] = []
    refused: list[tuple[str, ImageError]] = []
    with DecoderPool(preprocess_of(size), workers=min(workers, n)) as pool:
        stream = pool.run((ref.path for ref in images.refs), lambda digest: False, ahead=4 * workers)
        for done, (ref, decoded) in enumerate(zip(images.refs, stream, strict=True)):
            if progress:
                progress(done, n)
            if decoded.refusal is not None:
                refused.append((ref.id, decoded.refusal))
                continue
            assert decoded.pixels is not None
            assert decoded.digest is not None
            pixels[len(digests)] = decoded.pixels
            digests.append(decoded.digest)
    found = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    return Pixels(pixels[: len(digests)], found, tuple(refused))


def train_autoencoder(
    pixels: NDArray[np.uint8],
    held: NDArray[np.bool_],
    *,
    dim: int = 64,
    epochs: int | None = None,
    random_state: int = 0,
    device: str = "cpu",
    tick: Tick | None = None,
) -> Autoencoder:
    """Learn to draw images again from a code of ``dim`` numbers.

    Parameters
    ----------
    pixels : uint8 (n, size, size, 3); may be a file's.
    held : (n,) which images are for judging only; the epoch with the least error on them is kept.
    dim : length of the code.
    epochs : by default enough to see :data:`IMAGE_PASSES` images.
    random_state : of weights, order and mirroring; the same seed gives the same network on the same machine.
    tick : called as ``tick(done, total, what)``, in epochs.

    Returns
    -------
    The autoencoder. Interrupted after the first epoch, that of the epochs so far: ``epochs < planned``.
    """
    started = time.perf_counter()
    size = pixels.shape[1]
    check_shape(dim, size)
    learn, judge = np.flatnonzero(~held), np.flatnonzero(held)
    planned = max(MIN_EPOCHS, -(-IMAGE_PASSES // len(learn))) if epochs is None else epochs
    rng = np.random.default_rng([random_state, 1])
    with seeded(random_state):
        encoder, decoder = Encoder(dim, size), Decoder(dim, size)
    network = nn.Sequential(encoder, decoder).to(device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=1e-4)
    batches = max(1, round(len(learn) / _BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, planned * batches)
    errors: list[float] = []
    best = copy.deepcopy(network.state_dict())
    try:
        for epoch in range(planned):
            if tick:
                told = f", held-out error {min(errors):.4f}" if errors else ""
                tick(epoch, planned, f"learning{told}")
            network.train()
            for some in np.array_split(rng.permutation(learn), batches):
                images = _images(pixels[np.sort(some)], device)
                mirrored = torch.from_numpy(rng.random(len(some)) < 0.5).to(device)
                images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
                loss = functional.mse_loss(network(images), images)
                optimiser.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimiser.step()
                schedule.step()
            errors.append(_error(network, pixels, judge, device))
            if errors[-1] == min(errors):
                best = copy.deepcopy(network.state_dict())
    except KeyboardInterrupt:
        if not errors:
            raise
    network.load_state_dict(best)
    network = network.to("cpu").eval().requires_grad_(False)
    return Autoencoder(
        encoder=encoder, decoder=decoder, dim=dim, size=size, error=min(errors),
        baseline=_baseline(pixels, learn, judge), errors=tuple(errors), images=len(learn), held_out=len(judge),
        planned=planned, random_state=random_state, seconds=time.perf_counter() - started,
    )  # fmt: skip


def _images(pixels: NDArray[np.uint8], device: str) -> Tensor:
    """Normalised (n, 3, h, w) of uint8 (n, h, w, 3)."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def _error(network: nn.Module, pixels: NDArray[np.uint8], rows: NDArray[np.intp], device: str) -> float:
    """Mean squared error of values from 0 to 1."""
    network.eval()
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            images = _images(pixels[rows[start : start + _BATCH]], device)
            total += float(functional.mse_loss(network(images), images)) * len(images)
    return total / len(rows) / 4  # from -1 to 1 is twice as far as from 0 to 1


def _baseline(pixels: NDArray[np.uint8], learn: NDArray[np.intp], judge: NDArray[np.intp]) -> float:
    mean = np.zeros(pixels.shape[1:])
    for start in range(0, len(learn), 1024):
        mean += pixels[learn[start : start + 1024]].sum(axis=0, dtype=np.float64)
    mean /= len(learn)
    return float(np.mean([np.square((pixels[row] - mean) / 255).mean() for row in judge]))
