"""Which images exist, what they are called, and how they are labelled.

A source is named by one text:

- a folder of class folders (``train/ val/ test/`` above them are splits), or of images without labels;
- a CSV or JSONL manifest with the columns ``path, label[, split][, group]`` (:mod:`featx.images.listing`);
- a tar, or a folder of tars: WebDataset shards, or class folders (:mod:`featx.images.tar`);
- a Parquet file, a folder of them, or what ``datasets`` saves (:mod:`featx.images.table`);
- ``torchvision:NAME:ROOT``, a data set of torchvision that is on this machine (:mod:`featx.images.torchvision`);
- ``s3://bucket/folder`` or another address that fsspec knows (:mod:`featx.images.remote`).

Nothing is decoded here, nothing is downloaded, and nothing that is fetched is kept.
"""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from featx.errors import SourceError, did_you_mean, plural
from featx.images.grouping import Grouping, column_of
from featx.images.origin import IMAGE_SUFFIXES, ImageRef, Origin, Unreadable, file_ref, labels_from_folders, no_images

Progress = Callable[[int], None]

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)
_TORCHVISION = "torchvision:"
_TABLES = (".parquet", ".arrow")
_DOUBTFUL = frozenset(
    {"inbox", "misc", "miscellaneous", "temp", "tmp", "todo", "to do", "unassigned", "uncategorised", "uncategorized"}
    | {"unclassified", "undefined", "unidentified", "unknown", "unlabeled", "unlabelled", "unsorted", "untagged"}
)
_NONE = Unreadable("the source has no such image")
_KINDS = "a folder of class folders, or a .csv, .jsonl, .tar or .parquet file"


