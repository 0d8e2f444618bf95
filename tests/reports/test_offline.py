"""A model as one page, in a real browser without a network: the answers of featx, or none."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx
from modelkit import clusters, make_bundle
from PIL import Image
from webdriver import Browser, driver, missing

from featx.heads.catalogue import make_head
from featx.models import Bundle, Exported, read_bundle
from featx.models.bundle import write_bundle
from featx.models.examples import Labelled
from featx.models.onnx.model import Compared
from featx.models.onnx.web import WebRuntime, web_runtime
from featx.reports.offline import render_offline

RUNTIME = os.environ.get("FEATX_ORT_WEB", "")
needs_a_browser = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")
needs_the_runtime = pytest.mark.skipif(
    not RUNTIME, reason="FEATX_ORT_WEB does not name a folder with onnxruntime-web (npm pack onnxruntime-web)"
)

READY = "document.getElementById('health').textContent == 'ready'"
REFUSES = "document.getElementById('health').textContent == 'does not answer'"
DONE = "!document.querySelector('.card[data-state=waiting]') && document.querySelectorAll('.card').length == {}"
PROOF = "return document.getElementById('proof').textContent"
TABLE = """return new Promise((done) => {
  const make = URL.createObjectURL;
  URL.createObjectURL = (blob) => { URL.createObjectURL = make; blob.text().then(done); return make(blob); };
  document.getElementById("csv").click();
})"""

NO_HOST = "--host-resolver-rules=MAP * ~NOTFOUND"
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("chrome")
    with driver(folder) as url:
        yield url, folder


@pytest.fixture(scope="module")
def browser(chrome: tuple[str, Path]) -> Iterator[Browser]:
    made = Browser(chrome[0], chrome[1] / "profile", (1000, 900), network=True, more=(NO_HOST, *CAMERA))
    yield made
    made.close()


@pytest.fixture(scope="module")
def kept(photos: Path, tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    """A place with ``photos`` of two classes, and a store, a model and a page of them at int8 and at fp32."""
    here = tmp_path_factory.mktemp("offline")
    for kind in ("ants", "bees"):
        (here / "photos" / kind).mkdir(parents=True)
        for path in sorted((photos / "hymenoptera" / "train" / kind).iterdir())[:24]:
            (here / "photos" / kind / path.name).symlink_to(path)
    for kind in ("int8", "fp32"):
        store, model, page = (here / f"{kind}.{suffix}" for suffix in ("featx", "model", "html"))
        assert featx("extract", here / "photos", "--out", store, "--precision", kind).code == 0
        assert featx("fit", store, "--out", model, "--head", "ridge").code == 0
        ran = featx(
            "export", model, "--format", "html", "--out", page, "--runtime", RUNTIME, "--store", store, "--json"
        )
        assert ran.code == 0, ran.err
        assert ran.json["bytes"] == page.stat().st_size < (10e6 if kind == "int8" else 23e6)
        assert ran.json["examples"] == 10 and "10 example photos in the file" in ran.err
    return here


def show(browser: Browser, page: Path, *files: Path, ready: str = READY) -> None:
    """Open a page, and choose photos once it is ready."""
    browser.open(page.as_uri())
    browser.wait(ready)
    if files:
        browser.choose("#files", *files)
        browser.wait(DONE.format(len(files)), seconds=200)


def rows(browser: Browser) -> dict[str, dict[str, str]]:
    """The page's table, by the file's name."""
    return {row["file"]: row for row in csv.DictReader(io.StringIO(browser.run(TABLE)))}


def block(page: Path, name: str) -> bytes:
    """What a block of the page holds."""
    found = re.search(rf'<script type="text/plain" id="{name}">(.*?)</script>', page.read_text())
    assert found
    return gzip.decompress(base64.b64decode(found[1]))


def with_block(page: Path, name: str, content: bytes) -> str:
    """The page with another block."""
    packed = base64.b64encode(gzip.compress(content, 1)).decode()
    return re.sub(rf'(<script type="text/plain" id="{name}">).*?(</script>)', rf"\g<1>{packed}\g<2>", page.read_text())


@needs_a_browser
@needs_the_runtime
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp32"])
def test_the_page_answers_as_predict_does_and_asks_nobody(
    kind: str, kept: Path, photos: Path, browser: Browser, featx: Featx
) -> None:
    asked = [
        *sorted((photos / "hymenoptera" / "val").rglob("*.jpg"))[:: 2 if kind == "int8" else 4],
        *sorted((photos / "dtd10").rglob("*.jpg"))[:: 25 if kind == "int8" else 50],
    ]
    assert len({path.name for path in asked}) == len(asked)
    expected = featx("predict", kept / f"{kind}.model", *asked, "--json").json["predictions"]
    page = kept / f"{kind}.html"
    browser.requests()
    browser.log()
    show(browser, page, *asked)
    assert browser.run(PROOF) == "This file gives the same answers as when it was made."
    found = [rows(browser)[path.name] for path in asked]
    assert all(not row["error"] for row in found)
    same = [row["label"] == each["label"] for row, each in zip(found, expected, strict=True)]
    unknown = [(row["reason"] == "unknown") == (each["reason"] == "unknown")
               for row, each in zip(found, expected, strict=True)]  # fmt: skip
    assert np.mean(same) >= 0.99 and np.mean(unknown) >= 0.98
    gaps = [abs(float(row["score"]) - each["score"]) for row, each in zip(found, expected, strict=True)]
    assert max(gaps) < (0.1 if kind == "int8" else 1e-4)
    assert {each["reason"] for each in expected} >= {None, "unknown"}  # it was not all the same
    assert browser.requests() == [page.as_uri()]  # the page itself, and no other thing
    assert browser.log() == []  # nor did its policy have to forbid any


@needs_a_browser
@needs_the_runtime
@pytest.mark.slow
@pytest.mark.alone
def test_an_answer_takes_less_than_a_third_of_a_second(kept: Path, photos: Path, browser: Browser) -> None:
    asked = sorted((photos / "hymenoptera" / "val" / "bees").iterdir())[:15]
    show(browser, kept / "int8.html")
    browser.run(
        "window.ended = [performance.now()]; new MutationObserver((all) => all.forEach((each) => "
        "{ if (each.target.dataset.state == 'done') window.ended.push(performance.now()); }))"
        ".observe(document.getElementById('results'), {subtree: true, attributeFilter: ['data-state']})"
    )
    browser.choose("#files", *asked)
    browser.wait(DONE.format(len(asked)))
    ended = browser.run("return window.ended")
    assert len(ended) == len(asked) + 1
    assert statistics.median(np.diff(ended[1:])) < 300


@needs_a_browser
@needs_the_runtime
@pytest.mark.slow
def test_large_photos_and_odd_files(kept: Path, photos: Path, browser: Browser, featx: Featx, tmp_path: Path) -> None:
    original = Image.open(sorted((photos / "hymenoptera" / "val" / "bees").iterdir())[4]).convert("RGB")
    width, height = original.size
    large = original.resize((6 * width, 6 * height), Image.Resampling.LANCZOS)
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    large.save(tmp_path / "1.jpg", quality=90)
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        large.transpose(turn).save(tmp_path / f"{orientation}.jpg", quality=90, exif=exif)
    clear = original.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(original.size))
    clear.save(tmp_path / "clear.png")
    original.convert("L").save(tmp_path / "grey.png")
    original.save(tmp_path / "photo.webp", lossless=True)
    original.resize((9, 700)).save(tmp_path / "thin.png")
    good = sorted(tmp_path.iterdir())
    bad = [tmp_path / name for name in ("empty.jpg", "text.jpg", "half.jpg", "iphone.heic", "pixel.png")]
    for path, content in zip(
        bad, (b"", b"no photo", (tmp_path / "1.jpg").read_bytes()[:200], b"\0" * 50), strict=False
    ):
        path.write_bytes(content)
    original.resize((1, 1)).save(bad[-1])
    expected = featx("predict", kept / "fp32.model", *good, "--json").json["predictions"]
    show(browser, kept / "fp32.html", *good, *bad)
    found = rows(browser)
    for path, each in zip(good, expected, strict=True):
        row = found[path.name]
        assert (row["label"], row["reason"]) == (each["label"], each["reason"] or ""), path.name
        assert float(row["score"]) == pytest.approx(each["score"], abs=0.02 if path.stem.isdigit() else 0.005), (
            path.name
        )
    assert "The file is empty" in found["empty.jpg"]["error"]
    assert "less than 2 pixels" in found["pixel.png"]["error"]
    for name in ("text.jpg", "half.jpg", "iphone.heic"):
        assert "cannot read the file as a photo" in found[name]["error"]
    assert "save it as JPEG" in found["iphone.heic"]["error"]
    assert browser.run("return document.querySelectorAll('.card.failed').length") == len(bad)


@needs_a_browser
@needs_the_runtime
@pytest.mark.slow
def test_a_page_that_answers_otherwise_answers_nothing(
    kept: Path, photos: Path, browser: Browser, tmp_path: Path
) -> None:
    page, photo = kept / "int8.html", sorted((photos / "hymenoptera" / "val" / "bees").iterdir())[0]
    model = json.loads(block(page, "model"))
    model["proof"]["probabilities"] = model["proof"]["probabilities"][::-1]
    text = page.read_text()
    at = text.index('id="graph">') + 20_000
    cases = {
        "another proof": (with_block(page, "model", json.dumps(model).encode()), "does not give the answers"),
        "another network": (with_block(page, "graph", block(kept / "fp32.html", "graph")[:-1000]), "cannot be run"),
        "a flipped character": (text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :], "cannot be run"),
    }
    for name, (content, message) in cases.items():
        bad = tmp_path / f"{name}.html"
        bad.write_text(content)
        show(browser, bad, photo, ready=REFUSES)
        assert message in browser.run(PROOF), name
        assert browser.run("return document.getElementById('drop').disabled"), name
        assert browser.run("return document.querySelectorAll('.bars').length") == 0
        assert rows(browser)[photo.name]["error"] == "Not looked at: see above."
    changed = tmp_path / "script.html"
    changed.write_text(text.replace("async function predict(", "async  function predict("))
    browser.log()
    browser.open(changed.as_uri())
    complaints, until = browser.log(), time.monotonic() + 20
    while not complaints and time.monotonic() < until:
        time.sleep(0.1)
        complaints = browser.log()
    assert any("Content Security Policy" in line for line in complaints), complaints
    assert "a changed file does not run" in browser.run(PROOF)
    assert not browser.run(f"return {READY}")


HOSTILE = ("</script><script>window.pwned = 1</script>", "<img src=x onerror='window.pwned = 1'>", "__proto__", "=1+1")


@needs_a_browser
@needs_the_runtime
@pytest.mark.slow
def test_names_are_text(kept: Path, photos: Path, browser: Browser, featx: Featx, tmp_path: Path) -> None:
    bundle = read_bundle(kept / "int8.model")
    photo = sorted((photos / "hymenoptera" / "val" / "ants").iterdir())[2]
    for number in (0, 2):
        names = HOSTILE[number : number + 2]
        model = tmp_path / "{{ 1 }}<b>&quot;.model"
        write_bundle(replace(bundle, class_names=names), model)
        page = tmp_path / f"{number}.html"
        ran = featx("export", model, "--format", "html", "--out", page, "--runtime", RUNTIME)
        assert ran.code == 0, ran.err
        assert "shows no examples" in ran.err
        copy = tmp_path / "<img src=x onerror='window.pwned = 1'>.jpg"
        copy.write_bytes(photo.read_bytes())
        show(browser, page, copy)
        assert browser.run("return document.title") == "{{ 1 }}<b>&quot;"
        assert browser.run("return document.getElementById('about').textContent") == ", ".join(names)
        labels = "return [...document.querySelectorAll('.bars .label')].map((each) => each.textContent)"
        assert set(browser.run(labels)) == set(names)
        assert browser.run("return window.pwned === undefined && !document.querySelector('main b, h1 b')")
        (row,) = rows(browser).values()
        assert row["label"].lstrip("'") in names and row["file"] == copy.name
        assert browser.run("return document.querySelectorAll('.near').length") == 0


@needs_a_browser
@needs_the_runtime
@pytest.mark.slow
def test_examples_camera_keyboard_and_a_phone(kept: Path, photos: Path, browser: Browser, tmp_path: Path) -> None:
    page, example = kept / "int8.html", sorted((kept / "photos" / "ants").iterdir())[0]
    show(browser, page, sorted((photos / "hymenoptera" / "val" / "bees").iterdir())[0], example)
    images = "[...document.querySelectorAll('.near img')]"
    browser.wait(f"{images}.length == 10 && {images}.every((each) => each.naturalWidth == 160)")
    scores = browser.run("return [...document.querySelectorAll('.near .score')].map((each) => each.textContent)")
    values = [float(text.split()[1]) for text in scores]
    assert values[:5] == sorted(values[:5], reverse=True) and values[5:] == sorted(values[5:], reverse=True)
    assert b"ants/" not in block(page, "model") and b".jpg" not in block(page, "model")  # no names of files
    # By keyboard to the camera, a photo from it, and out again.
    browser.run("document.getElementById('camera').focus()")
    browser.press("\ue007")
    browser.wait("document.getElementById('view').videoWidth > 0")
    assert browser.run("return document.activeElement.id") == "take"
    browser.press("\ue007")
    browser.wait(DONE.format(3))
    assert rows(browser)["camera-1.png"]["error"] == ""
    browser.press("\ue00c")
    assert browser.run("return document.getElementById('viewer').hidden && document.activeElement.id == 'camera'")
    names = browser.run(
        "return [...document.querySelectorAll('button:not([hidden]), select, video, img:not(.card > img)')]"
        ".map((each) => each.ariaLabel || each.textContent.trim() || each.alt)"
    )
    assert all(names)
    shots = Path(os.environ.get("FEATX_SCREENSHOTS") or tmp_path)
    assert browser.screenshot(shots / "offline.png").stat().st_size > 10_000
    browser.resize(390, 800)
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 23)"
    browser.screenshot(shots / "offline-phone.png")
    browser.devtools("Emulation.setEmulatedMedia", features=[])
    browser.resize(1000, 900)


@needs_the_runtime
@pytest.mark.slow
def test_what_cannot_be_exported_as_a_page(kept: Path, featx: Featx, tmp_path: Path) -> None:
    model, page = kept / "int8.model", tmp_path / "a.html"
    empty = {"FEATX_CACHE": str(tmp_path / "cache")}
    ran = featx("export", model, "--format", "html", "--out", page, env=empty)
    assert ran.code == 2 and "onnxruntime-web, which runs the model in a browser, is not on this machine" in ran.err
    assert "--runtime npm" in ran.err
    (tmp_path / "own.html").write_text("<p>mine</p>")
    runtime = ("--runtime", RUNTIME)
    for options, message in [
        ((*runtime, "--part", "head"), "a page holds the whole model"),
        ((*runtime, "--source", tmp_path), "--source goes with --store"),
        ((*runtime, "--store", kept / "fp32.featx"), "do not belong together"),
        (
            (*runtime, "--store", kept / "int8.featx", "--source", tmp_path / "gone"),
            "the images of the store, which are to be shown, are not there",
        ),
        (("--runtime", tmp_path), "no onnxruntime-web in this folder"),
        ((*runtime, "--out", tmp_path / "own.html"), "there is a file of this name already"),
    ]:
        ran = featx("export", model, "--format", "html", "--out", page, *options)
        assert ran.code == 2 and message in ran.err, ran.err
        assert not page.exists()
    for option in ("--runtime", "--store"):
        ran = featx("export", model, "--format", "onnx", "--out", tmp_path / "a.onnx", option, tmp_path)
        assert ran.code == 2 and "only for a page" in ran.err
    (tmp_path / "elsewhere").mkdir()
    store = ("--store", kept / "int8.featx")
    ran = featx(
        "export", model, "--format", "html", "--out", page, *runtime, *store, "--source", tmp_path / "elsewhere"
    )
    assert ran.code == 0 and "0 example photos in the file. 10 pictures of the store are gone" in ran.err
    ran = featx("export", model, "--format", "html", "--out", page, *runtime, *store, "--examples", 0, "--json")
    assert ran.code == 0 and ran.json["examples"] == 0
    assert json.loads(block(page, "model"))["examples"] == []


def small() -> tuple[Bundle, Exported]:
    """A bundle of three classes on nothing that sees, and a graph that is none."""
    embeddings, labels = clusters()
    bundle = make_bundle(make_head("ridge").fit(embeddings, labels), embeddings)
    preprocess = {"resize": 256, "crop": [224, 224]}
    bundle = replace(bundle, provenance={**bundle.provenance, "preprocess": preprocess, "precision": "fp32"})
    return bundle, Exported(b"graph", Compared(1, 1.0, 1.0, 0.0, 0.0, 1.0), 0.02)


LOADER = (
    "const a=1,b=2,$c=3;export{a as env,b as InferenceSession,$c as Tensor,a as default};\n//# sourceMappingURL=x.map\n"
)


def test_the_policy_allows_the_pages_own_scripts_only() -> None:
    bundle, exported = small()
    page = render_offline(bundle, exported, WebRuntime("1.30.0", LOADER, b"\0asm", Path()), title="a")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == allowed["connect-src"] == allowed["base-uri"] == allowed["form-action"] == "'none'"
    assert re.fullmatch(r"('sha256-[\w+/=]{44}' ){2}'wasm-unsafe-eval'", allowed["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/=]{44}'", allowed["style-src"])
    assert allowed["img-src"] == "blob: data:"
    assert set(allowed) == {
        "default-src",
        "script-src",
        "style-src",
        "img-src",
        "connect-src",
        "base-uri",
        "form-action",
    }
    assert "globalThis.ort = {InferenceSession: b, Tensor: $c, env: a};" in page and "sourceMappingURL" not in page
    assert "Copyright (c) Microsoft Corporation" in page and "Permission is hereby granted" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert page.encode()[:1024].count(b'<meta name="generator" content="featx">') == 1  # as check_file looks for it


def test_that_it_is_sure_of_nothing_is_said_beside_its_answers() -> None:
    bundle, exported = small()
    runtime = WebRuntime("1.30.0", LOADER, b"\0asm", Path())
    page = render_offline(replace(bundle, threshold=None), exported, runtime, title="a")
    assert "Every answer of this model abstains" in page.partition("<footer>")[0]
    page = render_offline(replace(bundle, threshold=0.5), exported, runtime, title="a")
    assert "Every answer of this model abstains" not in page


@pytest.mark.parametrize(
    "loader",
    ["", "export{a as env};", LOADER.replace("const", "/*</SCRIPT>*/const"), LOADER + "more();", "<!--" + LOADER],
)
def test_a_loader_of_another_form_is_refused(loader: str) -> None:
    bundle, exported = small()
    with pytest.raises(Exception, match="of a form that featx does not know"):
        render_offline(bundle, exported, WebRuntime("1.30.0", loader, b"\0asm", Path()), title="a")


@needs_the_runtime
def test_the_runtime_of_ci_is_the_published_one() -> None:
    assert web_runtime(RUNTIME).version == "1.30.0"


def test_examples_stand_for_their_class() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(4, 16) * 10
    embeddings = np.concatenate(
        [centre + rng.normal(size=(n, 16)) for centre, n in zip(centres, (12, 5, 3, 2), strict=True)]
    )
    labels = ["a"] * 20 + ["b"] * 2
    digests = rng.integers(0, 256, (22, 32), dtype=np.uint8)
    digests[1] = digests[0]  # a copy
    made: Any = Labelled(np.arange(22).astype(str), labels, digests, embeddings.astype(np.float32), 0, [])
    chosen = made.examples(3, ["a", "b", "c"])
    assert [labels[row] for row in chosen] == ["a", "a", "a", "b", "b"]
    parts = np.repeat(np.arange(4), (12, 5, 3, 2))
    assert parts[chosen[:3]].tolist() == [0, 1, 2]  # the greatest part of a class first, then what is unlike it
    every = made.examples(50, ["a"])
    assert len(every) == 19 == len(set(every)) and 1 not in every
