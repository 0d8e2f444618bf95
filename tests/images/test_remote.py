"""Images in object storage: a real S3 server on the loopback interface, and the real client."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, TinyEngine, class_folders, tiny_backbone

from featx.errors import ImageError, SourceError, UsageError
from featx.extraction.run import ExtractSummary, extract_features
from featx.images.origin import MAX_FETCHED
from featx.images.remote import Remote
from featx.images.source import ImageSet, finder
from featx.images.thumbnails import Originals
from featx.reports.sheet import duplicate_sheet, image_finder
from featx.retrieval.search import duplicate_groups
from featx.store.reader import read_features

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server."""
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def environment(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What a user sets: keys, and the address of the server."""
    variables = {**KEYS, "AWS_ENDPOINT_URL": server}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    forget()
    yield variables
    forget()


def forget() -> None:
    """Clients and listings that an earlier test left in this process."""
    from featx.images import remote as sources_remote

    sources_remote._system.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


class Bucket:
    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name = client, name
        self.url = f"s3://{name}/photos"

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)


@pytest.fixture
def bucket(server: str, environment: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest) -> Bucket:
    """A bucket with the pictures of a folder below ``photos/``."""
    client = boto3.client("s3", endpoint_url=server)
    name = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    client.create_bucket(Bucket=name)
    for path in sorted(class_folders(tmp_path / "photos", each=3).rglob("*.png")):
        client.put_object(Bucket=name, Key=path.relative_to(tmp_path).as_posix(), Body=path.read_bytes())
    for key in ("photos/notes.txt", "photos/ants/", "photos/.hidden/x.png", "photosets/other/x.png"):
        client.put_object(Bucket=name, Key=key, Body=b"")
    return Bucket(client, name)


def run(source: str, store: Path) -> ExtractSummary:
    return extract_features(ImageSet.from_source(source), tiny_backbone(), store, engine=TinyEngine(), workers=2)


@pytest.mark.slow
def test_a_bucket_is_read_as_the_folder_is(bucket: Bucket, tmp_path: Path) -> None:
    local, remote = ImageSet.from_source(tmp_path / "photos"), ImageSet.from_source(bucket.url)
    assert [(ref.id, ref.label, ref.split, ref.size) for ref in remote.refs] == [
        (ref.id, ref.label, ref.split, ref.size) for ref in local.refs
    ]
    assert len(remote.ignored) == 1
    assert all(abs(ref.mtime_ns - time.time_ns()) < 60e9 for ref in remote.refs)
    summary = run(bucket.url, tmp_path / "s.featx")
    assert (summary.embedded, summary.quarantined) == (6, 0)
    run(str(tmp_path / "photos"), tmp_path / "t.featx")
    one, other = read_features(tmp_path / "s.featx"), read_features(tmp_path / "t.featx")
    assert np.array_equal(one.embeddings, other.embeddings)
    assert one.ids.tolist() == other.ids.tolist()
    sheet = tmp_path / "copies.html"
    groups = duplicate_groups(one, by=0.0)
    assert duplicate_sheet(sheet, tmp_path, image_finder(tmp_path / "s.featx", None), one, groups) == 0
    assert sheet.read_text().count("data:image/jpeg;base64") == 6
    find = finder(remote.source)
    assert all(find(name).read_bytes() == (tmp_path / "photos" / name).read_bytes() for name in one.ids.tolist())
    with Originals(remote.source, one.ids.tolist(), one.digests) as originals:
        assert all(originals.thumbnail(row) for row in range(len(one)))


@pytest.mark.slow
def test_what_has_not_changed_is_not_fetched_again(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    read = Remote.read_bytes

    def counting(origin: Remote) -> bytes:
        fetched.append(origin.path.rpartition("/")[2])
        return read(origin)

    monkeypatch.setattr(Remote, "read_bytes", counting)
    monkeypatch.setattr("featx.extraction.run._SETTLED_NS", 0)  # else what is younger than two seconds is read again
    run(bucket.url, tmp_path / "s.featx")
    assert len(fetched) == 6
    fetched.clear()
    again = run(bucket.url, tmp_path / "s.featx")
    assert (again.reused, fetched) == (6, [])
    new = (tmp_path / "photos" / "ants" / "000.png").read_bytes()
    bucket.put("photos/bees/new.png", new)
    bucket.put("photos/bees/003.png", new)
    bucket.delete("photos/bees/004.png")
    again = run(bucket.url, tmp_path / "s.featx")
    assert (again.images, again.embedded, again.reused) == (6, 0, 6)
    assert sorted(fetched) == ["003.png", "new.png"]


def test_one_bad_object_costs_itself(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("photos/ants/bad.png", b"no picture")
    bucket.put("photos/ants/with space, ünïcode & #hash?.png", (tmp_path / "photos/ants/000.png").read_bytes())
    forget()
    images = ImageSet.from_source(bucket.url)
    bucket.delete("photos/ants/001.png")  # after the listing
    summary = extract_features(images, tiny_backbone(), tmp_path / "s.featx", engine=TinyEngine(), workers=2)
    reasons = {item.id: item.reason for item in summary.refused}
    assert reasons == {"ants/bad.png": "not_an_image", "ants/001.png": "missing"}
    assert (summary.embedded, summary.reused) == (5, 1)
    with pytest.raises(ImageError, match="are read") as caught:
        Remote(bucket.url, "x", MAX_FETCHED + 1).read_bytes()
    assert caught.value.reason == "too_large"


@pytest.mark.slow
def test_a_server_that_goes_away_stops_the_run_and_costs_nothing(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # it is patient: five times, with pauses
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="bucket")
    for path in sorted(class_folders(tmp_path / "photos", each=40).rglob("*.png")):
        client.put_object(Bucket="bucket", Key=path.relative_to(tmp_path).as_posix(), Body=path.read_bytes())
    forget()
    images = ImageSet.from_source("s3://bucket/photos")

    def stop(done: int, total: int) -> None:
        if done == 6:
            running.stop()

    with pytest.raises(SourceError, match=r"s3://bucket/photos: no answer \(.*What was embedded is kept"):
        extract_features(images, tiny_backbone(), tmp_path / "s.featx", engine=TinyEngine(), workers=1, progress=stop)
    forget()
    again = run(str(tmp_path / "photos"), tmp_path / "s.featx")
    assert 3 <= again.reused < 80


def test_mistakes_about_addresses(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"s3://no-such-bucket-here/x: nothing is at this address|no images"):
        ImageSet.from_source("s3://no-such-bucket-here/x")
    with pytest.raises(SourceError, match=r"no images at this address.*found nothing"):
        ImageSet.from_source(f"{bucket.url}/nothing")
    with pytest.raises(UsageError, match=r"a web address has no folders.*Download the images"):
        ImageSet.from_source("https://example.org/photos")
    with pytest.raises(SourceError, match="not an address that fsspec knows"):
        ImageSet.from_source("nosuch://x/y")
    with pytest.raises(SourceError, match="the address names nothing: expected one such as s3://bucket/photos"):
        ImageSet.from_source("s3://")
    for spelled in (str(Path(bucket.url)), bucket.url.replace("s3", "S3", 1)):  # pathlib makes s3:/ of s3://
        images = ImageSet.from_source(spelled)
        assert (len(images), images.source) == (6, bucket.url)


@pytest.mark.usefixtures("environment")
def test_no_permission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SourceError, match=r"no permission \(.*credentials.*Are the credentials set"):
        ImageSet.from_source("s3://somebody/photos")


@pytest.mark.parametrize(
    ("address", "package", "words"),
    [
        ("s3://b/photos", "s3fs", r"s3:// needs s3fs, which is not installed. Install it: pip install 'featx\[s3\]'"),
        ("gs://b/photos", "gcsfs", r"gs:// needs a package that is not installed.*gcsfs"),
    ],
)
def test_what_is_not_installed(address: str, package: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    for protocol in ("s3", "gs"):  # what has been imported is remembered there
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=words):
        ImageSet.from_source(address)
    forget()


def test_any_other_file_system(tmp_path: Path) -> None:
    """fsspec's own memory file system, which knows no modification times that can be relied on less than any other."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in sorted(class_folders(tmp_path / "photos", each=2).rglob("*.png")):
        memory.pipe(f"/things/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    summary = run("memory://things/photos", tmp_path / "s.featx")
    assert summary.embedded == 4
    assert read_features(tmp_path / "s.featx").class_names == ("ants", "bees")


@pytest.mark.slow
def test_the_command(bucket: Bucket, environment: dict[str, str], tmp_path: Path, featx: Featx) -> None:
    out = tmp_path / "s.featx"
    ran = featx("extract", bucket.url, "--out", out, "--weights", "none", "--json", env=environment)
    assert (ran.code, ran.json["embedded"]) == (0, 6), ran.err
    assert f"Listing {bucket.url}" in ran.err
