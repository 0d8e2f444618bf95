"""The bundle: the same numbers after a round trip, and nothing that was changed on the way is believed."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import TESTS, Featx
from hypothesis import HealthCheck, given, settings, strategies as st
from modelkit import PROVENANCE, clusters, make_bundle

from featx.backbones.backbone import load_backbone
from featx.backbones.cut import tail_cut
from featx.backbones.engines.choice import make_engine
from featx.backbones.provenance import provenance_of
from featx.errors import BundleError, MismatchError
from featx.heads.catalogue import HEADS, make_head
from featx.heads.normalise import Normalise
from featx.heads.scorer import KINDS, Scorer, margins, softmax
from featx.models.bundle import bundle_bytes, parse_bundle, read_bundle, write_bundle
from featx.models.predictor import open_embedder
from featx.models.unknown import learn

WHERE = Path("some.model")


@pytest.fixture(scope="module")
def raw() -> bytes:
    rows, labels = clusters()
    kept, _ = learn(rows, labels, np.arange(len(rows)), kind="l2", max_unknown=0.05)
    return bundle_bytes(make_bundle(make_head("logreg").fit(rows, labels), rows, familiarity=kept, max_unknown=0.05))


def sealed(raw: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """The bundle with changed members and a checksum that fits them: what a careful forger makes."""
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    change(members)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
        file.comment = b"sha256=" + b"0" * 64
    body = out.getvalue()[:-71]
    return body + b"sha256=" + hashlib.sha256(body).hexdigest().encode()


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HEADS)
def test_the_same_numbers_as_the_pipeline_on_1000_vectors(name: str, kind: str, n_classes: int, tmp_path: Path) -> None:
    rows, labels = clusters(n_classes)
    extra = {"n_neighbors": 5} if name == "knn" else {}
    model = make_head(name, kind=kind, **extra).fit(rows, labels)
    bundle = read_bundle(write_bundle(make_bundle(model, rows, n_classes), tmp_path / "some.model"))
    queries = np.random.default_rng(1).normal(size=(1000, rows.shape[1])).astype(np.float32) * 2
    scores = bundle.scorer.scores(queries)
    if name == "knn":
        votes = (bundle.scorer.n_neighbors + 1) * np.exp(scores) - 1 / n_classes
        assert np.abs(votes / 5 - model.predict_proba(queries)).max() < 1e-6
    else:
        expected = model.decision_function(queries)
        found = scores[:, 1] if n_classes == 2 else scores
        assert np.abs(found - expected).max() < 1e-6
        assert [int(each.label[-1]) for each in bundle.answer(queries)] == model.predict(queries).tolist()
    if name in ("logreg", "lda"):  # their probabilities are the softmax of their scores
        assert np.abs(bundle.probabilities(queries) - model.predict_proba(queries)).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_normaliser_is_the_heads(kind: Any) -> None:
    rows, _ = clusters()
    rows[3] = 0
    expected = Normalise(kind).fit(rows)
    scorer = Scorer(kind=kind, mean=expected.mean_, scale=expected.scale_, n_classes=2)
    assert np.array_equal(scorer.normalised(rows), expected.transform(rows))


def test_all_that_was_said_comes_back(raw: bytes, tmp_path: Path) -> None:
    bundle = parse_bundle(raw, WHERE)
    assert bundle_bytes(bundle) == raw
    again = read_bundle(write_bundle(bundle, tmp_path / "a.model"))
    assert again.describe() == bundle.describe()
    assert again.sha256 == bundle.sha256 != ""
    assert bundle.scorer.coef is not None
    with zipfile.ZipFile(tmp_path / "a.model") as file:
        arrays = safetensors.numpy.load(file.read("arrays.safetensors"))
    assert np.array_equal(arrays["coef"], bundle.scorer.coef)
    rows = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    assert again.answer(rows) == bundle.answer(rows)
    assert {answer.reason for answer in again.answer(rows)} >= {"unknown", None}


def test_the_golden_model_is_read_for_ever() -> None:
    bundle = read_bundle(TESTS / "golden" / "v1.model")
    assert bundle.sha256 == "994365da4f9efbfc1517fa1d7aac2cc9c4a934f06324a7b5c0858922b7deb13d"
    assert (bundle.class_names, bundle.head, bundle.params) == (("class 0", "class 1", "class 2"), "logreg", {"C": 316})
    assert (bundle.threshold, bundle.max_error, bundle.layer) == (0.5, 0.05, "penultimate")
    assert bundle.provenance == PROVENANCE
    rows = np.sin(np.arange(36, dtype=np.float32)).reshape(3, 12)
    expected = [[0.604302495, 0.362879121, 0.032818384], [0.00762042, 0.978931864, 0.013447717],
                [0.000510956, 0.973221622, 0.026267423]]  # fmt: skip
    assert np.abs(bundle.probabilities(rows) - expected).max() < 1e-6
    assert [answer.label for answer in bundle.answer(rows)] == ["class 0", "class 1", "class 1"]


def test_the_golden_model_with_a_trained_part_is_read_for_ever() -> None:
    """Version 2, of three neighbours among twelve rows."""
    bundle = read_bundle(TESTS / "golden" / "v2.model")
    assert bundle.sha256 == "fb17063133e54c70ed93c33ab2df652bccb06e11296cc461330495cbe533cb07"
    assert (bundle.head, bundle.params, bundle.scorer.n_neighbors) == ("knn", {"n_neighbors": 3}, 3)
    assert bundle.tail is not None
    assert tail_cut(bundle.tail) == "fc"
    assert safetensors.numpy.load(bundle.tail)["fc.weight"].tolist() == [[1, 1], [1, 1]]
    rows = np.sin(np.arange(36, dtype=np.float32)).reshape(3, 12)
    expected = [[0.625, 0.375], [0.125, 0.875], [0.125, 0.875]]
    assert np.abs(bundle.probabilities(rows) - expected).max() < 1e-6


@pytest.mark.parametrize("version", [1, 2])
def test_what_an_earlier_featx_wrote_is_written_anew_with_the_same_answers(version: int) -> None:
    old = read_bundle(TESTS / "golden" / f"v{version}.model")
    new = parse_bundle(bundle_bytes(old), WHERE)
    assert new.describe() == old.describe()
    assert new.describe()["format_version"] == 3
    assert (new.tail, new.probe, new.sha256 == old.sha256) == (old.tail, old.probe, False)
    rows = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    assert np.array_equal(new.probabilities(rows), old.probabilities(rows))
    for each in (old, new):
        assert [note for note in each.cautions if "cannot call photos unknown" in note and "Fit it again" in note]
        assert {(a.familiarity, a.reason) for a in each.answer(rows)} <= {(None, None), (None, "unsure")}


def test_answers() -> None:
    rows, labels = clusters()
    bundle = make_bundle(make_head("logreg").fit(rows, labels), rows, sharpness=0.05)
    threshold = float(np.median(bundle.probabilities(rows).max(axis=1)))
    bundle = replace(bundle, threshold=threshold)
    answers = bundle.answer(rows)
    for answer, row in zip(answers, bundle.probabilities(rows), strict=True):
        assert answer.score == row.max()
        assert answer.label == bundle.class_names[row.argmax()]
        assert list(answer.probabilities.values()) == row.tolist()
        assert answer.abstain == (row.max() < threshold)
    assert 0 < sum(answer.abstain for answer in answers) < len(answers)
    kept, _ = learn(rows, labels, np.arange(len(rows)), kind="l2", max_unknown=0.1)
    assert kept is not None
    known = replace(bundle, familiarity=kept, max_unknown=0.1)
    assert known.cautions == []
    for with_it, without_it, share in zip(known.answer(-rows), bundle.answer(-rows), kept.shares(-rows), strict=True):
        assert with_it.familiarity == share
        assert with_it.reason == ("unknown" if share <= 0.1 else without_it.reason)  # unknown before unsure
        assert with_it.abstain == (with_it.reason is not None)
        assert (with_it.label, with_it.score) == (without_it.label, without_it.score)
    assert {answer.reason for answer in replace(known, max_unknown=0.0).answer(-rows)} == {None, "unsure"}
    unsure = replace(bundle, sharpness=None, threshold=None)
    scores = bundle.scorer.scores(rows)
    for answer, margin in zip(unsure.answer(rows), margins(scores), strict=True):
        assert (answer.score_kind, answer.score, answer.abstain) == ("margin", margin, True)
        assert answer.to_json()["probabilities"] == {}
    assert np.array_equal(bundle.probabilities(rows), softmax(scores, 0.05))
    with pytest.raises(ValueError, match=r"expected embeddings \(n, 12\), got \(5, 3\)"):
        bundle.answer(np.zeros((5, 3), np.float32))


def test_200_random_byte_flips_are_refused(raw: bytes) -> None:
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(raw), 200).tolist():
        changed = bytearray(raw)
        changed[place] ^= int(rng.integers(1, 256))
        with pytest.raises(BundleError):
            parse_bundle(bytes(changed), WHERE)


def test_every_cut_is_refused(raw: bytes) -> None:
    for length in [*range(200), *range(200, len(raw), 97), len(raw) - 1]:
        with pytest.raises(BundleError):
            parse_bundle(raw[:length], WHERE)
    with pytest.raises(BundleError):
        parse_bundle(raw + b"\n", WHERE)


def edit(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members["bundle.json"] = json.dumps({**json.loads(members["bundle.json"]), **changes}).encode()

    return change


def without(field: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        fields = json.loads(members["bundle.json"])
        del fields[field]
        members["bundle.json"] = json.dumps(fields).encode()

    return change


def put(**arrays: Any) -> Callable[[dict[str, bytes]], None]:
    """Arrays among or in place of a bundle's; None takes one away."""

    def change(members: dict[str, bytes]) -> None:
        there = safetensors.numpy.load(members["arrays.safetensors"]) | arrays
        members["arrays.safetensors"] = safetensors.numpy.save({k: v for k, v in there.items() if v is not None})

    return change


