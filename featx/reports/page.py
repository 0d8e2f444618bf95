"""Pages of HTML from templates: one file each, with one style, no script, and nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from featx.evaluation import limits

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

Thumbnail: TypeAlias = Callable[[int], bytes | None]
"""A small JPEG or PNG of a row's image, or None where it is not at hand."""

Evidence: TypeAlias = Callable[[Sequence[tuple[int, str, str]]], Mapping[int, bytes]]
"""Of rows, each with two classes: a picture of what speaks for the one and for the other, where it can be had."""

FIRST_FACTS = ("command", "backbone", "seed", "seconds", "minutes allowed")
"""What people ask for first of how a page was made."""


def render_template(template: str, **context: Any) -> str:
    """A page.

    Parameters
    ----------
    template : a file of ``featx/reports/templates``.
    context : what the template names; all text is escaped.
    """
    return str(_environment().get_template(template).render(**context))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("featx.reports"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "breakable": breakable, "data_url": data_url, "limits": limits, "settings": settings, "share": share,
    }  # fmt: skip
    return environment


def hash_source(text: str) -> str:
    """What a Content-Security-Policy allows a script or a style by, whose element has this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def breakable(name: str) -> Markup:
    """A file's name as HTML, whose lines may end after what divides it: not within a word, where there is a choice."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([/_.-]+)(?=.)", r"\1<wbr>", str(escape(name))))


def data_url(picture: bytes) -> str:
    """A PNG or JPEG as the address of an image inside the page."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def share(value: float) -> str:
    """A share in %, without the sign."""
    return f"{100 * value:.1f}"


def settings(params: Mapping[str, Any]) -> str:
    """The parameters of a head."""
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else str(value) for name, value in params.items())


@dataclass(frozen=True)
class Facts:
    """How a page was made: what people ask for first, and the rest, as names and values."""

    first: Sequence[tuple[str, Any]]
    rest: Sequence[tuple[str, Any]]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Facts:
        """Sort facts into the two lists; what is no plain value is left out."""
        plain = [(name, value) for name, value in facts.items() if isinstance(value, str | int | float)]
        return cls(
            [fact for fact in plain if fact[0] in FIRST_FACTS], [fact for fact in plain if fact[0] not in FIRST_FACTS]
        )


@dataclass(frozen=True)
class Images:
    """Names and small pictures of images by row."""

    ids: Sequence[str] | Mapping[int, str] | None
    thumbnail: Thumbnail | None

    def name(self, row: int) -> str:
        """The image's id, or its place."""
        return str(self.ids[row]) if self.ids is not None else f"row {row}"

    def card(self, row: int, **about: Any) -> dict[str, Any]:
        """What a card of the page shows: the image's name, its picture if it is at hand, and ``about``."""
        found = self.thumbnail(row) if self.thumbnail else None
        return {"name": self.name(row), "picture": found, **about}
