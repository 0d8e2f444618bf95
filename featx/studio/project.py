"""The folder of photos and, beside it, the folder that the studio keeps its files in.

::

    bees/                 the photos, which are never written to
    bees.studio/
      labels.csv          path, label, mark, by, when: what featx extract takes as a list
      journal.jsonl       every action (featx.studio.journal)
      photos.featx/       the store of embeddings
      added/              photos that were dropped on the page
      thumbnails/         small pictures, made once

A photo's id is its path relative to ``bees.studio``, as in ``labels.csv`` and in the store.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from featx._files import make_folder, publish_bytes, remove_leftovers, writer_lock
from featx.errors import SourceError, StoreBusy, UsageError
from featx.images import (
    IMAGE_SUFFIXES,
    ImageRef,
    ImageSet,
    Unreadable,
    file_ref,
    labels_from_folders,
    list_refs,
    walk_folder,
)
from featx.store import StoreWriter, stored_backbones
from featx.studio.address import LastAddress
from featx.studio.journal import MARKS, NOTHING, Journal

LISTS = (".csv", ".jsonl")

BURSTS = "exif-burst:5"
"""What belongs together unless a list has a column ``group``: photos taken within five seconds of the one before."""

_WEIRD = re.compile(r"[^\w.() -]+")


@dataclass(frozen=True)
class Photo:
    """One photo.

    Attributes
    ----------
    ref : its file; ``ref.id`` is relative to the project's folder.
    name : what it is called on the page: its path relative to the folder of photos.
    folder_label : the name of the class folder that it lies in, or its label in a list; None where there is none.
    split : "train", "val" or "test", by its folder or a list; "" where there is none.
    """

    ref: ImageRef
    name: str
    folder_label: str | None = None
    split: str = ""


class Project:
    """Photos and what is said of them; opened by one process at a time.

    Parameters
    ----------
    source : a folder of photos, or a list of them (``.csv``, ``.jsonl``).
    folder : where the studio's own files are; by default beside ``source``.
    root : photos are read from below ``source`` and this folder only, whatever links there are.
    empty : whether there may be no photos yet.

    Raises
    ------
    SourceError
        There is no such folder, or nothing in it.
    StoreBusy
        Another process has this project open.
    """

    def __init__(
        self, source: Path, folder: Path | None = None, *, root: Path | None = None, empty: bool = False
    ) -> None:
        self.check(source)
        self.source = source.absolute()
        inside = self.source if self.source.is_dir() else self.source.parent
        self._roots = [each.resolve() for each in (inside, *([root] if root is not None else []))]
        self.name = self.source.stem if self.source.is_file() else self.source.name
        self.folder = (folder or self.source.with_name(f"{self.name}.studio")).absolute()
        if self.folder.is_relative_to(self.source):
            raise UsageError(
                "the project would lie inside the folder of photos", where=self.folder,
                hint="Choose another folder with --project.",
            )  # fmt: skip
        self.photos = self._list()
        if not self.photos and not empty and not (self.added.is_dir() and any(self.added.iterdir())):
            raise SourceError(
                "no photos in this folder", where=source, expected="files such as .jpg or .png, at any depth",
            )  # fmt: skip
        for part in (self.added, self.thumbnails):
            make_folder(part)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(writer_lock(self.folder / ".lock"))
            except StoreBusy as error:
                url = LastAddress.of(self.folder).url
                raise StoreBusy(
                    "another featx studio has this project open", where=self.folder, found=error.found,
                    hint=f"Use its window{url and f' ({url})'}, or end it first.",
                ) from error  # fmt: skip
            for part in (self.folder, self.added):
                remove_leftovers(part)
            self.photos += self._added()
            self.journal = Journal(self.folder / "journal.jsonl", _user())
            stack.callback(self.journal.close)
            self.rows = {photo.ref.id: row for row, photo in enumerate(self.photos)}
            self.take_edits()
            self._stack = stack.pop_all()

    @staticmethod
    def check(source: Path) -> None:
        """SourceError where there is no folder and no list of photos."""
        if not (source.is_dir() or (source.is_file() and source.suffix.lower() in LISTS)):
            raise SourceError(
                "no such folder or list of photos", where=source, expected="a folder, or a .csv or .jsonl file"
            )

    def close(self) -> None:
        """Let others open it."""
        self._stack.close()

    @property
    def store(self) -> Path:
        """The store of embeddings."""
        return self.folder / "photos.featx"

    @property
    def labels(self) -> Path:
        """The list of labels."""
        return self.folder / "labels.csv"

    @property
    def added(self) -> Path:
        """Where photos are that came through the page."""
        return self.folder / "added"

    @property
    def thumbnails(self) -> Path:
        """Where small pictures are."""
        return self.folder / "thumbnails"

    @property
    def folder_labels(self) -> dict[str, str]:
        """The names of the class folders, or a list's labels, of the photos that have one, by id."""
        return {photo.ref.id: photo.folder_label for photo in self.photos if photo.folder_label is not None}

    def images(self) -> ImageSet:
        """The photos with their labels and groups, as an extraction takes them."""
        journal = self.journal
        refs = []
        for photo in self.photos:
            code = journal.code(photo.ref.id)
            refs.append(replace(photo.ref, label=journal.classes[code] if code >= 0 else None))
        rule = "column:group" if any(ref.group for ref in refs) else BURSTS
        return ImageSet(tuple(sorted(refs, key=lambda ref: ref.id)), self.labels).grouped(rule)

    def write_labels(self) -> None:
        """Write ``labels.csv``, and into the store what photos are called, so that every command finds it there."""
        publish_bytes(self.labels, self.journal.csv([photo.ref.id for photo in self.photos]))
        if (self.store / "index.h5").exists():
            with StoreWriter(self.store, *stored_backbones(self.store).values()) as writer:
                writer.relabel({ref.id: ref.label for ref in self.images().refs})

    def take_edits(self) -> None:
        """Take over what was changed in ``labels.csv`` by another program, as an action that can be taken back.

        It is newer than the journal then: the studio writes it after each action, and a crash leaves an older one.
        """
        journal = self.folder / "journal.jsonl"
        if not self.labels.exists() or self.labels.stat().st_mtime_ns < journal.stat().st_mtime_ns:
            return
        marks = {mark: code for code, mark in MARKS.items()}
        labels: dict[str, str | int] = {}
        for ref in list_refs(self.labels)[0]:
            code: str | int = ref.label or marks.get(dict(ref.metadata).get("mark", ""), NOTHING)
            known = self.journal.code(ref.id)
            if ref.id in self.rows and code not in (known, self.journal.classes[known] if known >= 0 else known):
                labels[ref.id] = code
        if labels:
            self.journal.label_each(labels, how="labels.csv", by="labels.csv")

    def add(self, name: str, data: bytes) -> int:
        """Keep a photo that came through the page; its row.

        Raises
        ------
        UsageError
            It is another kind of file, by its name.
        """
        given = Path(name.replace("\\", "/"))
        suffix = given.suffix.lower() or ".jpg"
        if suffix not in IMAGE_SUFFIXES:
            raise UsageError("not a photo, by its name", expected="a file such as .jpg or .png", found=given.suffix)
        stem = _WEIRD.sub("-", given.stem).strip(" .-")[:80] or "photo"
        path = self.added / f"{stem}-{hashlib.sha256(data).hexdigest()[:8]}{suffix}"
        known = self.rows.get(self._id(path))
        if known is not None:
            return known
        publish_bytes(path, data)
        photo = self._photo(path, f"added/{path.name}")
        self.photos.append(photo)
        self.rows[photo.ref.id] = len(self.photos) - 1
        return len(self.photos) - 1

    def _list(self) -> list[Photo]:
        if self.source.is_file():
            refs, _ = list_refs(self.source)
            found = []
            for ref in sorted(refs, key=lambda ref: ref.id):
                photo = self._photo(self.source.parent / ref.id, ref.id)
                own = replace(photo.ref, group=ref.group)
                found.append(replace(photo, ref=own, folder_label=ref.label, split=ref.split))
            return found
        every = sorted(relative for relative, _ in walk_folder(self.source))
        names = [each for each in every if _is_image(each) and not each.endswith("/")]
        try:
            labels = labels_from_folders(names)
        except SourceError:
            labels = [(None, "")] * len(names)
        return [
            replace(self._photo(self.source / name, name), folder_label=label, split=split)
            for name, (label, split) in zip(names, labels, strict=True)
        ] + [self._closed(each) for each in every if each.endswith("/")]

    def _closed(self, name: str) -> Photo:
        """A folder that may not be read, refused like a photo that cannot be: nobody knows what is in it."""
        refused = Unreadable("this folder cannot be read")
        return Photo(file_ref(f"{self._id(self.source / name)}/", refused, None, "", None), name)

    def _added(self) -> list[Photo]:
        names = sorted(entry.name for entry in self.added.iterdir() if not entry.name.startswith("."))
        return [self._photo(self.added / name, f"added/{name}") for name in names]

    def _photo(self, path: Path, name: str) -> Photo:
        id = self._id(path)
        try:
            stat, real = path.stat(), path.resolve()
        except (OSError, UnicodeEncodeError):  # the extraction says why it is refused
            return Photo(file_ref(id, path, None, "", None), name)
        if not any(real.is_relative_to(each) for each in (*self._roots, self.folder.resolve())):
            return Photo(file_ref(id, Unreadable("a link that leads out of the folder"), None, "", None), name)
        return Photo(file_ref(id, path, None, "", stat), name)

    def _id(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.folder)).as_posix()


