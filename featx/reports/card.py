"""The model card of a kept head: Markdown, with the front matter that the Hugging Face hub reads.

All of it is what the model itself knows: how it was made, how good it was on photos that it had not seen, when it
abstains, what it refuses, and what nobody knows. Names of classes may be anything; as text they are not obeyed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featx._arrays import PIXELS
from featx.backbones import list_backbones
from featx.errors import listed, plural, visible
from featx.evaluation import Interval, percent
from featx.store import backbones_of, name_of, title_of

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from featx.models import Bundle

LIBRARY = b"library_name: featx"
"""What the first KiB of every card has in it."""

UNKNOWN_LICENCE = "unknown"

_ON_THE_HUB = {"Apache-2.0": "apache-2.0", "BSD-3-Clause": "bsd-3-clause", "CC-BY-NC-4.0": "cc-by-nc-4.0"}
"""The hub's own names of licences; any other is "other", with a name."""

_DINOV3 = {
    "license_name": "dinov3-license",
    "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
}

_FEW = 20
"""Photos of a class, below which its recall is hardly known."""

_CLASSES_NAMED = 20


def render_card(bundle: Bundle, name: str, *, licence: str | None = None) -> str:
    """The whole card as text.

    Parameters
    ----------
    bundle : the model.
    name : what it is called, such as its file's name without the suffix.
    licence : the hub's name of the licence that the model is given. By default that of its network's weights, where
        it is known.
    """
    body = "\n\n".join(_sections(bundle, name))
    return f"---\n{card_data(bundle, name, licence=licence).to_yaml()}\n---\n\n{body}\n"


def card_data(bundle: Bundle, name: str, *, licence: str | None = None) -> ModelCardData:
    """The front matter; parameters as of :func:`render_card`."""
    from huggingface_hub import EvalResult, ModelCardData

    name = visible(name)
    results = []
    for key, what in (("out_of_fold", "each judged by a fit without it"), ("test", "of the split test")):
        found = bundle.metrics.get(key)
        if found:
            on = f"{plural(found['images'], 'photo')} of {plural(len(bundle.class_names), 'class')}, {what}"
            about: dict[str, Any] = {
                "task_type": "image-classification", "dataset_type": "imagefolder", "dataset_name": on,
                "dataset_split": "test" if key == "test" else "train",
            }  # fmt: skip
            for kind, title, value in (
                ("accuracy", "Accuracy", found["accuracy"]["mean"]),
                ("f1", "Macro-F1", found.get("macro_f1")),
            ):
                if value is not None:
                    results.append(EvalResult(metric_type=kind, metric_name=title, metric_value=value, **about))
    bases = _base_models(bundle)
    return ModelCardData(
        library_name="featx",
        **({"license": licence} if licence else _licence(bundle)),
        base_model=bases[0] if len(bases) == 1 else bases or None,
        pipeline_tag="image-classification",
        tags=["featx", "image-classification", "frozen-features"],
        metrics=["accuracy", "f1"] if results else None,
        model_name=name,
        eval_results=results or None,
    )


def as_text(name: str) -> str:
    """A name as Markdown, in which nothing is obeyed: no table, link, emphasis, HTML, formula or mention."""
    spelt = re.sub(r"[\\`*_\[\]<>&|~!$@#]|:(?=//)", r"\\\g<0>", visible(name))
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", spelt)


def _several(bundle: Bundle) -> list[Mapping[str, Any]]:
    """The provenance of each network; the pixels baseline is none."""
    return [each for each in backbones_of(bundle.provenance) if name_of(each) != PIXELS]


def _licences(bundle: Bundle) -> dict[str, str]:
    """The licence of each network's weights: of the catalogue's, unless they are one's own or random."""
    known = {row.stored_as: row.licence for row in list_backbones()}
    return {
        name_of(each): known.get(str(each.get("backbone")), UNKNOWN_LICENCE)
        if each.get("weights") == "default" else UNKNOWN_LICENCE
        for each in _several(bundle)
    }  # fmt: skip


def _licence(bundle: Bundle) -> dict[str, Any]:
    """Fields of the front matter; none where a licence is not known."""
    found = set(_licences(bundle).values())
    if not found or UNKNOWN_LICENCE in found:
        return {}
    if len(found) > 1:
        return {"license": "other", "license_name": "several-see-the-card"}
    (one,) = found
    if one == "DINOv3":
        return {"license": "other", **_DINOV3}
    return {"license": _ON_THE_HUB[one]} if one in _ON_THE_HUB else {"license": "other", "license_name": one.lower()}


