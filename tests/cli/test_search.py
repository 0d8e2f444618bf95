"""search, evaluate-retrieval and duplicates as processes."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import Featx, Ran, class_folders, picture
from PIL import Image

from featx.cli.main import app
from featx.errors import FeatxError
from featx.reports.page import breakable
from featx.store.reader import read_features


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of two classes; a copy across the splits, and one of other bytes but equal pixels."""
    root = tmp_path_factory.mktemp("search") / "photos"
    class_folders(root / "train", each=5)
    class_folders(root / "test", each=5, first=50)
    shutil.copy(root / "train" / "ants" / "000.png", root / "test" / "bees" / "copy.png")
    Image.open(root / "train" / "bees" / "007.png").save(root / "train" / "bees" / "again.bmp")
    return root


@pytest.fixture(scope="module")
def store(source: Path, featx: Featx) -> Path:
    out = source.parent / "photos.featx"
    ran = featx("extract", source, "--out", out)
    assert ran.code == 0, ran.err
    return out


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Featx:
    """The command in this process, which is quicker; errors as ``main`` ends with them."""

    def run(*arguments: object, **_: object) -> Ran:
        try:
            code = app([*map(str, arguments)], standalone_mode=False)
        except FeatxError as error:
            print(f"Error: {error}", file=sys.stderr)
            code = error.exit_code
        return Ran(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    @property
    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(text.split(",", 1)[1]))) for text in sources]

    def check_alone(self) -> None:
        """Nothing is run, nothing is loaded."""
        assert not {tag for tag, _ in self.tags} & {"script", "link", "iframe", "object", "base", "form"}
        for _, attributes in self.tags:
            for name, value in attributes.items():
                assert name not in ("href", "srcset", "style") or not value
                assert not name.startswith("on")
                if name == "src":
                    assert (value or "").startswith("data:image/jpeg;base64,")


def test_in_a_pipe_a_name_is_in_one_line(store: Path, tmp_path: Path, featx: Featx) -> None:
    query = tmp_path / ("a name that is far too long for eighty columns " * 3 + ".png")
    picture(77).save(query)
    ran = featx("search", store, query, env={"COLUMNS": ""})
    assert any(str(query) in line and "train/" in line for line in ran.out.splitlines()), ran.out


@pytest.mark.slow
def test_an_id_a_file_and_a_folder(source: Path, store: Path, tmp_path: Path, featx: Featx) -> None:
    new = tmp_path / "new"
    new.mkdir()
    image = Image.open(source / "train" / "ants" / "002.png")
    image.resize((80, 60)).save(new / "larger.png")
    picture(77).save(new / "other.jpg", quality=95)
    ran = featx("search", store, "train/bees/007.png", source / "test" / "ants" / "051.png", new, "-k", 3, "--json")
    assert ran.code == 0, ran.err
    found = ran.json["results"]
    names = [each["query"] for each in found]
    assert names == [
        "train/bees/007.png",
        str(source / "test" / "ants" / "051.png"),
        str(new / "larger.png"),
        str(new / "other.jpg"),
    ]
    assert all(len(each["matches"]) == 3 for each in found)
    for each in found:
        scores = [match["score"] for match in each["matches"]]
        assert scores == sorted(scores, reverse=True)
        assert all(match["label"] in ("ants", "bees") for match in each["matches"])
    by_id, by_file, larger, _ = (each["matches"] for each in found)
    assert by_id[0]["id"] == "train/bees/again.bmp"  # itself is left out
    assert by_id[0]["score"] > 0.9999
    assert by_file[0] == {"id": "test/ants/051.png", "label": "ants", "score": 1.0}  # a file finds itself
    assert larger[0]["id"] == "train/ants/002.png"
    assert (ran.json["method"], ran.json["recall"], ran.json["refused"]) == ("exact", 1.0, [])

    # The scores are the cosines of the embeddings.
    features = read_features(store)
    unit = features.embeddings / np.linalg.norm(features.embeddings, axis=1, keepdims=True)
    row = features.ids.tolist().index("train/bees/007.png")
    order = np.argsort(-(unit @ unit[row]), kind="stable")
    order = order[order != row][:3]
    assert [match["id"] for match in by_id] == features.ids[order].tolist()
    assert np.allclose([match["score"] for match in by_id], (unit @ unit[row])[order], atol=1e-6)
    with_itself = featx("search", store, "train/bees/007.png", "--include-self", "-k", 1, "--json").json
    assert with_itself["results"][0]["matches"][0]["id"] == "train/bees/007.png"