@dataclass(frozen=True)
class ImageSet:
    """The images of a source, sorted by id.

    Parameters
    ----------
    refs : the images.
    root : the folder, file or address that they come from.
    ignored : names of the files that are no images by their names (``notes.txt``) and were skipped.
    notes : what people should know of how the source was read, as clauses.
    grouping : the rule by which images belong together; None where nothing was said.
    """

    refs: tuple[ImageRef, ...]
    root: Path | str
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    grouping: Grouping | None = None

    def __len__(self) -> int:
        return len(self.refs)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, sorted."""
        return tuple(sorted({ref.label for ref in self.refs if ref.label is not None}))

    @property
    def source(self) -> str:
        """What :meth:`from_source` makes the same set of, from any folder."""
        return str(self.root.absolute()) if isinstance(self.root, Path) else self.root

    def without_labels(self, names: Iterable[str]) -> ImageSet:
        """The same images, of which those of the classes ``names`` have no label.

        Raises
        ------
        SourceError
            There is no such class, or a single one is left.
        """
        nameless = set(names)
        if not nameless:
            return self
        for name in sorted(nameless - set(self.class_names)):
            raise SourceError(
                "no class of this name", where=self.root, expected=", ".join(self.class_names) or "any class",
                found=name, hint=did_you_mean(name, self.class_names) or None,
            )  # fmt: skip
        refs = tuple(replace(ref, label=None) if ref.label in nameless else ref for ref in self.refs)
        images = replace(self, refs=refs)
        if len(images.class_names) == 1:
            raise SourceError(
                "only one class is left", where=self.root, expected="at least two classes, or none",
                found=images.class_names[0],
            )  # fmt: skip
        return images

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the further columns that a list has, or of the one of a table that its images are grouped by."""
        return tuple(dict.fromkeys(name for ref in self.refs for name, _ in ref.metadata))

    def grouped(self, rule: str, name: str | None = None, *, some: bool = True) -> ImageSet:
        """The same images, of which those that belong together by a rule are one group.

        Parameters
        ----------
        rule : of :mod:`featx.images.grouping`: ``folder:N``, ``exif-day``, ``exif-burst:SECONDS``, ``regex:(...)``,
            ``column:NAME`` or ``none``.
        name : what one group is, such as "camera"; by default as the rule says.
        some : whether it is an error that no image has a group by the rule.

        Raises
        ------
        UsageError
            The rule cannot be read, or no image has a group by it.
        """
        images, grouping = self, Grouping.parse(rule, name)
        if grouping.kind == "column":
            if grouping.value.lower() == "group" and any(ref.group for ref in self.refs):
                return replace(self, grouping=grouping)
            images = self._with_column(grouping.value)
            column = column_of(grouping.value, dict.fromkeys(images.columns))
            groups = [dict(ref.metadata).get(column, "") for ref in images.refs]
        elif grouping.kind == "none" or grouping.dated:  # dates are in the files, which the extraction reads
            groups = [""] * len(self.refs)
        else:
            groups = grouping.of_paths([ref.id for ref in self.refs], some=some)
        refs = tuple(replace(ref, group=group) for ref, group in zip(images.refs, groups, strict=True))
        return replace(self, refs=refs, grouping=grouping)

    def has_column(self, name: str) -> bool:
        """Whether images can be grouped by a column of this name, without regard to case."""
        columns = self.columns
        if self._in_tables:
            from featx.images.table import table_columns

            columns = (*columns, *table_columns(self.refs))
        return name.lower() in map(str.lower, columns)

    def _with_column(self, name: str) -> ImageSet:
        """The same images with a column of their tables as metadata; as they are, where they are in none."""
        if not self._in_tables or name.lower() in map(str.lower, self.columns):
            return self
        from featx.images.table import with_column

        return replace(self, refs=tuple(with_column(self.refs, name)))

    @property
    def _in_tables(self) -> bool:
        from featx.images.table import Row

        return any(isinstance(ref.path, Row) for ref in self.refs[:1])

    @property
    def doubtful_classes(self) -> tuple[str, ...]:
        """Classes whose names say that nobody has labelled what is in them, such as ``unsorted`` and ``_new``."""
        return tuple(name for name in self.class_names if name.startswith("_") or name.strip().lower() in _DOUBTFUL)

    @classmethod
    def from_source(cls, source: str | Path, *, progress: Progress | None = None) -> ImageSet:
        """The images of whatever ``source`` is: a folder, a file, a data set's name or an address.

        Parameters
        ----------
        progress : called as ``progress(images so far)`` where listing can take long.

        Raises
        ------
        SourceError
            There is nothing, or nothing that is understood; the text says what was expected.
        UsageError
            It needs a package that is not installed.
        """
        text = os.fspath(source)
        if text.startswith(_TORCHVISION):
            name, _, root = text.removeprefix(_TORCHVISION).partition(":")
            return cls.from_torchvision(name, root)
        if not is_local(text):
            return cls.from_address(text)
        path = Path(source)
        if path.is_dir():
            return cls._from_folder_of_anything(path, progress)
        if not path.is_file():
            raise SourceError("no such folder or file", where=path, expected=_KINDS)
        if path.suffix.lower() == ".tar":
            return cls.from_tars(path, progress=progress)
        if path.suffix.lower() in _TABLES:
            return cls.from_tables(path)
        if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")):
            raise SourceError(
                "a compressed archive, in which no image can be found without unpacking all before it",
                where=path,
                hint="Unpack it into a folder, or make a plain .tar of it.",
            )
        return cls.from_manifest(path)

    @classmethod
    def _from_folder_of_anything(cls, folder: Path, progress: Progress | None) -> ImageSet:
        suffixes: Counter[str] = Counter()
        for relative, _ in walk_folder(folder):
            suffix = os.path.splitext(relative)[1].lower()  # noqa: PTH122 - pathlib is 5 times slower here
            if suffix in IMAGE_SUFFIXES:
                return cls.from_folder(folder)
            suffixes[suffix] += 1
        if any(suffixes[suffix] for suffix in _TABLES):
            return cls.from_tables(folder)
        return cls.from_tars(folder, progress=progress) if suffixes[".tar"] else cls.from_folder(folder)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageSet:
        """Images of a folder: the name of the first folder below it (or below its split) is the label.

        Raises
        ------
        SourceError
            No such folder, no images in it, or a single class folder.
        """
        root = Path(folder)
        if not root.is_dir():
            raise SourceError("no such folder", where=root)
        found: list[tuple[str, os.stat_result | None]] = []
        ignored: list[str] = []
        closed: list[str] = []
        for relative, stat in walk_folder(root):
            if relative.endswith("/"):
                closed.append(relative)
            elif stat is None or os.path.splitext(relative)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122 - pathlib is 5 times slower here
                found.append((relative, stat))
            else:
                ignored.append(relative)
        named = labels_from_folders([name for name, _ in found])
        if closed and (not found or len({label for label, _ in named} - {None}) == 1):
            raise _closed(root / closed[0])  # what is left is not what the user means
        if not found:
            raise no_images("in this folder", root, ignored)
        refs = [
            file_ref(relative, root / relative, label, split, stat)
            for (relative, stat), (label, split) in zip(found, named, strict=True)
        ]
        # One closed folder must not stop the rest: it is refused by name, as a bad image is.
        refs += [file_ref(name, Unreadable("this folder cannot be read"), None, "", None) for name in closed]
        images = cls(tuple(sorted(refs, key=lambda ref: ref.id)), root, tuple(sorted(ignored)))
        if len(images.class_names) == 1:
            raise SourceError(
                "only one class folder",
                where=root,
                expected="at least two folders, one per class",
                found=images.class_names[0],
                hint=_one_level_up(root, images),
            )
        return images

    @classmethod
    def from_manifest(cls, manifest: str | Path) -> ImageSet:
        """Images named by a CSV file with a header, or by a JSONL file: ``path``, ``label`` and perhaps ``split``.

        Paths are relative to the manifest's folder. An empty label means unlabelled. See :mod:`featx.images.listing`.
        """
        from featx.images.listing import SUFFIXES, list_refs

        path = Path(manifest)
        if path.suffix.lower() not in SUFFIXES:
            photo = path.suffix.lower() in IMAGE_SUFFIXES
            raise SourceError(
                "not a list of images",
                where=path,
                expected=".csv, .jsonl, .tar or .parquet",
                found="one photo" if photo else path.suffix or "no suffix",
                hint="Give the folder that holds it" if photo else None,
            )
        refs, notes = list_refs(path)
        images = cls._of(refs, path, "this manifest", notes=notes)
        return replace(images, grouping=Grouping.parse("column:group")) if any(ref.group for ref in refs) else images

    @classmethod
    def from_tars(cls, path: str | Path, *, progress: Progress | None = None) -> ImageSet:
        """Images inside a tar, or inside all tars of a folder; see :mod:`featx.images.tar`.

        Ids are ``archive.tar/name of the member``.
        """
        from featx.images.tar import tar_refs

        files = _files_of(Path(path), (".tar",))
        refs, ignored = tar_refs(files, progress)
        return cls._of(refs, Path(path), "these archives", ignored)

    @classmethod
    def from_tables(cls, path: str | Path) -> ImageSet:
        """Images in the rows of Parquet or Arrow files, as Hugging Face writes them; see :mod:`featx.images.table`.

        Ids are ``file.parquet/number of the row``.
        """
        from featx.images.table import table_refs

        return cls._of(table_refs(_files_of(Path(path), _TABLES)), Path(path), "these tables")

    @classmethod
    def from_torchvision(cls, name: str, root: str | Path) -> ImageSet:
        """All splits of a data set of torchvision whose files are below ``root``; nothing is downloaded."""
        from featx.images.torchvision import torchvision_refs

        source = f"{_TORCHVISION}{name}:{Path(root).absolute()}"
        return cls._of(torchvision_refs(name, Path(root)), source, "this data set")

    @classmethod
    def from_address(cls, url: str) -> ImageSet:
        """Class folders, or images without labels, below an address that fsspec knows, such as ``s3://bucket/photos``.

        Credentials and the like come from where fsspec's back ends look for them (environment, configuration files).
        Images are fetched when they are embedded, and are not kept.
        """
        from featx.images.remote import remote_refs

        url = _address(url)
        refs, ignored = remote_refs(url)
        return cls._of(refs, url, "this address", ignored)

    @classmethod
    def _of(
        cls,
        refs: Iterable[ImageRef],
        root: Path | str,
        what: str,
        ignored: Iterable[str] = (),
        notes: tuple[str, ...] = (),
    ) -> ImageSet:
        images = cls(tuple(sorted(refs, key=lambda ref: ref.id)), root, tuple(sorted(ignored)), notes)
        if not images.refs:
            raise SourceError(f"no images in {what}", where=root)
        if len(images.class_names) == 1:
            raise SourceError(
                f"only one class in {what}",
                where=root,
                expected="at least two labels, or none",
                found=images.class_names[0],
            )
        return images


