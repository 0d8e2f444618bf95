"""Images inside tars: what they are called and labelled, and which archives are refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Featx, TinyEngine, class_folders, picture, tiny_backbone
from imagekit import encoded, pixels
from PIL import Image

from featx.errors import SourceError
from featx.extraction.run import extract_features
from featx.images.origin import MAX_BYTES, Part
from featx.images.pool import DecoderPool
from featx.images.source import ImageSet, finder
from featx.store.reader import read_features


def jpeg(seed: int) -> bytes:
    return encoded(picture(seed, (60, 40)), "JPEG")


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar as the WebDataset writers make it."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path, count: int = 2, each: int = 4) -> dict[str, bytes]:
    """Shards of ``key.jpg`` + ``key.cls``; returns the bytes of each image by id."""
    folder.mkdir(exist_ok=True)
    found: dict[str, bytes] = {}
    for shard in range(count):
        members = []
        for number in range(each):
            key, data = f"{shard:02d}{number:04d}", jpeg(shard * each + number)
            members += [(f"{key}.jpg", data), (f"{key}.cls", str(number % 2).encode()), (f"{key}.txt", b"a caption")]
            found[f"set-{shard:04d}.tar/{key}.jpg"] = data
        write_tar(folder / f"set-{shard:04d}.tar", members)
    return found


def labels(images: ImageSet) -> dict[str, tuple[str | None, str]]:
    return {ref.id: (ref.label, ref.split) for ref in images.refs}


def test_shards_are_embedded_like_files(tmp_path: Path) -> None:
    expected = shards(tmp_path / "shards")
    images = ImageSet.from_source(tmp_path / "shards")
    assert {ref.id: ref.path.read_bytes() for ref in images.refs} == expected
    assert [ref.label for ref in images.refs] == ["0", "1"] * 4
    assert len(images.ignored) == 8
    store = tmp_path / "s.featx"
    summary = extract_features(images, tiny_backbone(), store, engine=TinyEngine(), workers=2)
    assert (summary.embedded, summary.quarantined) == (8, 0)
    features = read_features(store)
    for row, name in enumerate(features.ids):
        (wanted,) = next(iter(TinyEngine().embed([pixels(expected[name], TINY)[None]])))
        assert np.array_equal(features.embeddings[row], wanted[0])
    find = finder(images.source)
    assert [find(name).read_bytes() for name in features.ids.tolist()] == [expected[name] for name in features.ids]
    again = extract_features(ImageSet.from_source(tmp_path / "shards"), tiny_backbone(), store, engine=TinyEngine())
    assert (again.embedded, again.reused) == (0, 8)


def test_an_unchanged_archive_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path / "shards", count=1)
    archive = tmp_path / "shards" / "set-0000.tar"
    monkeypatch.setattr("featx.extraction.run._SETTLED_NS", 0)  # else what is younger than two seconds is read again
    store = tmp_path / "s.featx"
    extract_features(ImageSet.from_tars(archive), tiny_backbone(), store, engine=TinyEngine(), workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(DecoderPool, "__init__", lambda *_, **__: pytest.fail("it was read again"))
        extract_features(ImageSet.from_tars(archive), tiny_backbone(), store, engine=TinyEngine(), workers=1)
    os.utime(archive, (2e9, 1.1e9))
    again = extract_features(ImageSet.from_tars(archive), tiny_backbone(), store, engine=TinyEngine(), workers=1)
    assert (again.embedded, again.reused) == (0, 4)  # read, and known by content


def test_one_shard_has_the_ids_that_its_folder_gives_it(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    whole, one = ImageSet.from_source(tmp_path / "shards"), ImageSet.from_source(tmp_path / "shards" / "set-0001.tar")
    assert one.refs == whole.refs[4:]


def test_json_names_classes_and_files_name_splits(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("val", 2)):
        members = []
        for number, label in ((first, "ants"), (first + 1, "bees")):
            members.append((f"{number}.left.png", jpeg(number)))
            members.append((f"{number}.json", json.dumps({"caption": "x", "class_name": label}).encode()))
        write_tar(tmp_path / f"insects-{split}-000.tar", members)
    assert labels(ImageSet.from_source(tmp_path)) == {
        "insects-train-000.tar/0.left.png": ("ants", "train"),
        "insects-train-000.tar/1.left.png": ("bees", "train"),
        "insects-val-000.tar/2.left.png": ("ants", "val"),
        "insects-val-000.tar/3.left.png": ("bees", "val"),
    }


def test_a_tar_of_class_folders_is_read_as_the_folder(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", each=2)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "photos", arcname="photos")
    found = {name: label for name, (label, _) in labels(ImageSet.from_source(tmp_path / "photos.tar")).items()}
    folder = {f"photos.tar/photos/{ref.id}": ref.label for ref in ImageSet.from_folder(tmp_path / "photos").refs}
    assert found == folder


def add_link(path: Path, kind: bytes, name: str, target: str) -> None:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)


def test_links_are_no_way_out(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    picture(99).save(secret)
    archive = write_tar(tmp_path / "a.tar", [(f"x/{i}.jpg", jpeg(i)) for i in range(2)] + [("y/2.jpg", jpeg(2))])
    add_link(archive, tarfile.SYMTYPE, "y/link.png", str(secret))
    add_link(archive, tarfile.LNKTYPE, "y/hard.png", "../secret.png")
    add_link(archive, tarfile.LNKTYPE, "y/again.jpg", "x/0.jpg")  # tar's way to say that a file has two names
    add_link(archive, tarfile.FIFOTYPE, "y/pipe.png", "")
    images = ImageSet.from_source(archive)
    store = tmp_path / "s.featx"
    summary = extract_features(images, tiny_backbone(), store, engine=TinyEngine(), workers=1)
    assert (summary.embedded, summary.reused, summary.quarantined) == (3, 1, 3)
    assert {item.id: item.reason for item in summary.refused} == {
        f"a.tar/y/{name}.png": "unreadable" for name in ("link", "hard", "pipe")
    }
    assert all("not followed" in item.message for item in summary.refused)
    assert "a.tar/y/again.jpg" in read_features(store).ids.tolist()


def test_members_that_are_no_images_are_quarantined_one_by_one(tmp_path: Path) -> None:
    members = [("a/1.jpg", jpeg(1)), ("a/2.jpg", b"not a picture"), ("b/3.jpg", jpeg(3)[:300]), ("b/4.jpg", b"")]
    archive = write_tar(tmp_path / "a.tar", [*members, ("b/5.jpg", jpeg(5))])
    store = tmp_path / "s.featx"
    images = ImageSet.from_source(archive)
    summary = extract_features(images, tiny_backbone(), store, engine=TinyEngine(), workers=2)
    reasons = {Path(item.id).name: item.reason for item in summary.refused}
    assert reasons == {"2.jpg": "not_an_image", "3.jpg": "truncated", "4.jpg": "empty"}


def test_a_huge_member_is_refused_unread(tmp_path: Path) -> None:
    archive = tmp_path / "huge.tar"
    info = tarfile.TarInfo("b/huge.png")
    info.size = MAX_BYTES + 1
    good = [tarfile.TarInfo("a/1.jpg"), tarfile.TarInfo("b/2.jpg")]
    with archive.open("wb") as file:
        for number, member in enumerate(good):
            data = jpeg(number)
            member.size = len(data)
            file.write(member.tobuf() + data + b"\0" * (-len(data) % 512))
        file.write(info.tobuf())
        file.seek(-(-info.size // 512) * 512 + 10240, io.SEEK_CUR)  # a hole: the file takes no room
        file.write(b"\0")
    summary = extract_features(
        ImageSet.from_source(archive), tiny_backbone(), tmp_path / "s.featx", engine=TinyEngine(), workers=1
    )
    assert [(item.id, item.reason) for item in summary.refused] == [("huge.tar/b/huge.png", "too_large")]


def good_tar(folder: Path) -> Path:
    return write_tar(folder / "good.tar", [("a/1.jpg", jpeg(1)), ("b/2.jpg", jpeg(2))])


def truncated(folder: Path) -> Path:
    data = good_tar(folder).read_bytes()
    (folder / "x.tar").write_bytes(data[: 512 + 700])
    return folder / "x.tar"


def without_end(folder: Path) -> Path:
    data = good_tar(folder).read_bytes().rstrip(b"\0")
    (folder / "x.tar").write_bytes(data + b"\0" * (-len(data) % 512))
    return folder / "x.tar"


def joined(folder: Path) -> Path:
    data = good_tar(folder).read_bytes()
    (folder / "x.tar").write_bytes(data + data)
    return folder / "x.tar"


def compressed(folder: Path) -> Path:
    (folder / "x.tar").write_bytes(gzip.compress(good_tar(folder).read_bytes()))
    return folder / "x.tar"


def no_tar(folder: Path) -> Path:
    Image.new("RGB", (9, 9)).save(folder / "x.tar", format="PNG")
    return folder / "x.tar"


def leading_out(folder: Path) -> Path:
    return write_tar(folder / "x.tar", [("a/1.jpg", jpeg(1)), ("a/../../b.jpg", jpeg(2))])


def absolute(folder: Path) -> Path:
    return write_tar(folder / "x.tar", [("/etc/a/1.jpg", jpeg(1))])


def twice(folder: Path) -> Path:
    return write_tar(folder / "x.tar", [("a/1.jpg", jpeg(1)), ("a/1.jpg", jpeg(2))])


def bad_label(folder: Path) -> Path:
    return write_tar(folder / "x.tar", [("1.jpg", jpeg(1)), ("1.json", b'{"label": [1, 2]}')])


def huge_label(folder: Path) -> Path:
    return write_tar(folder / "x.tar", [("1.jpg", jpeg(1)), ("1.json", b" " * 70_000)])


def no_images(folder: Path) -> Path:
    return write_tar(folder / "x.tar", [("readme.md", b"x")])


def huge_header(folder: Path) -> Path:
    """An extended header that says of itself that it has two gigabytes."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2 * 2**30
    with (folder / "x.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2 * 2**30 + 20_000)
    return folder / "x.tar"


def broken_sparse_map(folder: Path) -> Path:
    """A map of holes that is no list of pairs of numbers."""
    info = tarfile.TarInfo("a/1.jpg")
    info.size, info.pax_headers = 10, {"GNU.sparse.map": "0,x", "GNU.sparse.size": "10"}
    with (folder / "x.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.PAX_FORMAT) + bytes(512) + bytes(1024))
    return folder / "x.tar"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (broken_sparse_map, r"not a valid tar file \(invalid literal.*Fetch it again, or make it anew"),
        (truncated, r"not a valid tar file|ends before its last file does"),
        (without_end, r"not a valid tar file \(it has no end\).*Fetch it again, or make it anew"),
        (joined, r"something follows its end, as when archives are joined with cat"),
        (compressed, r"a compressed archive.*make a plain \.tar"),
        (no_tar, r"not a valid tar file"),
        (leading_out, r"leads out of the archive; refused: found a/\.\./\.\./b\.jpg"),
        (absolute, r"leads out of the archive; refused: found /etc/a/1\.jpg"),
        (twice, r"two files have the same name: found a/1\.jpg"),
        (bad_label, r"member 1\.json: a label that is neither text nor a whole number"),
        (huge_label, r"member 1\.json: not a label: expected a file of at most 65,536 bytes"),
        (no_images, r"no images in these archives"),
        (huge_header, r"not a valid tar file \(a header of 2,147,48"),
    ],
)
def test_archives_that_are_refused(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=words):
        ImageSet.from_source(make(tmp_path))


def test_a_part_that_is_gone_is_refused(tmp_path: Path) -> None:
    """The archive became shorter between the listing and the reading."""
    archive = tmp_path / "a.tar"
    archive.write_bytes(b"x" * 100)
    parts = [Part(archive, 90, 20), Part(archive, 500, 20), Part(tmp_path / "gone.tar", 0, 20), Part(archive, 0, 100)]
    with DecoderPool(TINY, workers=1) as pool:
        refusals = [done.refusal for done in pool.run(parts, lambda digest: False, ahead=4)]
    assert [refusal.reason for refusal in refusals if refusal] == ["truncated", "truncated", "missing", "not_an_image"]


def test_the_command(tmp_path: Path, featx: Featx) -> None:
    ran = featx("extract", truncated(tmp_path), "--out", tmp_path / "t.featx", "--json")
    assert ran.code == 2
    assert "tar" in ran.json["error"]
    assert not (tmp_path / "t.featx").exists()