def make_source(path: Path) -> None:
    """Make a folder for photos that come through the page.

    Raises
    ------
    UsageError
        There is one already, with something in it.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError("there is something of this name already", where=path)
    make_folder(path)


def folders(path: Path, root: Path) -> dict[str, object]:
    """What of a folder the page shows, to choose one: its folders, which were begun before, and its photos.

    Raises
    ------
    SourceError
        It cannot be listed.
    """
    inside: list[dict[str, object]] = []
    images = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir() and not entry.name.endswith((".studio", ".featx")):
                    begun = Path(f"{entry.path}.studio", "journal.jsonl").exists()
                    images_in = _count(Path(entry.path))
                    inside.append({"name": entry.name, "path": entry.path, "images": images_in, "begun": begun})
                elif _is_image(entry.name):
                    images += 1
    except OSError as error:
        raise SourceError(f"cannot be listed ({error.strerror})", where=path) from error
    inside.sort(key=lambda each: str(each["name"]).lower())
    parent = str(path.parent) if path != root else None
    return {"path": str(path), "parent": parent, "folders": inside, "images": images, "root": str(root)}


def _count(folder: Path) -> int | None:
    """Photos right in a folder; None where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sum(_is_image(entry.name) for entry in entries)
    except OSError:
        return None


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def order(photos: Iterable[Photo]) -> list[int]:
    """Rows in an order that is as good as random, the same each time: by the hashes of the ids.

    The photos from its beginning that are labelled without a gap are a random sample of all.
    """
    keys = [hashlib.sha256(photo.ref.id.encode("utf-8", "surrogatepass")).digest() for photo in photos]
    return sorted(range(len(keys)), key=keys.__getitem__)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        return "user"