def put_npy(**arrays: Any) -> Callable[[dict[str, bytes]], None]:
    """The same in a bundle of version 1 or 2."""

    def change(members: dict[str, bytes]) -> None:
        for name, array in arrays.items():
            out = io.BytesIO()
            np.save(out, array, allow_pickle=True)
            members[f"{name}.npy"] = out.getvalue()

    return change


def header(
    change: Callable[[dict[str, Any]], None], *, length: int | None = None
) -> Callable[[dict[str, bytes]], None]:
    """A bundle whose arrays' header is changed, with its own length or one that is a lie."""

    def forge(members: dict[str, bytes]) -> None:
        data = members["arrays.safetensors"]
        end = 8 + int.from_bytes(data[:8], "little")
        fields = json.loads(data[8:end])
        change(fields)
        text = json.dumps(fields).encode()
        members["arrays.safetensors"] = (length or len(text)).to_bytes(8, "little") + text + data[end:]

    return forge


def respell(members: dict[str, bytes], was: bytes, now: bytes) -> None:
    assert was in members["bundle.json"]
    members["bundle.json"] = members["bundle.json"].replace(was, now)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(format="other"), "its format is not 'featx-bundle'"),
        (edit(format_version=4), "made by a newer featx: expected format_version up to 3, found 4"),
        (edit(format_version=True), "it has no format_version"),
        (edit(class_names=["a", "b"]), "does not give its golden|has the shape"),
        (edit(class_names=["a", "a", "b"]), "class_names is not a list"),
        (edit(kind="zca"), "its normaliser is unknown"),
        (edit(kind="none"), "does not give its golden values: expected differences up to 1e-06"),
        (edit(sharpness=2.0), "does not give its golden values"),
        (edit(sharpness="1"), "sharpness is '1'"),
        (edit(threshold=-1), "threshold is -1"),
        (edit(threshold=10**400), "threshold is 1000"),
        (edit(sharpness=10**400), "sharpness is 1000"),
        (edit(max_error=10**400), "max_error is 1000"),
        (edit(max_error=None), "max_error is null"),
        (edit(max_unknown=1), "max_unknown is 1"),
        (edit(max_unknown=-0.1), "max_unknown is -0.1"),
        (edit(max_unknown="0"), "max_unknown is '0'"),
        (without("max_unknown"), "max_unknown is missing"),
        (put(own_rows=None), "own_rows is missing|its arrays are"),
        (put(own_similarity=None), "own_similarity is missing|its arrays are"),
        (put(own_rows=np.zeros((4, 12))), "own_rows is float64 of shape"),
        (put(own_rows=np.zeros((4, 11), np.float16)), "own_rows has the shape"),
        (put(own_rows=np.zeros((1, 12), np.float16)), "own_rows are not two or more rows of unit length"),
        (put(own_rows=np.full((4, 12), 1, np.float16)), "own_rows are not two or more rows of unit length"),
        (put(own_rows=np.full((4, 12), np.inf, np.float16)), "own_rows is not finite"),
        (put(own_similarity=np.array([0.5, 0.4])), "own_similarity are not ascending cosines"),
        (put(own_similarity=np.array([0.5, 1.5])), "own_similarity are not ascending cosines"),
        (put(own_similarity=np.array([0.5, np.nan])), "own_similarity is not finite"),
        (edit(notes=["\ud800"]), "not a valid model"),
        (edit(class_names=["\ud800", "b", "c"]), "not a valid model"),
        (lambda members: respell(members, b'"head": "logreg"', b'"head": 1e999'), "not a valid model"),
        (lambda members: respell(members, b'"C": 316.0', b'"C": 1e999'), "not a valid model"),
        (edit(n_neighbors=3), "rows is missing|its arrays are"),
        (edit(layer="features.3"), "its layer is not one of the provenance's"),
        (edit(provenance=[]), r"provenance is \[\]"),
        (edit(format_version=2), "'arrays.safetensors' does not belong in it"),
        (lambda members: members.pop("probe.png"), "probe.png is missing"),
        (lambda members: members.update({"extra.npy": b""}), "'extra.npy' does not belong in it"),
        (lambda members: members.update({"bundle.json": b"{"}), "not a valid model"),
        (lambda members: members.update({"bundle.json": b"[" * 100_000}), "not a valid model"),
        (lambda members: members.update({"bundle.json": b"\xff"}), "not a valid model"),
        (lambda members: members.update({"coef.npy": b""}), "'coef.npy' does not belong in it"),
        (lambda members: members.pop("arrays.safetensors"), "arrays.safetensors is missing"),
        (lambda members: members.update({"arrays.safetensors": b""}), "not a valid model: .*header too small"),
        (lambda members: members.update({"arrays.safetensors": b"\xff" * 99}), "not a valid model: .*header too large"),
        (put(extra=np.zeros(3)), "'extra' does not belong in it"),
        (put(coef=None), "its arrays are"),
        (put(coef=np.zeros((3, 12), np.float32)), "coef is float32 of shape"),
        (put(coef=np.zeros((3, 12), np.float16)), "coef is float16 of shape"),
        (put(coef=np.zeros(36)), r"coef is float64 of shape \(36,\), not 2-dimensional f8"),
        (put(coef=np.zeros((3, 11))), "coef has the shape"),
        (put(coef=np.full((3, 12), np.nan)), "coef is not finite"),
        (put(coef=np.zeros((3, 12))), "does not give its golden values"),
        (put(mean=np.zeros((0,))), r"mean is float64 of shape \(0,\)"),
        (header(lambda fields: None, length=2**62), "not a valid model: .*header"),
        (header(lambda fields: None, length=2**24), "not a valid model: .*header"),
        (header(lambda fields: fields["coef"].update(shape=[2**40, 2**40])), "not a valid model"),
        (header(lambda fields: fields["coef"].update(shape=[-3, -12])), "not a valid model"),
        (header(lambda fields: fields["coef"].update(dtype="BF16", shape=[144])), "not a valid model"),
        (header(lambda fields: fields["coef"].update(dtype="O")), "not a valid model"),
        (header(lambda fields: fields["coef"].update(data_offsets=[0, 2**60])), "not a valid model"),
        (
            header(lambda fields: fields["coef"].update(data_offsets=fields["mean"]["data_offsets"])),
            "not a valid model",
        ),
    ],
)
def test_what_is_sealed_but_wrong_is_refused(raw: bytes, change: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_bundle(sealed(raw, change), WHERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: members.pop("coef.npy"), "its arrays are"),
        (lambda members: members.update({"extra.npy": b""}), "'extra.npy' does not belong in it"),
        (lambda members: members.update({"arrays.safetensors": b""}), "'arrays.safetensors' does not belong in it"),
        (edit(format_version=3), "arrays.safetensors is missing"),
        (put_npy(coef=np.zeros((3, 12), np.float32)), "coef is float32 of shape"),
        (put_npy(coef=np.zeros((3, 11))), "coef has the shape"),
        (put_npy(own_similarity=np.zeros(3)), "own_rows|its arrays are|is not a .npy"),
        (put_npy(own_rows=np.zeros((3, 12), np.float16)), "own_rows is not a .npy as featx wrote it"),
        (put_npy(coef=np.full((3, 12), np.nan)), "coef is not finite"),
        (put_npy(coef=np.zeros((3, 12))), "does not give its golden values"),
        (put_npy(coef=np.array([["os.system"]], dtype=object)), "coef is not a .npy as featx wrote it"),
        (put_npy(mean=np.zeros((0,))), "buffer size|is float64 of shape"),
        (lambda members: members.update({"coef.npy": members["coef.npy"][:-8]}), "does not have the length"),
    ],
)
def test_what_is_sealed_but_wrong_in_an_old_model_is_refused(change: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_bundle(sealed((TESTS / "golden" / "v1.model").read_bytes(), change), WHERE)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_sealed_nonsense_is_refused_or_harmless(raw: bytes, data: st.DataObject) -> None:
    raw = data.draw(st.sampled_from([raw, (TESTS / "golden" / "v1.model").read_bytes()]))
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        names = file.namelist()
        fields = json.loads(file.read("bundle.json"))
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(fields)))
        values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists)
        change = edit(**{key: data.draw(values)})
    else:
        name = data.draw(st.sampled_from(names))

        def change(members: dict[str, bytes]) -> None:
            member = bytearray(members[name])
            member[data.draw(st.integers(0, len(member) - 1))] ^= data.draw(st.integers(1, 255))
            members[name] = bytes(member)

    try:
        bundle = parse_bundle(sealed(raw, change), WHERE)
    except BundleError:
        return
    assert len(bundle.answer(bundle.golden)) == 8


