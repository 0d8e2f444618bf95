"""Contact sheets: pictures in rows, for search, duplicates and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from featx._files import publish_text
from featx.advice import MISSED, LabelRanking
from featx.errors import StoreError, UsageError, plural
from featx.images import Origin, Thumbnails, finder, is_local
from featx.reports.page import render_template
from featx.retrieval import DuplicateGroup, Match, label_of
from featx.store import FeatureSet, is_packed, read_manifest

Found: TypeAlias = list[tuple[str, Path | int, list[Match]]]
"""For each query its name, its file or its row in the store, and what was found."""

Finder: TypeAlias = Callable[[str], Origin]
"""What gives the image behind an id; see :func:`featx.images.source.finder`."""

MAX_GROUPS = 200
"""More groups of duplicates make a sheet that no browser likes."""

_WORKERS = 2


@dataclass(frozen=True)
class Card:
    """One picture with its name.

    Parameters
    ----------
    name : shown below it.
    picture : the file (or another origin of an image), or None where there is none.
    text : a line of plain text below the name.
    mark : draw a frame around it (the query).
    digest : the sha256 that the file must have; a file that has changed since is not shown. None takes any.
    """

    name: str
    picture: Origin | None
    text: str = ""
    mark: bool = False
    digest: bytes | None = None


@dataclass(frozen=True)
class Section:
    """A heading, a warning (or ""), and cards in a row."""

    title: str
    cards: Sequence[Card]
    warning: str = ""


def image_finder(store: Path, source: str | None) -> Finder:
    """What gives the image behind an id of a store.

    Parameters
    ----------
    source : as of :meth:`featx.images.source.ImageSet.from_source`; by default what the store was made of.

    Raises
    ------
    UsageError
        It is not known or not there.
    """
    hint = "Name the folder (or the list) of the images with --source."
    if source is None:
        if is_packed(store):
            raise UsageError("a packed store does not know where its images are", where=store, hint=hint)
        source = read_manifest(store).source
    if is_local(source) and not Path(source).exists():
        raise UsageError("the images of the store, which are to be shown, are not there", where=source, hint=hint)
    return finder(source)


def write_sheet(path: Path, *, title: str, facts: Iterable[str], sections: Sequence[Section]) -> int:
    """Write a sheet, and return how many of its pictures could not be shown; each says why in its place.

    Parameters
    ----------
    path : the HTML file; replaced if it is there.
    facts : sentences below the title.

    Raises
    ------
    StoreError
        It cannot be written.
    """
    cards = list(dict.fromkeys(card for section in sections for card in section.cards))
    pictures: dict[Card, bytes | str] = dict.fromkeys(cards, "no picture")
    shown = [(card, card.picture) for card in cards if card.picture is not None]
    with Thumbnails(workers=min(_WORKERS, max(len(shown), 1))) as thumbnails:
        made = thumbnails.make([(picture, card.digest) for card, picture in shown])
    pictures |= {card: picture for (card, _), picture in zip(shown, made, strict=True)}
    page = render_template("sheet.html", title=title, facts=facts, sections=sections, pictures=pictures)
    if path.is_dir():
        raise StoreError("a folder is in the way", where=path)
    publish_text(path, page)
    return sum(not isinstance(found, bytes) for found in pictures.values())


def _card(features: FeatureSet, find: Finder, row: int, text: str, *, mark: bool = False) -> Card:
    """The card of an image of a store."""
    name = str(features.ids[row])
    return Card(name, find(name), text, mark, features.digests[row].tobytes())


def search_sheet(path: Path, store: Path, find: Finder, features: FeatureSet, found: Found) -> int:
    """The sheet of ``featx search``: each query with its matches. Arguments and result are those of the above."""
    sections = []
    for name, origin, matches in found:
        if isinstance(origin, int):
            query = _card(features, find, origin, "the query", mark=True)
        else:
            query = Card(name, origin, "the query", True)
        cards = [
            _card(features, find, match.row, f"{match.label or 'unlabelled'}, {match.score:.3f}") for match in matches
        ]
        sections.append(Section(name, [query, *cards]))
    facts = [
        f"{plural(len(features), 'image')} in {store.name}. The number below a match is its similarity (cosine) to the "
        "query: 1 is the same image, 0 is unrelated."
    ]
    return write_sheet(path, title=f"What looks alike in {store.name}", facts=facts, sections=sections)


def duplicate_sheet(
    path: Path, store: Path, find: Finder, features: FeatureSet, groups: Sequence[DuplicateGroup]
) -> int:
    """The sheet of ``featx duplicates``: the first ``MAX_GROUPS`` groups."""
    sections = []
    for number, group in enumerate(groups[:MAX_GROUPS], 1):
        cards = []
        for place, row in enumerate(group.rows):
            said = [label_of(features, row) or "unlabelled", str(features.splits[row]), group.likeness(place)]
            cards.append(_card(features, find, row, ", ".join(filter(None, said))))
        warnings = ["On both sides of a split."] if group.across_splits else []
        warnings += ["Labels differ."] if group.conflicting else []
        sections.append(Section(group.title(number), cards, " ".join(warnings)))
    facts = [
        f"{plural(len(groups), 'group')} among {plural(len(features), 'image')}; each image is compared with the first "
        "of its group.",
        "What to do: look at each group. Of copies keep one and delete the others; photos that only look alike may all "
        "stay. Where labels differ, at least one is wrong: "
        "correct it. A group on both sides of a split makes a test look better than it is: keep it on one side. Then "
        "run featx extract again; nothing is computed twice.",
    ]
    if len(groups) > MAX_GROUPS:
        facts.append(f"The first {MAX_GROUPS} groups are shown; featx duplicates --json lists all.")
    return write_sheet(path, title=f"Duplicates in {store.name}", facts=facts, sections=sections)


def batch_sheet(path: Path, batch: str, facts: Sequence[str], photos: Sequence[tuple[Path, str, bytes]]) -> int:
    """The sheet of a batch of corrections that is held: each photo's file, what people say of it, and its sha256."""
    cards = [Card(file.name[:12], file, said, digest=digest) for file, said, digest in photos]
    return write_sheet(path, title=f"Corrections to look at: {batch}", facts=facts, sections=[Section(batch, cards)])


def label_sheet(path: Path, store: Path, find: Finder, features: FeatureSet, ranking: LabelRanking) -> int:
    """The sheet of ``featx labels``: the first ``MAX_GROUPS`` images whose labels are doubtful, in one section."""
    names = ranking.class_names
    doubtful = np.flatnonzero(ranking.doubtful).tolist()
    cards = [
        _card(
            features, find, ranking.rows[i],
            f"{names[ranking.labels[i]]} \u2192 {names[ranking.suggested[i]]} ({100 * ranking.confidence[i]:.0f} %)",
        )
        for i in doubtful[:MAX_GROUPS]
    ]  # fmt: skip
    facts = [
        f"{len(doubtful)} of {plural(len(ranking), 'label')} may be wrong. The arrow points from the present label to "
        f"the one suggested by models that have not seen the image. {MISSED}",
        "Move a photo to the folder of its class, or correct your list, and run featx extract again.",
    ]
    if len(doubtful) > MAX_GROUPS:
        facts.append(f"The first {MAX_GROUPS} are shown; featx labels --csv FILE lists all.")
    return write_sheet(
        path,
        title=f"Labels to check in {store.name}",
        facts=facts,
        sections=[Section("The least likely labels first", cards)],
    )