def _one_level_up(root: Path, images: ImageSet) -> str:
    beside = sum(ref.label is None for ref in images.refs)
    if beside:
        lie = "lies" if beside == 1 else "lie"
        return f"{plural(beside, 'image')} {lie} beside it: if {root.name} is a class itself, give the folder above it."
    return f"For images without labels, give the folder that holds them: {root / images.class_names[0]}"


def count_names(names: Iterable[str | None]) -> dict[str, int]:
    """How often each name occurs, sorted by name; None and "" are left out."""
    return dict(sorted(Counter(name for name in names if name).items()))


def is_local(source: str) -> bool:
    """Whether a source is a folder or a file, and not an address or the name of a data set."""
    return not source.startswith(_TORCHVISION) and (not _ADDRESS.match(source) or Path(source).exists())


def _address(text: str) -> str:
    """An address as fsspec wants it: with both slashes (pathlib leaves one), its protocol in small letters."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise SourceError("not an address", where=text, expected="one such as s3://bucket/photos")
    protocol, slashes, rest = found.groups()
    return f"{protocol.lower()}:{slashes if len(slashes) > 1 else '//'}{rest}"


def finder(source: str | Path) -> Callable[[str], Origin]:
    """What gives the origin of an image of ``source`` by its id, without looking at all the others where possible.

    Whether the image is still there, and still the one that was embedded, is for the caller to see.
    """
    text = os.fspath(source)
    if text.startswith(_TORCHVISION):
        known = {ref.id: ref.path for ref in ImageSet.from_source(text).refs}
        return lambda name: known.get(name, _NONE)
    if not is_local(text):
        from featx.images.remote import remote_origin

        return lambda name: remote_origin(_address(text), name)
    root = Path(text)
    root = root.parent if root.is_file() else root
    return lambda name: _inside(root, name)


def _inside(root: Path, name: str) -> Origin:
    if not any(suffix in name for suffix in (".tar/", *(f"{suffix}/" for suffix in _TABLES))) or (root / name).exists():
        return root / name
    for place in re.finditer("/", name):
        archive, member = root / name[: place.start()], name[place.end() :]
        if archive.is_file() and archive.suffix.lower() == ".tar":
            from featx.images.tar import member_origin

            return member_origin(archive, member)
        if archive.is_file() and archive.suffix.lower() in _TABLES:
            from featx.images.table import row_origin

            return row_origin(archive, member)
    return root / name


def _files_of(path: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Names and paths of the files with one of the suffixes at or below ``path``."""
    if path.is_file():
        return [(path.name, path)]
    if not path.is_dir():
        raise SourceError("no such folder or file", where=path, expected=_KINDS)
    # What datasets caches beside what it saves is no part of it.
    every = [name for name, _ in walk_folder(path)]
    for name in every:
        if name.endswith("/"):
            raise _closed(path / name)
    names = sorted(name for name in every if name.lower().endswith(suffixes) and "cache-" not in name)
    if not names:
        raise SourceError(f"no {' or '.join(suffixes)} files in this folder", where=path)
    return [(name, path / name) for name in names]


