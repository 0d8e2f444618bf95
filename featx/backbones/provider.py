"""Where networks come from: the one protocol of torchvision's, timm's, featx's and your own.

A network of your own is a class with two things, saved as ``plankton.py`` beside its weights::

    from pathlib import Path
    import torch
    from featx import Preprocess, Provider

    class Plankton(Provider):
        preprocess = Preprocess(resize=64, crop=(64, 64), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)

        def build(self):
            return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2))

        def weights(self, progress=None):
            return Path(__file__).with_name("plankton.pth")

From here on it is a backbone like any other: ``featx extract photos --out s.featx --backbone plankton.py:Plankton``,
or ``load_backbone(Plankton())``. Layers are named as in its module tree, ``penultimate`` is its output (or what
``classifier`` is given), and maps are averaged over the image.

**Foreign code runs only when you name it.** A store or a model that was made with such a network keeps its name, the
sha256 of its weights and of the file with its code. What a store says is never imported: ``featx search``, ``fit``,
``predict`` and ``serve`` ask for ``--backbone plankton.py:Plankton`` again, and compare all three.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from featx._files import sha256_file
from featx.backbones.hub import Progress
from featx.errors import FeatxError, UsageError, did_you_mean
from featx.images import Preprocess

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

PREFIXES = ("torchvision", "timm")
"""What may stand before a colon in the name of a network that is not the user's own."""


class Provider:
    """One network, and all that featx has to know to run it frozen.

    Attributes
    ----------
    preprocess : how images are prepared for its usual weights.
    name : what stores call it; for a network of your own ``module:class``, if you leave it empty.
    classifier : name of the classification layer, which is taken off; None where the output is the embedding.
    """

    preprocess: Preprocess
    name: str = ""
    classifier: str | None = None

    def build(self) -> nn.Module:
        """The network, initialised from torch's generator, which featx has seeded. This one has to be written."""
        raise UsageError(
            "the network has no method build",
            where=type(self).__name__,
            expected="build(self), which returns a torch.nn.Module",
        )

    def weights(self, progress: Progress | None = None) -> Path | None:
        """The file of its default weights, fetched if need be; None if ``build`` brings them along.

        Raises
        ------
        WeightsError
            There are none, or they cannot be had.
        """
        return None

    def with_weights(self, file: Path, sha256: str, *, default: bool) -> Provider:
        """The network as these weights need it: with their own preprocessing, where they have one.

        ``default`` says that the file is what :meth:`weights` named.

        Raises
        ------
        WeightsError
            They are known to be another network's, or have changed since they were published.
        """
        return self

    def network(self, file: Path | None) -> nn.Module:
        """The network with the weights of ``file``, or as it is built."""
        body = self.build()
        if file is not None:
            from featx.backbones.checkpoint import load_checkpoint

            layer = self.classification_layer(body)
            load_checkpoint(
                body, file, network=self.name or type(self).__name__, classifiers=() if layer is None else (layer,)
            )
        return body

    def classification_layer(self, body: nn.Module) -> str | None:
        """The name of the layer to take off; None for none."""
        return self.classifier


class Own(Provider):
    """A provider of the user's: its answers are checked, and its failures become sentences that name the line."""

    def __init__(self, provider: Provider, name: str = "") -> None:
        kind = type(provider)
        self.provider = provider
        self.name = provider.name or name or f"{kind.__module__}:{kind.__qualname__}"
        self.classifier = provider.classifier
        preprocess = getattr(provider, "preprocess", None)
        if not isinstance(preprocess, Preprocess):
            raise UsageError(
                "the network does not say how its images are prepared",
                where=self.name,
                expected="an attribute preprocess, a featx.Preprocess",
                found=type(preprocess).__name__,
            )
        self.preprocess = preprocess

    @classmethod
    def of(cls, provider: Provider) -> Own:
        """A provider that somebody made, guarded."""
        return provider if isinstance(provider, cls) else cls(provider)

    @property
    def has_file(self) -> bool:
        """Whether its weights are a file, and not what ``build`` brings along."""
        return type(self.provider).weights is not Provider.weights

    @property
    def code_sha256(self) -> str:
        """Of the file with its code (not of what that imports); "" for code that has none, as in a notebook."""
        file = getattr(sys.modules.get(type(self.provider).__module__), "__file__", None)
        return sha256_file(Path(file)) if file else ""

    def weights(self, progress: Progress | None = None) -> Path | None:
        """The file of weights, fetched if need be; None where there is none."""
        return self._ask("name its weights", lambda: self.provider.weights(progress))

    def with_weights(self, file: Path, sha256: str, *, default: bool) -> Provider:
        """The same network with weights from a file; see :meth:`featx.backbones.provider.Provider.with_weights`."""
        return Own(self.provider.with_weights(file, sha256, default=default), self.name)

    def network(self, file: Path | None) -> nn.Module:
        """The torch module with the weights of ``file``, ready for inference."""
        body = self._ask("be built", lambda: self.provider.network(file))
        # Without importing torch for the sake of a check: every module has this method.
        if not callable(getattr(body, "named_modules", None)):
            raise UsageError(
                "build() does not return a network",
                where=self.name,
                expected="a torch.nn.Module",
                found=type(body).__name__,
            )
        return body

    def classification_layer(self, body: nn.Module) -> str | None:
        """Name of the layer that gives the classes, in ``body``; None where there is none."""
        return self.provider.classification_layer(body)

    def _ask(self, what: str, question: Callable[[], T]) -> T:
        try:
            return question()
        except FeatxError:
            raise
        except Exception as error:  # whatever foreign code raises
            raise _foreign_error(f"the network cannot {what}", self.name, error) from error


