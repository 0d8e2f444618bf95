"""Logistic regression over many rows on a GPU: scikit-learn's own solver, on tensors of torch (its array API).

The one place past the wall that knows torch, and only where a device is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from featx.errors import UsageError
from featx.heads.solvers.blocks import Rows, row_blocks
from featx.heads.solvers.rows import Array

SWITCH = "SCIPY_ARRAY_API"
"""The environment variable without which SciPy takes no tensors; it is read when SciPy is first imported."""

_TOLERANCE = 1e-6
_MAX_ITER = 10_000


def check_device(device: str) -> None:
    """Say now, not after minutes of work, that nothing can be solved on this device of torch.

    Raises
    ------
    UsageError
        There is no such device, SciPy was not told to take tensors, or scikit-learn is too old.
    """
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("no CUDA device", where="--device cuda", hint="Leave --device out: the CPU does it too.")
    if os.environ.get(SWITCH) != "1":
        raise UsageError(
            "SciPy takes no tensors", expected=f"{SWITCH}=1 in the environment before Python starts",
            found=os.environ.get(SWITCH, "not set"),
        )  # fmt: skip
    if tuple(int(part) for part in sklearn.__version__.split(".")[:2]) < (1, 9):
        raise UsageError(
            "this scikit-learn solves no logistic regression on tensors",
            expected="1.9 or newer", found=sklearn.__version__, hint="pip install -U scikit-learn",
        )  # fmt: skip


def fit_on_device(
    rows: Rows,
    labels: NDArray[np.integer],
    n_classes: int,
    c: float,
    *,
    device: str,
    row_scale: Rows | None = None,
    prepare: Callable[[Rows], Rows] | None = None,
    scale_free: bool = False,
) -> tuple[Array, Array, bool]:
    """Do what ``fit_blocks`` of :mod:`featx.heads.solvers.blocks` does, on a device of torch.

    The device holds one copy of the rows, in double precision.

    Parameters
    ----------
    device : ``"cuda"``, ``"cuda:1"``, or ``"cpu"``.
    """
    import torch

    check_device(device)
    on_device = torch.empty(rows.shape, dtype=torch.float64, device=device)
    for part in row_blocks(len(rows)):
        block = rows[part] if prepare is None else prepare(rows[part])
        block = block if row_scale is None else block * row_scale[part, None]
        on_device[part] = torch.from_numpy(np.ascontiguousarray(block)).to(device)
    # Centred, where lbfgs needs far fewer steps; the intercept is free, so that changes nothing else.
    mean = on_device.mean(dim=0)
    on_device -= mean
    unit = (float((on_device**2).sum()) / len(rows) if scale_free else 1.0) or 1.0
    targets = torch.as_tensor(np.asarray(labels, dtype=np.int64), device=device)
    model = LogisticRegression(C=c / unit, tol=_TOLERANCE, max_iter=_MAX_ITER)
    with sklearn.config_context(array_api_dispatch=True):
        model.fit(on_device, targets)
    coef = _numpy(model.coef_)
    return coef, _numpy(model.intercept_) - coef @ _numpy(mean), int(model.n_iter_.max()) < _MAX_ITER


def _numpy(tensor: Any) -> Array:
    return np.asarray(tensor.cpu().numpy(), dtype=np.float64)