def walk_folder(root: Path) -> Iterator[tuple[str, os.stat_result | None]]:
    """Relative paths and stats of all files below a folder, hidden ones left out, links followed once.

    A file or folder whose path is longer than the system takes, or that may not be looked at, has None: nothing in it
    can be opened. The name of a folder that cannot be listed ends with a slash.
    """
    seen: set[tuple[int, int]] = set()
    pending = [("", root.stat())]
    while pending:
        prefix, stat = pending.pop()
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    if entry.name.startswith((".", "__MACOSX")):
                        continue
                    relative = prefix + entry.name
                    try:
                        stat = entry.stat()
                        if entry.is_dir():
                            pending.append((relative + "/", stat))
                            continue
                    except OSError as error:
                        if error.errno == errno.ENAMETOOLONG:
                            yield relative, None
                            continue
                        if not entry.is_symlink():
                            yield relative + ("/" if entry.is_dir(follow_symlinks=False) else ""), None
                            continue
                        # It leads nowhere, or in a circle: the extraction quarantines it, with its id.
                        stat = entry.stat(follow_symlinks=False)
                    yield relative, stat
        except OSError as error:
            if not prefix:
                raise _closed(root) from error
            yield prefix, None


def _closed(folder: Path) -> SourceError:
    return SourceError("no permission to read this folder", where=folder)
