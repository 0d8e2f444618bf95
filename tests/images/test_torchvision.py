"""Data sets of torchvision from files made here, compared with what torchvision itself gives."""

from __future__ import annotations

import io
import struct
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyEngine, class_folders, picture, tiny_backbone
from PIL import Image
from torchvision import datasets

from featx.errors import SourceError, UsageError
from featx.extraction.run import extract_features
from featx.images.origin import ImageRef
from featx.images.source import ImageSet
from featx.images.thumbnails import Originals
from featx.store.reader import read_features


def make_dtd(root: Path) -> Path:
    """The describable textures, in their own layout: two classes, three splits."""
    base = root / "dtd" / "dtd"
    number = 0
    (base / "labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        lines = []
        for name in ("banded", "woven"):
            (base / "images" / name).mkdir(parents=True, exist_ok=True)
            picture(number).save(base / "images" / name / f"{name}_{number:04d}.jpg")
            lines.append(f"{name}/{name}_{number:04d}.jpg")
            number += 1
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines) + "\n")
    return root


def make_mnist(root: Path, rows: int = 6) -> Path:
    """The files of MNIST, with noise for digits."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("train", "t10k"):
        images = random.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
        labels = np.arange(rows, dtype=np.uint8) % 10
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, rows, 28, 28) + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, rows) + labels.tobytes())
    return root


def make_pets(root: Path) -> Path:
    """Oxford-IIIT Pet: file names with a class number in a list; it takes no loader."""
    base = root / "oxford-iiit-pet"
    for folder in ("images", "annotations"):
        (base / folder).mkdir(parents=True)
    for split, first in (("trainval", 0), ("test", 2)):
        lines = []
        for number, name in ((first, "Abyssinian"), (first + 1, "beagle")):
            picture(number).save(base / "images" / f"{name}_{number}.jpg")
            lines.append(f"{name}_{number} {1 + number % 2} 1 1")
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def make_eurosat(root: Path) -> Path:
    """Folders of classes, and no splits."""
    class_folders(root / "eurosat" / "2750", names=("Forest", "River"), each=2)
    return root


def pixels_of(ref: ImageRef) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(io.BytesIO(ref.path.read_bytes())) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("name", "make", "parts"),
    [
        ("DTD", make_dtd, {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}),
        ("MNIST", make_mnist, {"train": {"train": True}, "test": {"train": False}}),
        ("OxfordIIITPet", make_pets, {"train": {"split": "trainval"}, "test": {"split": "test"}}),
        ("EuroSAT", make_eurosat, {"": {}}),
    ],
)
def test_images_labels_and_splits_are_torchvisions(
    name: str, make: Callable[[Path], Path], parts: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    root = make(tmp_path)
    images = ImageSet.from_source(f"torchvision:{name}:{root}")
    for split, options in parts.items():
        theirs = getattr(datasets, name)(root=root, **options)
        ours = [ref for ref in images.refs if ref.split == split]
        wanted = [(np.asarray(image.convert("RGB")), theirs.classes[target]) for image, target in theirs]
        assert len(ours) == len(wanted)
        for ref in ours:
            where = [i for i, (array, _) in enumerate(wanted) if np.array_equal(array, pixels_of(ref))]
            assert [wanted[i][1] for i in where] == [ref.label]
    assert len(images) == sum(len(getattr(datasets, name)(root=root, **options)) for options in parts.values())
    store = tmp_path / "s.featx"
    summary = extract_features(images, tiny_backbone(), store, engine=TinyEngine(), workers=1)
    assert (summary.embedded, summary.quarantined) == (len(images), 0)
    features = read_features(store)
    with Originals(images.source, features.ids.tolist(), features.digests) as originals:
        assert all(originals.thumbnail(row) for row in range(len(features)))


def test_files_keep_their_bytes_and_names(tmp_path: Path) -> None:
    images = ImageSet.from_torchvision("DTD", make_dtd(tmp_path))
    assert images.refs[0].id == "dtd/dtd/images/banded/banded_0000.jpg"
    assert images.refs[0].path == tmp_path / images.refs[0].id
    assert ImageSet.from_torchvision("MNIST", make_mnist(tmp_path)).refs[0].id == "test/000000"


def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("it went to the network"))
    for name in ("DTD", "MNIST", "CIFAR10", "Flowers102", "Food101", "Caltech101", "SVHN", "GTSRB"):
        words = rf"cannot load {name} \(.*featx downloads nothing.*torchvision\.datasets\.{name}\(.*download=True\)"
        with pytest.raises(SourceError, match=words):
            ImageSet.from_source(f"torchvision:{name}:{tmp_path}")
    with pytest.raises(SourceError, match=r"cannot load Caltech101 \(no such folder\)"):
        ImageSet.from_source(f"torchvision:Caltech101:{tmp_path / 'nowhere'}")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("torchvision:DTB:x", r"no data set 'DTB'.*Did you mean DTD"),
        ("torchvision:read_image:x", r"no data set 'read_image'"),
        ("torchvision:CocoDetection:x", r"needs arguments that cannot be given here: found annFile"),
        ("torchvision:", r"no data set ''.*torchvision:NAME:ROOT"),
    ],
)
def test_mistakes_are_named(source: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ImageSet.from_source(source)