@pytest.mark.slow
def test_images_of_the_store_load_no_network(source: Path, store: Path) -> None:
    code = (
        "import sys; from featx.cli import main as cli\n"
        f"sys.argv = ['featx', 'search', {str(store)!r}, 'test/bees/056.png', "
        f"{str(source / 'train' / 'ants' / '001.png')!r}, '--json']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules, "
        "'openvino' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False False"


def test_copies_are_in_the_order_of_their_ids_and_k_may_be_large(store: Path, here: Featx) -> None:
    matches = here("search", store, "train/bees/007.png", "-k", 1000, "--json").json["results"][0]["matches"]
    assert len(matches) == 21
    twins = [match for match in matches if match["id"] in ("train/ants/000.png", "test/bees/copy.png")]
    assert [match["id"] for match in twins] == ["test/bees/copy.png", "train/ants/000.png"]
    assert twins[0]["score"] == twins[1]["score"]


def test_files_that_are_no_images_are_refused_and_the_others_answered(
    source: Path, store: Path, tmp_path: Path, featx: Featx
) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    whole = (source / "train" / "ants" / "000.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    good = tmp_path / "good.png"
    picture(3).save(good)
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    ran = featx("search", store, tmp_path / "text.jpg", good, tmp_path / "half.png", tmp_path / "link.png", "--json")
    assert ran.code == 3
    assert [each["query"] for each in ran.json["results"]] == [str(good)]
    refused = {Path(each["query"]).name: each["reason"] for each in ran.json["refused"]}
    assert refused == {"text.jpg": "not_an_image", "half.png": "truncated", "link.png": "missing"}
    assert "text.jpg: not_an_image" in ran.err
    only = featx("search", store, tmp_path / "text.jpg", "--html", tmp_path / "none.html")
    assert (only.code, only.err.splitlines()[-1]) == (3, "Error: the image could not be read.")
    assert [line for line in only.out.splitlines() if "Sheet:" not in line] == []  # no table of nothing
    assert ran.err.splitlines()[-1] == "Error: 3 of 4 images could not be read."


def test_the_table_without_json(store: Path, here: Featx) -> None:
    ran = here("search", store, "train/bees/007.png", "-k", 2)
    assert ran.code == 0
    assert "train/bees/again.bmp" in ran.out
    assert "1.000" in ran.out


def test_mistakes(source: Path, store: Path, tmp_path: Path, featx: Featx, here: Featx) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((store, "train/bees/07.png"), "no such file, and no such id in the store. Did you mean train/bees/007.png"),
        ((store, tmp_path / "empty"), "no images in this folder"),
        ((store, "x" * 5000), "no such file, and no such id"),
        ((tmp_path / "nowhere.featx", "a"), "no such store"),
        ((store, "train/bees/007.png", "--layer", "penultima"), "no layer 'penultima'"),
        ((store, "train/bees/007.png", "--whiten", "500"), "expected 1 to 21 axes for 22 images, found 500"),
        ((store, "train/bees/007.png", "--center", "--method", "approximate"), "searched exactly"),
        ((store, "train/bees/007.png", "--html", tmp_path), "a folder is in the way"),
        ((store, "train/bees/007.png", "--html", tmp_path / "no" / "x.html"), "no such folder"),
        ((store, "train/bees/007.png", "--html", tmp_path / "x.html", "--source", tmp_path / "no"), "--source"),
    ):
        ran = here("search", *arguments)
        assert ran.code == 2, ran
        assert words in ran.err
        assert ran.err.count("\n") == 1
    assert set(featx("search", store, "nothing", "--json").json) == {"error", "exit_code"}


@pytest.mark.parametrize("options", [("--center",), ("--whiten", 5), ("--expand", 2), ("--center", "--expand", 3)])
def test_options_keep_the_twin_first(store: Path, here: Featx, options: tuple[object, ...]) -> None:
    (found,) = here("search", store, "train/bees/007.png", "-k", 3, "--json", *options).json["results"]
    assert found["matches"][0]["id"] == "train/bees/again.bmp"
    assert "train/bees/007.png" not in [match["id"] for match in found["matches"]]


def test_names_break_after_what_divides_them() -> None:
    assert breakable("a/b_c-d.png") == "a/<wbr>b_<wbr>c-<wbr>d.<wbr>png"
    assert breakable("<x>&/'") == "&lt;x&gt;&amp;/<wbr>&#39;"
    assert breakable("plain.") == "plain."


def test_the_sheet_shows_queries_and_matches(source: Path, store: Path, tmp_path: Path, featx: Featx) -> None:
    sheet = tmp_path / "alike.html"
    strange = tmp_path / "<b>&.png"
    picture(5, (300, 100)).save(strange)
    ran = featx("search", store, "train/bees/007.png", strange, "-k", 4, "--html", sheet, "--json")
    assert ran.code == 0, ran.err
    text = sheet.read_text()
    page = Page(text)
    page.check_alone()
    assert [image.size for image in page.pictures] == [(160, 160)] * 10
    assert "&lt;b&gt;&amp;.png" in text
    assert "<b>&" not in text
    for each in ran.json["results"]:
        for match in each["matches"]:
            assert f"<code>{breakable(match['id'])}</code>" in text
            assert f"{match['label']}, {match['score']:.3f}" in text
    # The picture is the picture: the thumbnail of the query is the query.
    own = np.asarray(Image.open(source / "train/bees/007.png").resize((213, 160)).crop((26, 0, 186, 160)), float)
    assert np.abs(np.asarray(page.pictures[0], float) - own).mean() < 8


@pytest.mark.slow
def test_what_cannot_be_shown_says_why(source: Path, tmp_path: Path, here: Featx) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(source / "train", photos)
    out = tmp_path / "s.featx"
    assert here("extract", photos, "--out", out).code == 0
    (photos / "ants" / "001.png").unlink()
    picture(99).save(photos / "ants" / "002.png")
    sheet = tmp_path / "s.html"
    ran = here("search", out, "ants/003.png", "-k", 100, "--html", sheet)
    assert ran.code == 0, ran.err
    assert "2 pictures could not be shown" in ran.err
    assert "the file has changed since it was embedded" in sheet.read_text()
    packed = tmp_path / "s.h5"
    assert here("pack", out, packed).code == 0
    ran = here("search", packed, "ants/003.png", "--html", sheet)
    assert ran.code == 2
    assert "does not know where its images are" in ran.err
    assert here("search", packed, "ants/003.png", "--html", sheet, "--source", photos).code == 0
    Page(sheet.read_text()).check_alone()


def test_evaluate_retrieval(store: Path, featx: Featx) -> None:
    ran = featx("evaluate-retrieval", store, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["queries"] == 22
    assert set(found["recall_at_k"]) == {"1", "5", "10"}
    assert 0 <= found["map"] <= 1
    assert (found["exact_duplicates"], found["queries_with_copies"]) == (1, 2)
    assert set(found["per_class"]) == {"ants", "bees"}
    for name in ("recall_at_1", "map"):
        assert found["intervals"][name]["low"] <= found["intervals"][name]["high"]
    assert found["recall_at_k"]["1"] >= 2 / 22  # the equal pixels under two names find each other
    assert featx("evaluate-retrieval", store, "--json", "--seed", "0").json == found
    ran = featx("evaluate-retrieval", store, "--center", "--expand", "2", "--max-queries", "10")
    assert "1 exact duplicate; copies of a query are left out" in ran.out
    assert "10 of 22 queries drawn" in ran.out
    assert re.search(r"bees +\d+ ", ran.out)


def test_evaluate_retrieval_needs_labels(source: Path, tmp_path: Path, here: Featx) -> None:
    out = tmp_path / "s.featx"
    assert here("extract", source / "train" / "ants", "--out", out).code == 0
    ran = here("evaluate-retrieval", out)
    assert ran.code == 2
    assert "nothing to evaluate: expected at least one class with two different images, found 0 labelled" in ran.err
    found = here("search", out, "001.png", "-k", 2, "--json").json["results"][0]["matches"]
    assert [match["label"] for match in found] == [None, None]


def test_duplicates_across_splits_come_first(store: Path, tmp_path: Path, here: Featx) -> None:
    sheet = tmp_path / "d.html"
    ran = here("duplicates", store, "--threshold", 0.9999, "--html", sheet, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert (found["exact"], found["near"], found["n_groups"]) == (1, 1, 2)
    assert (found["across_splits"], found["conflicting_labels"]) == (1, 1)
    first, second = found["groups"]
    assert first["across_splits"] and first["conflicting_labels"]
    assert [(each["id"], each["split"], each["label"], each["exact"]) for each in first["images"]] == [
        ("test/bees/copy.png", "test", "bees", True),
        ("train/ants/000.png", "train", "ants", True),
    ]
    assert not second["across_splits"] and not second["conflicting_labels"]
    assert [(each["id"], each["exact"]) for each in second["images"]] == [
        ("train/bees/007.png", True),
        ("train/bees/again.bmp", False),
    ]
    assert second["images"][1]["similarity"] > 0.9999
    page = Page(sheet.read_text())
    page.check_alone()
    assert len(page.pictures) == 4
    assert "both sides of a split" in sheet.read_text()
    only = here("duplicates", store, "--exact-only", "--json").json
    assert (only["exact"], only["near"], only["n_groups"]) == (1, 0, 1)
    ran = here("duplicates", store, "--threshold", 0.9999)
    assert "1 exact and 1 near duplicate in 2 groups; 1 group across splits" in ran.out
    assert "Group 1: 2 images, across splits, different labels" in ran.out


@pytest.mark.slow
def test_search_works_without_faiss(store: Path, tmp_path: Path, featx: Featx) -> None:
    """A module of that name that cannot be imported stands before the real one."""
    (tmp_path / "faiss.py").write_text("raise ImportError('hidden')\n")
    hidden = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    arguments = ("search", store, "train/bees/007.png", "--json")
    without, usual = featx(*arguments, env=hidden), featx(*arguments)
    assert without.code == 0, without.err
    assert json.loads(without.out) == json.loads(usual.out)


def test_too_few_images_for_an_approximate_index(store: Path, here: Featx) -> None:
    ran = here("search", store, "train/bees/007.png", "--method", "approximate")
    assert ran.code == 2
    assert "too few images for an approximate index" in ran.err or "needs faiss" in ran.err
    assert not store.with_name("photos.search").exists()