def _base_models(bundle: Bundle) -> list[str]:
    """The hub's names of the networks that are known there: timm's, by their names with the weights' tag."""
    names = [str(each.get("backbone")) for each in _several(bundle) if each.get("weights") == "default"]
    found = [re.fullmatch(r"timm:([A-Za-z0-9_]+\.[A-Za-z0-9_.]+)", name) for name in names]
    return [f"timm/{match[1]}" for match in found if match]


def _sections(bundle: Bundle, name: str) -> Iterator[str]:
    yield f"# {as_text(name)}"
    yield _what(bundle)
    yield "## How it was measured"
    yield from _measured(bundle)
    yield "## By class"
    yield from _by_class(bundle)
    yield "## When it abstains"
    yield "\n".join(f"- {line}" for line in _abstains(bundle))
    yield "## Known limits"
    yield "\n".join(f"- {line}" for line in _limits(bundle))
    yield "## Network and licences"
    yield from _networks(bundle)
    yield "## Use"
    yield "```bash\npip install featx\nfeatx predict MODEL photo.jpg\n```"


def _what(bundle: Bundle) -> str:
    names = listed([as_text(each) for each in bundle.class_names], _CLASSES_NAMED)
    params = ", ".join(f"{as_text(str(key))} {as_text(str(value))}" for key, value in bundle.params.items())
    settings = f" ({params})" if params else ""
    network = as_text(title_of(bundle.provenance))
    tail = ", whose last blocks were trained on these photos," if bundle.tail is not None else ", frozen,"
    return (
        f"Classifies photos into {plural(len(bundle.class_names), 'class')}: {names}. The network {network}{tail} "
        f"makes an embedding of a photo (layer {as_text(bundle.layer)}), and the head {as_text(bundle.head)}{settings} "
        "names its class, with a probability, or says that it is unsure or that the photo is of none."
    )


def _measured(bundle: Bundle) -> Iterator[str]:
    metrics = bundle.metrics
    if metrics.get("images"):
        copies = metrics.get("duplicates") or 0
        different = metrics["images"] - copies
        yield (
            f"Fitted on {plural(metrics['images'], 'photo')}, of which {different:,} are different: copies are kept "
            "together, and count once."
        )
    columns = [
        (title, found)
        for title, found in (("out of fold", metrics.get("out_of_fold")), ("split test", metrics.get("test")))
        if found
    ]
    if not columns:
        yield "How good it is was not measured, or the model does not say: it keeps no numbers."
        return
    meanings = (
        "*Out of fold*: each photo was judged by a head that was fitted without it (cross-validation over groups of "
        "copies).",
        "*Split test*: photos that took no part in fitting or choosing, judged once.",
    )
    there = (metrics.get("out_of_fold"), metrics.get("test"))
    yield " ".join([*(text for text, found in zip(meanings, there, strict=True) if found), "Intervals are of 95 %."])
    if bundle.prior is not None:
        shares = ", ".join(f"{as_text(key)} {100 * share:.3g} %" for key, share in bundle.prior.items())
        yield (
            "All numbers but balanced accuracy and those by class are for photos among which the classes have these "
            f"shares: {shares}."
        )
    rows: Sequence[tuple[str, Any]] = (
        ("photos", lambda found: f"{found['images']:,}"),
        ("accuracy", lambda found: percent(Interval(**found["accuracy"]))),
        ("macro-F1", lambda found: _share(found.get("macro_f1"))),
        ("balanced accuracy", lambda found: _share(found.get("balanced_accuracy"))),
        ("always the largest class", lambda found: _share(found.get("majority_baseline"))),
        ("calibration error (ECE)", lambda found: _share(found.get("ece"))),
        ("log loss", lambda found: _number(found.get("log_loss"))),
        ("Brier score", lambda found: _number(found.get("brier"))),
        ("answered", lambda found: _share(found.get("answered"))),
        ("wrong among these", lambda found: _share(found.get("error_among_answered"))),
        ("sets with the true label", lambda found: _sets(found.get("sets"))),
    )
    yield _table(
        ["", *(title for title, _ in columns)],
        [[title, *(show(found) for _, found in columns)] for title, show in rows],
    )