def test_compressed_members_are_refused(raw: bytes) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bundle.json", b" " * 1_000_000)
        file.comment = b"sha256=" + b"0" * 64
    body = out.getvalue()[:-71]
    with pytest.raises(BundleError, match="compressed"):
        parse_bundle(body + b"sha256=" + hashlib.sha256(body).hexdigest().encode(), WHERE)


def marked(raw: bytes, offset: int, value: int) -> bytes:
    """The bundle with two bytes of every member's header changed, in both places where ZIP files have one."""
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        infos = file.infolist()
        places = [file.start_dir + offset + 2]
        for info in infos[:-1]:
            places.append(places[-1] + 46 + len(info.filename) + len(info.extra) + len(info.comment))
    body = bytearray(raw[:-71])
    for place in [info.header_offset + offset for info in infos] + places:
        body[place : place + 2] = value.to_bytes(2, "little")
    return bytes(body) + b"sha256=" + hashlib.sha256(body).hexdigest().encode()


@pytest.mark.parametrize(("offset", "value"), [(4, 99), (6, 1), (6, 0x20), (6, 0x40), (8, 97)])
def test_encrypted_members_and_zips_of_the_future_are_refused(raw: bytes, offset: int, value: int) -> None:
    assert parse_bundle(marked(raw, 4, 20), WHERE)  # the version that they have anyway
    with pytest.raises(BundleError, match="not a valid model"):
        parse_bundle(marked(raw, offset, value), WHERE)


