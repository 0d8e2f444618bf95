"""Explanations as one page: each photo with what speaks for its label, and for the runner-up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.images import encode
from featx.models import Answer, Explanation
from featx.reports.heat import LEGEND, panels
from featx.reports.page import Facts, render_template

_DOUBT = {None: "", "unsure": "The model is not sure.", "unknown": "The model does not know such photos."}


def render_explanations(
    explained: Iterable[tuple[str, Answer, Explanation, NDArray[np.uint8] | str]],
    *,
    title: str,
    provenance: Mapping[str, Any],
    command: str,
) -> str:
    """The whole page as text: one file that loads nothing.

    Parameters
    ----------
    explained : a photo's name, the answer, where its evidence lies, and its pixels (h, w, 3) or why there are none.
    title : of the model.
    provenance : of its embeddings.
    command : the command line that made it.
    """
    notes: dict[str, None] = {}
    photos = []
    for name, answer, found, picture in explained:
        notes |= {found.note: None} if found.note else {}
        photos.append(_photo(name, answer, found, picture))
    return render_template(
        "explain.html",
        title=f"Why: {title}",
        legend=LEGEND,
        notes=list(notes),
        photos=photos,
        facts=Facts.of({"command": command, **provenance}),
    )


def _photo(name: str, answer: Answer, explanation: Explanation, picture: NDArray[np.uint8] | str) -> dict[str, Any]:
    label, other = explanation.ranked[:2]
    classes = [explanation.class_names[place] for place in (label, other)]
    shown = [] if isinstance(picture, str) else [encode(each, form="JPEG") for each in panels(picture, explanation)]
    captions = ["the photo", *(f"evidence for {each}" for each in classes)]
    score = f"{100 * answer.score:.1f} %" if answer.score_kind == "probability" else f"ahead by {answer.score:.3g}"
    return {
        "name": name,
        "said": f"{answer.label} ({score}), runner-up {classes[1]}. {_DOUBT[answer.reason]}",
        "missing": picture if isinstance(picture, str) else "",
        "figures": list(zip(captions, shown, strict=False)),
        "classes": classes,
        "rows": sums(explanation),
        "rounding": f"{explanation.rounding:.1g}",
    }


def sums(explanation: Explanation) -> list[tuple[str, list[str], str]]:
    """What adds up to the scores of label and runner-up: what it is, the two numbers, and why it has no map."""
    pair = explanation.ranked[:2]
    rows = [("the head's intercept", explanation.intercepts, "")]
    rows += [(f"map of {part.layer}, view {part.view}", part.adds, "") for part in explanation.parts]
    rows += [(each.layer, each.adds, f"no map: {each.reason}") for each in explanation.left_out]
    rows.append(("score", explanation.scores, ""))
    return [(what, [f"{numbers[place]:+.4f}" for place in pair], why) for what, numbers, why in rows]