def _by_class(bundle: Bundle) -> Iterator[str]:
    columns = [
        (title, found["recall_per_class"])
        for title, found in (
            ("out of fold", bundle.metrics.get("out_of_fold")),
            ("split test", bundle.metrics.get("test")),
        )
        if found and found.get("recall_per_class")
    ]
    if not columns:
        yield "Not measured."
        return
    confused = (bundle.metrics.get("out_of_fold") or {}).get("confusion") or {}
    head = ["class", *(text for title, _ in columns for text in (f"photos, {title}", f"recognised, {title}"))]
    rows = []
    for name in bundle.class_names:
        cells = [as_text(name)]
        for _, recalled in columns:
            one = recalled.get(name)
            cells += (
                ["0", "no photo"]
                if one is None
                else [f"{one['images']:,}", percent(Interval(one["recall"], one["low"], one["high"]))]
            )
        others = {other: n for other, n in confused.get(name, {}).items() if other != name}
        worst = max(others, key=lambda other: others[other], default=None)
        cells.append("" if worst is None else f"{as_text(worst)} ({others[worst]})")
        rows.append(cells)
    yield _table([*head, "most often taken for"], rows)


def _abstains(bundle: Bundle) -> Iterator[str]:
    if bundle.threshold is None:
        yield "**Unsure**: every answer abstains, because its photos were too few to promise so few errors."
    elif bundle.sharpness is None:
        yield f"**Unsure**: below a margin of {bundle.threshold:.3f}. Its scores are not probabilities."
    else:
        yield (
            f"**Unsure**: below a probability of {bundle.threshold:.3f}, so that on average at most "
            f"{100 * bundle.max_error:g} % of its answers are wrong, on photos like its own."
        )
    if bundle.sharpness is not None:
        yield "Probabilities are calibrated on photos left out; the calibration error above is what remains."
    unknown = bundle.metrics.get("unknown")
    if not bundle.max_unknown:
        yield "**Unknown**: nothing is refused: it names a class for photos of anything."
        return
    most = f"{100 * bundle.max_unknown:g} %"
    yield f"**Unknown**: on average at most {most} of photos like its own are refused as unlike them."
    if unknown:
        yield f"Of its own photos that it had not seen it refused {percent(Interval(**unknown['own_refused']))}."
        left = unknown.get("class_left_out")
        if left:
            refused = percent(Interval(left["mean"], left["low"], left["high"]))
            yield f"Of the photos of a class that it was not fitted on (each in turn), it refused {refused}."
            name = min(left["per_class"], key=lambda key: left["per_class"][key])
            yield f"Least of {as_text(name)}: {_share(left['per_class'][name])}."


def _limits(bundle: Bundle) -> Iterator[str]:
    metrics = bundle.metrics
    yield (
        "Every number is about photos like those that it was fitted on. Another camera, place, season or selection can "
        "make it worse without a warning."
    )
    yield "Promises hold on average over photos, not for each class and not for each photo."
    if metrics.get("out_of_fold") and not metrics.get("test"):
        yield "No photos were kept apart as a split called test: threshold and numbers come from the same photos."
    if rivals := len(metrics.get("chosen_among") or ()):
        yield f"Its head was chosen among {rivals} by the same photos, so the numbers out of fold are a bit too good."
    recalled = (metrics.get("out_of_fold") or {}).get("recall_per_class") or {}
    if few := [name for name in bundle.class_names if recalled and recalled.get(name, {"images": 0})["images"] < _FEW]:
        listed = ", ".join(map(as_text, few[:_CLASSES_NAMED])) + (" and others" if len(few) > _CLASSES_NAMED else "")
        yield f"Classes with fewer than {_FEW} photos, of which little is known: {listed}."
    yield from (as_text(note) for note in dict.fromkeys([*bundle.cautions, *bundle.notes]))
    yield "What is in the photos, where they are from and who labelled them is not known here; add it."


def _networks(bundle: Bundle) -> Iterator[str]:
    licences = _licences(bundle)
    rows = [
        [
            as_text(name_of(each)), as_text(str(each.get("weights", ""))), f"`{str(each.get('weights_sha256'))[:12]}`",
            as_text(str(each.get("precision", ""))), as_text(str(each.get("views", ""))),
            as_text(licences[name_of(each)]),
        ]
        for each in _several(bundle)
    ]  # fmt: skip
    if rows:
        yield _table(["network", "weights", "sha256", "precision", "views", "licence of the weights"], rows)
    made = ", ".join(f"{as_text(name)} {as_text(number)}" for name, number in bundle.versions.items())
    yield (
        "The licence of the photos is not known here, nor what it allows."
        + (f" Made with {made}." if made else "")
        + (f" sha256 of the model: `{bundle.sha256}`." if re.fullmatch("[0-9a-f]{64}", bundle.sha256) else "")
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _sets(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    held = percent(Interval(**found["coverage"]))
    return f"{held}; {100 * found['asked']:g} % were asked for, {found['mean_size']:.2f} labels on average"
