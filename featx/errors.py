"""Every error that featx raises on purpose, and how it reads.

A user's mistake ends in one sentence that says what is wrong, where, what was expected, what was
found and what to do next. The command line prints that sentence and exits with ``exit_code``;
a traceback is for bugs of featx alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from unicodedata import category

MAY_BE_MISSING = ("torch", "torchvision", "timm", "huggingface_hub", "joblib", "matplotlib")
"""What of featx's packages may be missing: where it is installed without torch, or only to use models."""


def plural(n: int, noun: str) -> str:
    """A number of things in words: "1 image", "3 classes", "2,000 queries"."""
    if n == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "x", "sh")) or (noun.endswith("ch") and noun != "epoch"):
        return f"{n:,} {noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{n:,} {noun[:-1]}ies"
    return f"{n:,} {noun}s"


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names in words: "a, b and 3 more" of five, where at ``most`` two are to be named."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class FeatxError(Exception):
    """Base class: what went wrong, with up to four more slots that the message is made of.

    Parameters
    ----------
    what : the problem, as a clause ("no such folder").
    where : the file, field or argument it concerns.
    expected, found : what was wanted and what was there instead.
    hint : what to do next, as a sentence.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where = what, where
        self.expected, self.found, self.hint = expected, found, hint
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        sides = [f"expected {self.expected}"] if self.expected is not None else []
        sides += [f"found {self.found}"] if self.found is not None else []
        if sides:
            text += ": " + ", ".join(sides)
        if self.hint:
            text = text.rstrip(".") + ". " + self.hint
        return text if text.endswith((".", "?", "!")) else text + "."


class UsageError(FeatxError):
    """The command or the arguments cannot be carried out as given."""


def not_installed(package: str, extra: str, what: str = "") -> UsageError:
    """The error for a package that ``what`` needs, and that comes with one of featx's extras."""
    needed = f"{what} needs {package}, which" if what else package
    return UsageError(f"{needed} is not installed", hint=f"Install it: pip install 'featx[{extra}]'")


class SourceError(FeatxError):
    """The images or the manifest to read are not there or not usable."""


class ImageError(FeatxError):
    """One image that is refused; ``reason`` is the code that goes to the quarantine."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class WeightsError(FeatxError):
    """Weights that are missing, altered, or made for another network."""


class StoreError(FeatxError):
    """A store that is damaged, foreign, incomplete or in use."""


class StoreBusy(StoreError):
    """Another process is writing to the store; waiting helps."""


class BundleError(FeatxError):
    """A kept head that is damaged, altered, foreign, or does not give the values that it gave when it was made."""


class MismatchError(FeatxError):
    """Two things that must agree do not; the message names the field that differs."""


class TooManyBadImages(FeatxError):
    """More images were refused than ``--max-bad`` allows."""

    exit_code = 4


class Interrupted(FeatxError):
    """Stopped by the user or the system; what was published stays, and the run can be resumed."""

    exit_code = 130


def made_by_newer(kind: type[FeatxError], where: object, newest: int, found: object) -> FeatxError:
    """The error of this kind for a file whose format is younger than this featx, which reads up to ``newest``."""
    expected, hint = f"format_version up to {newest}", "Update featx: pip install -U featx"
    return kind("made by a newer featx", where=where, expected=expected, found=found, hint=hint)


def in_words(error: BaseException) -> str:
    """What an error of another library says, in one line and without the name of its class.

    "No space left on device" for an OSError; "no reason given" for an error without a word.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".")[:500] or "no reason given"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known names, or lists where to find them all."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else ""


_TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""What lets text run the other way, so that a name reads as another."""


def visible(text: str, *, keep: str = "") -> str:
    """Text with what a terminal would obey instead of showing it spelt as in a Python string: escapes, line ends.

    Characters of ``keep`` stay.
    """
    if text.isascii() and text.isprintable():
        return text
    spelt = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(
        char.encode("unicode_escape").decode()
        if char not in keep and (category(char) in spelt or _TURNING.match(char))
        else char
        for char in text
    )


def one_line(text: str) -> str:
    """:func:`visible` text from which the original can be told: backslashes are spelt, too."""
    return visible(text.replace("\\", "\\\\"))
