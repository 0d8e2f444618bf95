"""Data sets of torchvision, by name, from files that are on this machine.

Where a data set takes a ``loader``, it is given one that returns the path, so the original files are embedded, as from
a folder, without decoding any here. The others (MNIST, CIFAR) keep arrays in memory; their images are handed on as PNG,
which loses nothing. All the usual splits of a data set are taken, unlabelled ones and folds are not.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featx.errors import ImageError, SourceError, UsageError, did_you_mean, in_words
from featx.images.origin import Fetched, ImageRef, file_ref
from featx.images.pixels import encode

_SPLITS = (("train", "train"), ("trainval", "train"), ("val", "val"), ("valid", "val"), ("test", "test"))
"""What data sets call their splits, and what they are called here; trainval only where there is no train."""


def torchvision_refs(name: str, root: Path) -> list[ImageRef]:
    """The images of all splits of a data set below ``root``.

    Raises
    ------
    UsageError
        No such data set, or one that is not made of images and classes, or that needs more than a root.
    SourceError
        Its files are not there, or not those that torchvision expects.
    """
    refs: dict[str, ImageRef] = {}
    for split, part in _parts(name, root):
        for ref in _refs(name, part, split, root):
            if ref.id in refs:
                raise SourceError("the same image in two splits", where=f"torchvision:{name}", found=ref.id)
            refs[ref.id] = ref
    return list(refs.values())


def _parts(name: str, root: Path) -> Iterator[tuple[str, Any]]:
    kind = _kind(name)
    options = inspect.signature(kind).parameters
    keywords: dict[str, Any] = {"loader": _path_itself} if "loader" in options else {}
    if "root" in options:
        keywords["root"] = root
    needed = [
        key
        for key, option in options.items()
        if option.default is option.empty
        and option.kind not in (option.VAR_KEYWORD, option.VAR_POSITIONAL)
        and key not in (*keywords, "split")
    ]
    if needed:
        raise UsageError(
            f"the data set {name} needs arguments that cannot be given here",
            found=", ".join(needed),
            hint="Write its images into class folders.",
        )
    if "root" in options and not root.is_dir():  # some data sets would make it
        raise _not_there(name, root, FileNotFoundError("no such folder"))
    if "train" in options:
        yield "train", _make(name, root, {**keywords, "train": True})
        yield "test", _make(name, root, {**keywords, "train": False})
    elif "split" in options:
        taken = set()
        for theirs, ours in _SPLITS:
            part = None if ours in taken else _make(name, root, {**keywords, "split": theirs}, optional=True)
            if part is not None:
                taken.add(ours)
                yield ours, part
        if not taken:
            raise UsageError(f"the data set {name} has none of the usual splits", expected="train, val or test")
    else:
        yield "", _make(name, root, keywords)


def _kind(name: str) -> Any:
    from torchvision import datasets

    kinds = {key: kind for key, kind in vars(datasets).items() if inspect.isclass(kind)}
    kinds = {key: kind for key, kind in kinds.items() if issubclass(kind, datasets.VisionDataset)}
    if name not in kinds:
        raise UsageError(
            f"torchvision has no data set {name!r}",
            expected="torchvision:NAME:ROOT, such as torchvision:DTD:data",
            hint=did_you_mean(name, kinds),
        )
    return kinds[name]


def _make(name: str, root: Path, keywords: dict[str, Any], *, optional: bool = False) -> Any:
    """One split; None where it is ``optional`` and the data set knows no such split."""
    try:
        return _kind(name)(**keywords)
    except ValueError as error:
        if optional and "Unknown value" in str(error):
            return None
        raise _not_there(name, root, error) from error
    except Exception as error:
        raise _not_there(name, root, error) from error


def _not_there(name: str, root: Path, error: Exception) -> SourceError:
    said = " ".join(str(error).split()).replace(" You can use download=True to download it", "").rstrip(".")
    return SourceError(
        f"torchvision cannot load {name} ({said[:300]})",
        where=root,
        hint=f"featx downloads nothing; to do it once: torchvision.datasets.{name}({str(root)!r}, download=True)",
    )


def _path_itself(path: Any) -> _Path:
    return _Path(os.fspath(path))


class _Path(str):
    """What stands for an image until it is decoded elsewhere."""

    __slots__ = ()


def _refs(name: str, part: Any, split: str, root: Path) -> Iterator[ImageRef]:
    labels = _labels(name, part)
    names = _class_names(part)
    for row in range(len(part)):
        label = _class_of(name, labels[row], names) if labels is not None else None
        picture = part[row][0] if "loader" in inspect.signature(type(part)).parameters else None
        if isinstance(picture, _Path):
            path = Path(picture)
            try:
                status = path.stat()
            except OSError:
                status = None  # the extraction quarantines it as missing
            inside = path.absolute().is_relative_to(root.absolute())
            shown = path.absolute().relative_to(root.absolute()).as_posix() if inside else path.as_posix()
            yield file_ref(shown, path, label, split, status)
        else:
            yield ImageRef(f"{split or 'all'}/{row:06d}", Item(part, row), label, split, -1, -1)


def _labels(name: str, part: Any) -> Any:
    """The class of every image, by the names that torchvision keeps them under; asked of each image where it has none.

    What is found under a name is believed if it agrees with the first and the last image.
    """
    size = len(part)
    ends = (0, size - 1)
    for attribute in ("targets", "_labels", "labels", "y"):
        found = getattr(part, attribute, None)
        if found is None or not hasattr(found, "__len__") or len(found) != size or not size:
            continue
        if all(_number(found[row]) is not None and _number(found[row]) == _number(part[row][1]) for row in ends):
            return found
    return [part[row][1] for row in range(size)]


def _number(value: Any) -> int | None:
    """A class as an int, or None for a target that is no class."""
    array = np.asarray(value)
    return int(array) if array.shape == () and array.dtype.kind in "iu" else None


def _class_of(name: str, target: Any, names: list[str]) -> str | None:
    number = _number(target)
    if number is None:
        raise UsageError(f"the data set {name} is not one of images and classes", found=f"a target {target!r:.80}")
    if number < 0:
        return None
    return names[number] if number < len(names) else str(number)


def _class_names(part: Any) -> list[str]:
    names = getattr(part, "classes", None) or getattr(part, "categories", None)
    if not isinstance(names, list | tuple):
        numbered = getattr(part, "class_to_idx", None)
        names = sorted(numbered, key=numbered.__getitem__) if isinstance(numbered, dict) else []
    said = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    return said if len(set(said)) == len(said) else [f"{number} {name}" for number, name in enumerate(said)]


@dataclass(frozen=True, eq=False)
class Item(Fetched):
    """One image of a data set that keeps arrays; its bytes are those of a PNG with the same pixels."""

    part: Any
    row: int

    def read_bytes(self) -> bytes:
        """The bytes of the image's file."""
        try:
            picture = self.part[self.row][0]
            array = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
        except Exception as error:
            raise ImageError("unreadable", f"torchvision cannot load it ({in_words(error)})") from error
        return encode(array)