@pytest.mark.slow
@pytest.mark.parametrize("decode", [None, 3, "full", ["mode"], {"mode": 3}, {"mode": None}])
def test_a_model_that_was_decoded_in_no_known_way_names_the_field(raw: bytes, decode: Any) -> None:
    provenance = {**network_provenance(), "decode": decode}
    bundle = parse_bundle(sealed(raw, edit(provenance=provenance)), WHERE)
    with pytest.raises(MismatchError, match="another decode"):
        open_embedder(bundle, WHERE, engine="torch", device="cpu")


def network_provenance() -> dict[str, Any]:
    network = load_backbone("resnet18", weights="none")
    return provenance_of(network, make_engine(network, engine="torch", device="cpu", precision="fp32"))


def test_foreign_files_are_refused_with_a_hint(tmp_path: Path, featx: Featx) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "a.joblib").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    for name, message in [
        ("a.joblib", "looks like a pickle"),
        ("a.jpg", "not a model made by featx fit"),
        ("folder", "this is a folder, not a model: expected a file made by featx fit. Make one with: featx fit"),
        ("store", "this is a store, not a model: expected a file made by featx fit. Fit a head on it first"),
        ("missing", "no such model. Make it with"),
    ]:
        with pytest.raises(BundleError, match=message):
            read_bundle(tmp_path / name)
    done = featx("predict", tmp_path / "a.joblib", tmp_path / "a.jpg", "--json")
    assert (done.code, done.json["exit_code"]) == (2, 2)
    assert not (tmp_path / "ran").exists()


def test_reading_imports_neither_torch_nor_scikit_learn(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(raw)
    code = (
        "import sys; from featx.models.bundle import read_bundle; b = read_bundle(sys.argv[1]); b.answer(b.golden)\n"
        "print([n for n in ('torch', 'sklearn', 'pickle5', 'joblib', 'fastapi') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path / "a.model"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