def is_own(name: str) -> bool:
    """Whether a backbone's name means code of the user's: ``FILE.py:CLASS`` or ``package.module:CLASS``."""
    return ":" in name and name.partition(":")[0] not in PREFIXES


def named(text: str) -> str | Own:
    """What ``--backbone`` is about: a name that featx knows, or the user's own network, imported."""
    return import_provider(text) if is_own(text) else text


def import_provider(text: str) -> Own:
    """Import the user's network that ``text`` names. Call it only with what the user typed: it runs that code.

    Parameters
    ----------
    text : ``FILE.py:NAME``, or ``package.module:NAME`` of an importable module. NAME is a subclass of
        :class:`Provider`, an instance, or a function without arguments that returns one.

    Raises
    ------
    UsageError
        There is no such file, module or name, it is no provider, or its code fails.
    """
    place, _, attribute = text.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place, attribute)
    if not hasattr(module, attribute):
        known = [name for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Provider)]
        raise UsageError(f"no {attribute!r} in it", where=place, hint=did_you_mean(attribute, known))
    found = getattr(module, attribute)
    if not isinstance(found, Provider) and callable(found):
        try:
            found = found()
        except Exception as error:  # whatever foreign code raises
            raise _foreign_error("the network cannot be made", text, error) from error
    if not isinstance(found, Provider):
        raise UsageError(
            "is not a network that featx can use",
            where=text,
            expected="a subclass of featx.Provider, or a function that returns one",
            found=type(found).__name__,
        )
    return Own(found, f"{module.__name__}:{attribute}")


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError("no such file", where=path, expected="FILE.py:CLASS")
    known = sys.modules.get(path.stem)
    if known is None:
        found = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
        if found is not None and found.origin is not None and not Path(found.origin).samefile(path):
            raise _name_taken(path, found.origin)
    elif getattr(known, "__file__", None) and Path(str(known.__file__)).samefile(path):
        return known
    else:
        raise _name_taken(path, getattr(known, "__file__", None))
    spec = importlib.util.spec_from_file_location(path.stem, path.absolute())
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever foreign code raises
        del sys.modules[path.stem]
        raise _foreign_error("cannot be imported", str(path), error) from error
    return module


def _name_taken(path: Path, found: str | None) -> UsageError:
    return UsageError(
        "another module has this name", where=path, found=found or "a part of Python", hint="Rename the file."
    )


def _import_module(name: str, attribute: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _foreign_error("cannot be imported", name, error) from error
        file = Path(*name.split(".")).with_suffix(".py")
        hint = f"Did you mean {file}:{attribute}?" if file.is_file() else "A file is named FILE.py:CLASS."
        raise UsageError(
            f"no module {error.name!r}",
            where=f"{name}:{attribute}",
            hint=did_you_mean(name, PREFIXES) or hint,
        ) from error
    except Exception as error:  # whatever foreign code raises
        raise _foreign_error("cannot be imported", name, error) from error


def _foreign_error(what: str, where: str, error: Exception) -> UsageError:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return UsageError(what, where=where, found=f"{type(error).__name__}: {error}{place}")
