"""Torch hub's checkpoint folder, and fetching weights into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from featx.errors import WeightsError

Progress = Callable[[str], None]
"""Told, in a sentence, before something slow begins (a download)."""


def hub_folder() -> Path:
    """Torch hub's checkpoint folder, found by torch's own rules without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch").expanduser() / "hub" / "checkpoints"


def fetch(url: str, path: Path, sha256_prefix: str, progress: Progress | None) -> None:
    """Download a file of weights, checked by as much of its sha256 as is known; WeightsError where that fails."""
    import torch.hub

    if progress is not None:
        progress(f"downloading {url} to {path.parent}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_prefix or None, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError is how torch.hub reports a wrong hash
        reason = getattr(error, "reason", None) or error
        raise WeightsError(
            f"the weights are not on this machine and cannot be downloaded from {url} ({reason})",
            where=path.name,
            hint=f"Put that file into {path.parent}, or name one that you have with --weights FILE.",
        ) from error
