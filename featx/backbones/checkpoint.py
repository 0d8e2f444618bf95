"""From a file somebody trained to the parameters of a network: read without running code, matched by name.

Checkpoints differ in wrapping (``{"state_dict": ...}``), in prefixes (``module.`` of DataParallel, ``model.`` of
Lightning), in the number of classes, and in spelling between libraries. All of that is undone here; what then does
not fit is an error that names it.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featx.errors import WeightsError, in_words, listed

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # side classifiers that only training uses

State = OrderedDict[str, Tensor]

# torchvision published DenseNets before a dot was forbidden in module names.
_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
_EFFICIENTNET_PYTORCH = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_EFFICIENTNET_PYTORCH |= {"_fc": "classifier"}
_EXPANDED = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
_TO_EXPANDED = dict(zip(_EXPANDED, ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"), strict=True))
_TO_PLAIN = dict(zip(_EXPANDED[2:], ("conv_dw", "bn1", "conv_pw", "bn2"), strict=True))


def load_checkpoint(body: nn.Module, path: Path, *, network: str, classifiers: Sequence[str]) -> None:
    """Load a checkpoint file into ``body``, its classification layer aside.

    Parameters
    ----------
    body : the network, with its classification layer (which keeps the values it has).
    path : a torch file or a ``.safetensors`` file.
    network : what to call the network in errors.
    classifiers : names of the classification layers, which may be of any size or missing in the file.

    Raises
    ------
    WeightsError
        If the file cannot be read as weights, or holds those of another network.
    """
    state = _unwrap(read_file(path), path)
    state = _without_prefix(state, set(body.state_dict()))
    state = _respell(state, body)
    heads = {f"{name.split('.')[0]}." for name in classifiers}
    dropped = tuple(f"{name}." for name in classifiers)
    own = set(body.state_dict())
    for key in list(state):
        if key.startswith((*dropped, *_AUXILIARY)) or (key not in own and key.startswith(tuple(heads))):
            del state[key]
    try:
        missing, unexpected = body.load_state_dict(state, strict=False)
    except RuntimeError as error:  # how torch reports shapes that differ
        shapes = re.findall(r"size mismatch for ([^:]+): .*?torch.Size\(([^)]*)\).*?torch.Size\(([^)]*)\)", str(error))
        name, found, expected = shapes[0] if shapes else ("?", "?", "?")
        raise WeightsError(
            f"these are the weights of another network than {network}: {name} differs in shape",
            where=path,
            expected=expected,
            found=found,
            hint="Name the network that the file was trained for with --backbone.",
        ) from error
    # Files from before torch 0.4.1 do not count batches, and nothing in eval mode asks.
    missing = [k for k in missing if not k.startswith(dropped) and not k.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise _mismatch(missing, unexpected, len(own), path, network)


def read_file(path: Path) -> Any:
    """What torch or safetensors finds in a file, on the CPU and without running code; WeightsError if nothing."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"cannot be read ({error.strerror or error})", where=path) from error
    except pickle.UnpicklingError as error:
        raise WeightsError(
            "is not a file of weights alone",
            where=path,
            hint="Save it with torch.save(model.state_dict(), FILE): files that hold more could run code when loaded.",
        ) from error
    except Exception as error:  # readers raise whatever foreign bytes provoke
        raise WeightsError(
            "cannot be read as weights",
            where=path,
            expected="a state dict saved by torch.save, or a .safetensors file",
            found=in_words(error),
        ) from error


def _unwrap(content: Any, path: Path) -> State:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if isinstance(content, Mapping):
        state: State = OrderedDict((k, v) for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor))
        if state:
            # Versions of the layers, by which torch itself converts old spellings (MNASNet).
            state._metadata = getattr(content, "_metadata", None)  # type: ignore[attr-defined]
            return state
    raise WeightsError(
        "holds no weights", where=path, expected="a mapping of names to tensors", found=type(content).__name__
    )


def _without_prefix(state: State, own: set[str]) -> State:
    """Strip known prefixes for as long as that is what keeps names from matching."""
    while not own & set(state):
        prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        metadata = getattr(state, "_metadata", None)
        state = OrderedDict((k.removeprefix(prefix), v) for k, v in state.items() if k.startswith(prefix))
        if metadata is not None:
            # Keyed by module: "module.layers" becomes "layers", and "module" becomes the root, "".
            metadata = {
                f"{k}."[len(prefix) :].rstrip("."): v for k, v in metadata.items() if f"{k}.".startswith(prefix)
            }
        state._metadata = metadata  # type: ignore[attr-defined]
    return state


def _respell(state: State, body: nn.Module) -> State:
    if "_conv_stem.weight" in state:
        return OrderedDict((_from_efficientnet_pytorch(key, state, body), value) for key, value in state.items())
    if any(_DENSENET.match(key) for key in state):
        return OrderedDict((_DENSENET.sub(r"\1\2", key), value) for key, value in state.items())
    return state


def _from_efficientnet_pytorch(key: str, state: State, body: nn.Module) -> str:
    """The name that timm gives to a parameter of lukemelas's EfficientNet-PyTorch."""
    head, _, rest = key.partition(".")
    if head != "_blocks":
        return f"{_EFFICIENTNET_PYTORCH.get(head, head)}.{rest}"
    number, layer, parameter = rest.split(".", 2)
    stages = body.get_submodule("blocks")
    places = [(i, j) for i, stage in enumerate(stages.children()) for j, _ in enumerate(stage.children())]
    names = _TO_EXPANDED if f"_blocks.{number}._expand_conv.weight" in state else _TO_PLAIN
    if int(number) >= len(places):
        return key  # of a deeper network; reported as unexpected
    stage, block = places[int(number)]
    return f"blocks.{stage}.{block}.{names.get(layer, layer)}.{parameter}"


def _mismatch(missing: list[str], unexpected: list[str], total: int, path: Path, network: str) -> WeightsError:
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {total} weights are missing ({listed(missing, 3)})")
    if unexpected:
        parts.append(f"{len(unexpected)} are not known to it ({listed(unexpected, 3)})")
    other = len(missing) > total // 2 or (unexpected and not missing)
    what = f"these are the weights of another network than {network}" if other else f"does not fill {network}"
    return WeightsError(
        f"{what}: {', '.join(parts)}",
        where=path,
        hint="Name the network that the file was trained for with --backbone.",
    )
