"""Model cards: what Hugging Face's own reader finds in them, what they say, and names that are no orders."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from conftest import TESTS, Featx
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from modelkit import PROVENANCE, clusters, make_bundle

from featx.errors import visible
from featx.heads.catalogue import make_head
from featx.models.bundle import Bundle, write_bundle
from featx.models.fit import fit_head
from featx.reports.card import as_text, render_card

HOSTILE = (
    "a|b \\| c", "<script>alert(1)</script>", "[x](http://evil.example) ![y](z)", "**bold** _it_ ~~no~~", "`code` \\`",
    "---\nlicense: evil\n---", "$x^2$ $$y$$ &lt;&amp;", "www.evil.example @someone #1", "naïve 猫 😀", "half \ud800",
    "\u202eevil", "end\x00\x1b[31m", "# title", "- item", "yes", "a: b\\",
)  # fmt: skip


def bundle_of(names: tuple[str, ...], *, each: int = 30, **changes: Any) -> Bundle:
    """A fitted and measured head on overlapping clusters, in an order that is not sorted by class."""
    rows, labels = clusters(len(names), each)
    mixed = np.random.default_rng(1).permutation(len(labels))
    rows, labels = rows[mixed], labels[mixed]
    fitted = fit_head(rows, labels, class_names=names, heads=("ridge",))
    plain = make_bundle(make_head("logreg", kind="l2").fit(rows, labels), rows, len(names))
    fields = ("scorer", "class_names", "head", "params", "sharpness", "threshold", "max_error", "max_unknown")
    kept = {name: getattr(fitted, name) for name in (*fields, "familiarity", "metrics", "notes", "conformity")}
    return replace(plain, **{**kept, **changes})


def tables(card: str) -> list[list[list[Token]]]:
    """Each table of a card by rows, each cell as a renderer of Markdown understands it."""
    found: list[list[list[Token]]] = []
    tokens = (
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(card.split("---\n", 2)[2])
    )
    for place, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append(tokens[place + 1])
    return found


def text(cell: Token) -> str:
    assert {child.type for child in cell.children or ()} <= {"text", "text_special"}, cell.children
    return "".join(child.content for child in cell.children or ())


def test_hugging_face_reads_the_front_matter() -> None:
    bundle = bundle_of(("ants", "bees", "wasps"))
    card = render_card(bundle, "insects")
    data: Any = ModelCard(card).data
    found = bundle.metrics["out_of_fold"]
    assert (data.model_name, data.library_name, data.pipeline_tag) == ("insects", "featx", "image-classification")
    values = {each.metric_type: each.metric_value for each in data.eval_results}
    assert values == {"accuracy": found["accuracy"]["mean"], "f1": found["macro_f1"]}
    assert {each.task_type for each in data.eval_results} == {"image-classification"}
    assert data.eval_results[0].dataset_name == "90 photos of 3 classes, each judged by a fit without it"
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert "license" not in front and "base_model" not in front  # a network of one's own
    assert len(front["model-index"][0]["results"]) == 1


@pytest.mark.parametrize(
    ("networks", "licence", "bases"),
    [
        (["efficientnet_lite0"], {"license": "apache-2.0"}, None),
        (["efficientnet_lite0", "efficientnet_lite1", "pixels"], {"license": "apache-2.0"}, None),
        (["resnet18"], {"license": "bsd-3-clause"}, None),
        (["vit_h_14"], {"license": "cc-by-nc-4.0"}, None),
        (["resnet18", "efficientnet_lite0"], {"license": "other", "license_name": "several-see-the-card"}, None),
        (["timm:vit_small_patch14_dinov2.lvd142m"], {"license": "apache-2.0"}, "timm/vit_small_patch14_dinov2.lvd142m"),
        (
            ["timm:vit_small_patch16_dinov3.lvd1689m"],
            {"license": "other", "license_name": "dinov3-license"},
            "timm/vit_s",
        ),
        (["timm:some_net.of_mine"], {}, "timm/some_net.of_mine"),
        (["timm:resnet50"], {}, None),  # which weights these are is for timm to say
        (["mine.py:Mine"], {}, None),
    ],
)
def test_licences_and_networks(networks: list[str], licence: dict[str, str], bases: str | None) -> None:
    each = [{**PROVENANCE, "backbone": name, "weights": "default"} for name in networks]
    provenance = each[0] if len(each) == 1 else {"backbones": each}
    bundle = make_bundle_of(provenance)
    front = yaml.safe_load(render_card(bundle, "m").split("---\n", 2)[1])
    assert {key: front[key] for key in ("license", "license_name") if key in front} == licence
    assert front.get("base_model") == bases or (bases and front["base_model"].startswith(bases))
    assert ("license_link" in front) == (licence.get("license_name") == "dinov3-license")
    own = make_bundle_of({**each[0], "weights": "mine.safetensors"})
    assert not {"license", "base_model"} & yaml.safe_load(render_card(own, "m").split("---\n", 2)[1]).keys()
    given = yaml.safe_load(render_card(own, "m", licence="cc-by-4.0").split("---\n", 2)[1])
    assert given["license"] == "cc-by-4.0"


def make_bundle_of(provenance: dict[str, Any]) -> Bundle:
    rows, labels = clusters(3, 4)
    model = make_head("logreg", kind="l2").fit(rows, labels)
    return make_bundle(model, rows, provenance=provenance)


def test_numbers_are_those_of_the_model() -> None:
    bundle = bundle_of(("ants", "bees", "wasps"), each=15)
    card = render_card(bundle, "insects")
    overall, classes, _ = tables(card)
    found = bundle.metrics["out_of_fold"]
    shown = {text(row[0]): text(row[1]) for row in overall[1:]}
    right = sum(row.get(name, 0) for name, row in found["confusion"].items())
    assert shown["photos"] == "45"
    assert shown["accuracy"].startswith(f"{100 * right / 45:.1f} % (")
    assert shown["always the largest class"] == "33.3 %"
    for row, name in zip(classes[1:], bundle.class_names, strict=True):
        calls = found["confusion"][name]
        assert [text(cell) for cell in row[:2]] == [name, "15"]
        assert text(row[2]).startswith(f"{100 * calls.get(name, 0) / 15:.1f} % (")
        others = {other: n for other, n in calls.items() if other != name}
        assert text(row[3]) == "" if not others else int(text(row[3]).split("(")[1][:-1]) == max(others.values())
    assert "Classes with fewer than 20 photos, of which little is known: ants, bees, wasps." in card
    assert "No photos were kept apart" in card
    assert "of which 45 are different" in card
    test = replace(bundle, metrics={**bundle.metrics, "test": {**found, "images": 7}})
    card = render_card(test, "insects")
    assert "No photos were kept apart" not in card and "7 photos of 3 classes, of the split test" in card
    assert len(yaml.safe_load(card.split("---\n", 2)[1])["model-index"][0]["results"]) == 2


def test_names_are_text_whatever_they_are() -> None:
    bundle = bundle_of(HOSTILE, each=12, prior=dict.fromkeys(HOSTILE, 1 / len(HOSTILE)))
    for name in HOSTILE:
        card = render_card(bundle, name)
        assert card.encode()
        front = yaml.safe_load(card.split("---\n", 2)[1])
        assert front["model-index"][0]["name"] == visible(name)
        assert front["library_name"] == "featx" and "license" not in front
        data: Any = ModelCard(card).data
        assert data.model_name == visible(name)
    _, classes, networks = tables(card)
    assert [text(row[0]) for row in classes[1:]] == [visible(name) for name in HOSTILE]
    assert {len(row) for row in classes} == {4} and len(networks) == 2
    body = card.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
    kinds = {child.type for token in tokens for child in token.children or ()} | {token.type for token in tokens}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "s_open"}
    # What GitHub and Hugging Face take for an address, a formula or a mention, beyond CommonMark.
    assert not re.search(r"(?<!\\)[$@]|[^\\]://|www\.", body)
    assert as_text("grey-cat 2 (old): x.y, 5 %") == "grey-cat 2 (old): x.y, 5 %"


@pytest.mark.parametrize("old", ["v1", "v2"])
def test_old_models_have_a_card(old: str, tmp_path: Path, featx: Featx) -> None:
    ran = featx("card", TESTS / "golden" / f"{old}.model", "--json")
    assert ran.code == 0 and ran.json["path"] is None
    assert ran.json["metadata"]["library_name"] == "featx"
    assert "it keeps no numbers" in ran.json["card"] and "cannot call photos unknown" in ran.json["card"]
    assert yaml.safe_load(ran.json["card"].split("---\n", 2)[1]) == ran.json["metadata"]


def test_the_command_writes_and_replaces_only_cards(tmp_path: Path, featx: Featx) -> None:
    model, out = tmp_path / "insects.model", tmp_path / "README.md"
    write_bundle(bundle_of(("ants", "bees", "wasps")), model)
    for _ in range(2):  # its own card is replaced
        ran = featx("card", model, "--out", out, "--licence", "cc-by-4.0")
        assert ran.code == 0 and "README.md: the card of" in ran.out, ran.err
    card = ModelCard.load(out)
    assert card.data.license == "cc-by-4.0"
    assert featx("card", model, "--licence", "cc-by-4.0").out == out.read_text()
    out.write_text("# mine\n")
    ran = featx("card", model, "--out", out)
    assert ran.code == 2 and "featx did not make it" in ran.err and out.read_text() == "# mine\n"
    assert featx("card", out).code == 2
