"""Several backbones in one store: each as in a store of its own, added and dropped, and version 1 extended."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import storekit
from conftest import TESTS, Featx, class_folders
from partkit import computed_by
from storekit import (
    THREE,
    assert_rows,
    check_published,
    digests_of,
    light_like,
    made_up,
    make_store,
    names_of,
    png_folders,
    provenance,
    rows_of,
)

from featx import _files
from featx._files import seal, unseal
from featx.errors import Interrupted, MismatchError, StoreError, UsageError
from featx.extraction import run
from featx.store import manifest, writer as store_writer
from featx.store.manifest import name_of, read_manifest
from featx.store.reader import FeatureReader, read_features
from featx.store.tools import content_hash, info, pack, verify
from featx.store.writer import StoreWriter

V1 = TESTS / "golden" / "v1-pngs"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return png_folders(tmp_path / "photos", 14)


@pytest.fixture(autouse=True)
def light_backbones_go_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """No catalogue has them."""
    monkeypatch.setattr(run, "network_like", light_like)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A folder of logs, one for each engine."""
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def shard_bytes(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store / "shards").iterdir()}


def names_in(store: Path) -> list[str]:
    return [name_of(each) for each in read_manifest(store).backbones]


def counted_pool(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that decoding processes are asked to read, and those that they are asked to decode as "decode"."""
    from featx.images import pool as pools

    asked: list[str] = []
    send = pools._Child.decode

    def decode(self: Any, request: bytes, *arguments: Any) -> Any:
        asked.append(request.rpartition(b"/")[2].decode())
        done = send(self, request, *arguments)
        if done.pixels is not None or any(each is not None for each in done.others):
            asked.append("decode")
        return done

    monkeypatch.setattr(pools._Child, "decode", decode)
    return asked


def stop_after(calls: int) -> Any:
    left = iter(range(calls))

    def progress(done: int, total: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return progress


# --- one extraction -----------------------------------------------------------------------------------------------


def test_rows_of_several_backbones_are_those_of_stores_of_their_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tmp_path / "both.featx"
    asked = counted_pool(monkeypatch)
    summary = storekit.extract(source, both, backbones=("tiny", "wide"))
    names = sorted(path.name for path in source.rglob("*.png"))
    assert sorted(asked) == sorted([*names, *["decode"] * 14])  # each file read once, and decoded once
    assert (summary.images, summary.embedded) == (14, 14)
    assert summary.backbones == ("tiny", "wide", "pixels")
    reader = FeatureReader(both)
    assert list(reader.blocks) == ["tiny", "wide", "pixels"] and reader.networks == ("tiny", "wide")
    for name in ("tiny", "wide"):
        storekit.extract(source, tmp_path / f"{name}.featx", backbones=(name,))
        alone, here = read_features(tmp_path / f"{name}.featx"), read_features(both, layer=name)
        assert np.array_equal(alone.embeddings, here.embeddings)
        assert alone.embeddings.std() > 0
        assert alone.fingerprint == here.fingerprint and alone.provenance == here.provenance
        assert alone.hashes is not None and here.hashes is not None and np.array_equal(alone.hashes, here.hashes)
        assert alone.pixels is not None and here.pixels is not None and np.array_equal(alone.pixels, here.pixels)
    assert verify(both) == []
    joined = reader.features(np.arange(14), ["tiny", "wide"])
    assert joined.embeddings.shape == (14, 8 + 12)
    assert [name_of(each) for each in joined.provenance["backbones"]] == ["tiny", "wide"]


def test_a_backbone_that_is_added_is_computed_alone(source: Path, tmp_path: Path, logs: Path) -> None:
    store = tmp_path / "s.featx"
    first = storekit.extract(source, store, log=logs)
    before, fingerprint = shard_bytes(store), read_features(store).fingerprint
    assert computed_by(logs) == {"tiny": 14}
    second = storekit.extract(source, store, backbones=("wide",), log=logs)
    assert computed_by(logs) == {"wide": 14}
    assert second.embedded == 14 and first.fingerprint == second.fingerprint
    assert shard_bytes(store).items() > before.items()
    features = read_features(store)  # "penultimate" is the layer of the store's own backbone
    assert features.fingerprint == fingerprint == info(store)["fingerprint"]
    assert names_in(store) == ["tiny", "pixels", "wide"]
    together = tmp_path / "together.featx"
    storekit.extract(source, together, backbones=("tiny", "wide"))
    for layer in ("tiny", "wide", "pixels"):
        assert np.array_equal(
            read_features(store, layer=layer).embeddings, read_features(together, layer=layer).embeddings
        )
    assert storekit.extract(source, store, log=logs).reused == 14 and computed_by(logs) == {}
    assert verify(store) == []


def test_images_that_are_added_are_embedded_by_every_backbone(source: Path, tmp_path: Path, logs: Path) -> None:
    store, whole = tmp_path / "s.featx", tmp_path / "whole.featx"
    storekit.extract(source, store, backbones=("tiny", "wide"))
    png_folders(source, 3, first=50)
    started: dict[str, int] = {}

    def start(backbone: Any, **how: Any) -> Any:
        started[backbone.name] = 1
        return storekit.start_light(backbone, log=logs)

    storekit.extract(source, store, backbones=("wide",), engine=start)
    assert computed_by(logs) == {"tiny": 3, "wide": 3} and set(started) == {"tiny", "wide"}
    storekit.extract(source, whole, backbones=("tiny", "wide"))
    assert content_hash(store) == content_hash(whole)


def test_a_backbone_half_added_leaves_the_old_one(source: Path, tmp_path: Path, logs: Path, featx: Featx) -> None:
    store, whole = tmp_path / "s.featx", tmp_path / "whole.featx"
    storekit.extract(source, store)
    before = content_hash(store)
    with pytest.raises(Interrupted):
        storekit.extract(source, store, backbones=("wide",), log=logs, progress=stop_after(9))
    half = computed_by(logs).get("wide", 0)  # its thread may have been given nothing yet
    assert half < 14
    assert content_hash(store) == before and verify(store) == []
    assert list(FeatureReader(store).backbones) == ["tiny", "pixels"]
    with pytest.raises(UsageError, match="no layer 'wide' in this store"):
        read_features(store, layer="wide")
    assert {name: each["finished"] for name, each in info(store)["backbones"].items()} == {
        "tiny": True, "pixels": True, "wide": False,
    }  # fmt: skip
    lines = [" ".join(line.split()) for line in featx("info", store).out.splitlines()]
    assert "backbones tiny: penultimate; views center; fp32" in lines
    assert "pixels: penultimate; views center; fp32" in lines
    assert "wide: penultimate; views center; fp32; unfinished" in lines
    storekit.extract(source, store, backbones=("wide",), log=logs)
    assert computed_by(logs) == {"wide": 14 - half}
    storekit.extract(source, whole)
    storekit.extract(source, whole, backbones=("wide",))
    assert content_hash(store) == content_hash(whole)


def test_a_backbone_without_its_weights_is_named(source: Path, tmp_path: Path, featx: Featx) -> None:
    store = tmp_path / "s.featx"
    lost = tmp_path / "lost.pth"
    with StoreWriter(store, provenance(), provenance(backbone="squeezenet1_1", weights=str(lost))) as writer:
        digests = digests_of(names_of(3))
        writer.add(digests, {"tiny": [rows_of(digests)], "squeezenet1_1": [rows_of(digests)]})
        writer.finish(storekit.index_of(names_of(3)), [], source="by hand")
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file() and path.name != ".lock"}
    ran = featx("extract", source, "--out", store, "--backbone", "resnet18", "--weights", "none", "--engine", "torch")
    assert ran.code == 2, ran.err
    assert "tiny" in ran.err or str(lost) in ran.err
    ran = featx("extract", source, "--out", store, "--backbone", "alexnet", "--weights", lost)
    assert ran.code == 2 and "lost.pth" in ran.err
    after = {path: path.read_bytes() for path in store.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
    assert len(read_features(store)) == 3


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx", backbones=THREE)
    with (
        pytest.raises(MismatchError, match="another weights_sha256"),
        StoreWriter(store, provenance(backbone="wide", weights_sha256="1" * 64)),
    ):
        pass
    assert_rows(store)


# --- dropping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["the store's own", "another"])
def test_a_backbone_is_dropped(own: bool, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx", backbones=THREE)
    gone, kept = ("tiny", "wide") if own else ("wide", "tiny")
    before, rows = shard_bytes(store), read_features(store, layer=kept).embeddings
    with StoreWriter(store) as writer:
        writer.drop(gone)
        assert writer.names == tuple(name for name in THREE if name != gone)
    assert shard_bytes(store) == before  # of shards that hold others, nothing is written anew
    for pruned in (False, True):
        assert verify(store) == []
        assert list(FeatureReader(store).backbones) == [name for name in THREE if name != gone]
        assert np.array_equal(read_features(store).embeddings, rows)
        with pytest.raises(UsageError, match="no layer"):
            read_features(store, layer=f"{gone}/penultimate")
        assert check_published(store) == 12
        names = {name for path in (store / "shards").iterdir() for name in h5py.File(path)["embeddings"]}
        assert (gone in names) is not pruned
        if not pruned:
            with StoreWriter(store) as writer:
                assert writer.prune() == 0  # no image lost its embeddings
    with StoreWriter(store) as writer:
        with pytest.raises(UsageError, match=f"{kept} cannot be taken out of the store"):
            writer.drop(kept)
        with pytest.raises(UsageError, match="unknown cannot be taken out"):
            writer.drop("unknown")
        writer.drop("pixels")
    assert list(FeatureReader(store).backbones) == [kept] and verify(store) == []


def test_a_finished_network_is_not_dropped_for_an_unfinished_one(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    with StoreWriter(store, provenance(backbone="wide")) as writer:
        with pytest.raises(UsageError, match="of which another is finished"):
            writer.drop("tiny")
        writer.drop("wide")
    assert_rows(store)


def test_shards_of_the_dropped_backbone_alone_go_at_once(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    old = shard_bytes(store)
    with StoreWriter(store, provenance(backbone="wide")) as writer:
        digests = digests_of(names_of(12))
        writer.add(digests, {"wide": [made_up("wide", digests)]})
        assert writer.index is not None
        writer.finish(writer.index, [], source="by hand")
        assert read_manifest(store).unfinished == ()
        reader = FeatureReader(store)
        writer.drop("tiny")
    assert np.array_equal(reader.read(np.arange(12), layer="wide"), made_up("wide", digests))
    with pytest.raises(StoreError, match=r"the shard was taken out while it was read. Open the store again"):
        reader.read(np.arange(12))
    assert not set(shard_bytes(store)) & set(old) and len(shard_bytes(store)) == 1
    assert verify(store) == [] and read_manifest(store).in_flux == ()
    assert np.array_equal(read_features(store).embeddings, made_up("wide", digests_of(names_of(12))))


def test_a_dropped_backbone_that_comes_back_has_no_stale_rows(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx", backbones=THREE)
    digests = digests_of(names_of(12))
    for pruned in (False, True):
        again = provenance(backbone="wide", weights_sha256=("2" if pruned else "1") * 64)
        with StoreWriter(store) as writer:
            writer.drop("wide")
            if pruned:
                writer.prune()
        with StoreWriter(store, again) as writer:
            assert all(writer.lacks(digest) == ("wide",) for digest in digests)
            writer.add(digests[:6], {"wide": [-made_up("wide", digests[:6])]})
            writer.flush()
        assert list(FeatureReader(store).backbones) == ["tiny", "pixels"]  # half of it, which nobody reads
        with StoreWriter(store, again) as writer:
            writer.add(digests[6:], {"wide": [-made_up("wide", digests[6:])]})
            assert writer.index is not None
            writer.finish(writer.index, [], source="by hand")
        assert np.array_equal(read_features(store, layer="wide").embeddings, -made_up("wide", digests))
        assert verify(store) == []
        packed = pack(store, tmp_path / f"{pruned}.h5")
        assert content_hash(packed) == content_hash(store)


@pytest.mark.slow
def test_dropping_is_whole_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before and after each thing that it publishes: the index is valid, and the next writer goes on."""
    good = make_store(tmp_path / "good.featx", backbones=THREE)
    with StoreWriter(good, provenance(backbone="third")) as writer:  # whose shards hold no other backbone
        digests = digests_of(names_of(12))
        writer.add(digests, {"third": [made_up("third", digests)]})
        assert writer.index is not None
        writer.finish(writer.index, [], source="by hand")
        writer.drop("tiny")
    publish, write_manifest = _files.publish, manifest.write_manifest
    for gone in ("wide", "third"):
        stopped = 0
        for allowed in range(40):
            store = tmp_path / f"{gone}-{allowed}.featx"
            shutil.copytree(good, store)
            steps = iter(range(allowed))

            def step(call: Any, *arguments: Any, steps: Any = steps) -> Any:
                if next(steps, None) is None:
                    raise StoreError("stopped by the test")
                done = call(*arguments)
                if next(steps, None) is None:
                    raise StoreError("stopped by the test")
                return done

            with monkeypatch.context() as patch:
                patch.setattr(store_writer, "publish", lambda *a, step=step: step(publish, *a))
                patch.setattr(store_writer, "write_manifest", lambda *a, step=step: step(write_manifest, *a))
                try:
                    with StoreWriter(store) as writer:
                        writer.drop(gone)
                        writer.prune()
                except StoreError as error:
                    assert error.what == "stopped by the test"
                    stopped += 1
                else:
                    break
            assert len(read_features(store)) == 12 and verify(store) == []
            check_published(store)
            with StoreWriter(store) as writer:
                if gone in writer.names:
                    writer.drop(gone)
                writer.prune()
            assert gone not in names_in(store) and verify(store) == []
            kept = "third" if gone == "wide" else "wide"
            assert np.array_equal(read_features(store).embeddings, made_up(kept, digests_of(names_of(12))))
        assert stopped >= 6


# --- what another store has ---------------------------------------------------------------------------------------


def test_only_backbones_of_this_store_are_taken_over(tmp_path: Path) -> None:
    other = make_store(tmp_path / "other.featx", backbones=THREE)
    with StoreWriter(tmp_path / "s.featx", provenance(backbone="wide"), provenance(backbone="pixels")) as writer:
        digests = digests_of(names_of(3))
        writer.add(digests, {"wide": [made_up("wide", digests)]})
        assert writer.take_over(other) == 9
        assert writer.take_over(other) == 0
        assert writer.index is not None
        writer.finish(writer.index, [], source="by hand")
    store = tmp_path / "s.featx"
    assert names_in(store) == ["wide", "pixels"] and verify(store) == []
    assert np.array_equal(read_features(store).embeddings, made_up("wide", digests_of(names_of(12))))


def test_a_shard_of_version_1_is_taken_over_by_a_store_of_another_backbone(tmp_path: Path) -> None:
    with StoreWriter(
        tmp_path / "s.featx", provenance(backbone="wide"), provenance(layers=["penultimate", "features.3"])
    ) as writer:
        assert writer.take_over(TESTS / "golden" / "v1-store") == 12
        digests = digests_of(names_of(12))
        writer.add(digests, {"wide": [made_up("wide", digests)]})
        assert writer.index is not None
        writer.finish(writer.index, [], source="by hand")
    reader = FeatureReader(tmp_path / "s.featx")
    every = np.arange(12)
    assert np.array_equal(reader.read(every, layer="tiny"), rows_of(digests))
    assert np.array_equal(reader.read(every, layer="wide"), made_up("wide", digests))
    assert verify(tmp_path / "s.featx") == []


# --- version 1 ----------------------------------------------------------------------------------------------------


def test_a_store_of_version_1_becomes_one_of_version_2(tmp_path: Path, logs: Path) -> None:
    store, source = tmp_path / "s.featx", V1 / "photos"
    shutil.copytree(V1 / "store", store)
    assert json.loads((store / "manifest.json").read_text())["format_version"] == 1
    old = read_features(store)
    assert old.hashes is None and old.pixels is None and len(old) == 12
    before, hashed = shard_bytes(store), content_hash(store)
    assert verify(store) == []
    one = pack(store, tmp_path / "one.h5")
    assert np.array_equal(read_features(one).embeddings, old.embeddings) and content_hash(one) == hashed
    summary = storekit.extract(source, store, log=logs)
    assert computed_by(logs) == {}  # the network's embeddings are known
    assert (summary.embedded, summary.reused) == (0, 12)
    assert json.loads((store / "manifest.json").read_text())["format_version"] == 2
    assert shard_bytes(store).items() > before.items()
    new = read_features(store)
    assert new.fingerprint == old.fingerprint and np.array_equal(new.embeddings, old.embeddings)
    assert new.ids.tolist() == old.ids.tolist()
    whole = tmp_path / "whole.featx"
    storekit.extract(source, whole)
    fresh = read_features(whole)
    assert fresh.hashes is not None and fresh.pixels is not None
    assert new.hashes is not None and np.array_equal(new.hashes, fresh.hashes)
    assert new.pixels is not None and np.array_equal(new.pixels, fresh.pixels)
    assert content_hash(store) == content_hash(whole) and verify(store) == []
    storekit.extract(source, store, backbones=("wide",))
    two = pack(store, tmp_path / "two.h5")
    assert content_hash(two) == content_hash(store) and verify(two) == []
    packed = read_features(two, layer="wide")
    assert packed.hashes is not None and np.array_equal(packed.hashes, fresh.hashes)
    assert packed.pixels is not None and np.array_equal(packed.pixels, fresh.pixels)
    with StoreWriter(store) as writer:
        writer.drop("tiny")
    assert not set(shard_bytes(store)) & set(before)  # shards of version 1 hold one backbone only
    assert verify(store) == [] and list(FeatureReader(store).backbones) == ["pixels", "wide"]


@pytest.mark.slow
def test_what_a_sweep_says_of_copies_in_stores_of_version_1(tmp_path: Path, featx: Featx) -> None:
    """By the cosine where the backbone is trained; not at all where it is random, alone or among several stores."""
    random, trained, other = (tmp_path / name for name in ("random.featx", "trained.featx", "other.featx"))
    for store in (random, trained, other):
        shutil.copytree(V1 / "store", store)
        fields = unseal((store / "manifest.json").read_bytes())
        fields["provenance"]["weights"] = "default" if store == trained else "none"
        (old,) = (store / "shards").iterdir()
        with h5py.File(old, "r+") as file:  # two images alike, whose bytes are not equal
            file["embeddings/penultimate"][3] = file["embeddings/penultimate"][5] * 1.01
        sha256 = hashlib.sha256(old.read_bytes()).hexdigest()
        fields["shards"] = [{**fields["shards"][0], "name": f"00000-{sha256[:8]}.h5", "sha256": sha256}]
        old.rename(old.with_name(fields["shards"][0]["name"]))
        (store / "manifest.json").write_bytes(seal(fields))
        assert verify(store) == []
    for stores, found, said in (
        ([trained], 1, "near copies are images with a cosine of 0.98 or more"),
        ([random], 0, "as the weights are random, only copies of equal bytes are found"),
        ([random, other], 0, "as the weights are random, only copies of equal bytes are found"),
    ):
        ran = featx("sweep", *stores, "--shots", "1", "--heads", "nearest_centroid", "--episodes", 2, "--json")
        assert f"Note: without perceptual hashes, {said}" in ran.err
        assert "run featx extract again" in ran.err
        assert ran.code == 0 and ran.json["duplicates"]["near"] == found, ran.err
    with StoreWriter(trained, provenance(backbone="pixels", weights="default", weights_sha256="")):
        pass
    assert read_features(trained).near_copies == 0.98  # thumbnails that are not there yet are not missed


@pytest.mark.slow
def test_a_store_of_version_1_says_that_all_photos_are_read_once_more(tmp_path: Path, featx: Featx) -> None:
    photos, store = class_folders(tmp_path / "photos", each=3), tmp_path / "s.featx"
    assert featx("extract", photos, "--out", store, "--backbone", "squeezenet1_1", "--weights", "none").code == 0
    said = "Note: 6 photos will be read once more, for the thumbnails and perceptual hashes that this store does not"
    assert featx("extract", photos, "--out", store, "--part", "1/2").err.count("read once more") == 0
    with StoreWriter(store) as writer:
        writer.drop("pixels")  # as in version 1, of which only old featx makes stores
    part = featx("extract", photos, "--out", store, "--part", "2/2")
    assert part.code == 0 and said.replace("6", "3") in part.err, part.err
    again = featx("extract", photos, "--out", store, "--json")
    assert again.code == 0 and said in again.err, again.err
    assert (again.json["embedded"], again.json["reused"]) == (0, 6)
    assert "read once more" not in featx("extract", photos, "--out", store).err


def test_a_store_of_version_1_is_pruned_into_version_2(tmp_path: Path) -> None:
    store = tmp_path / "s.featx"
    shutil.copytree(TESTS / "golden" / "v1-store", store)
    with StoreWriter(store) as writer:
        writer.finish(storekit.index_of(names_of(7)), [], source="by hand")
        assert writer.prune() == 5
    assert_rows(store, 7)
    assert np.array_equal(read_features(store, layer="features.3").embeddings, rows_of(digests_of(names_of(7)), 9))
    assert verify(store) == []
