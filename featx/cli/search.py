"""The commands about what looks alike: search, evaluate-retrieval, duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from featx.cli.options import (
    DeviceOption,
    EngineOption,
    Json,
    OwnBackbone,
    Seed,
    SourceOption,
    StoreArgument,
    Weights,
    end_refused,
    network_options,
)
from featx.cli.terminal import PAGE_MARK, ProgressLine, check_file, print_json, say, show
from featx.errors import ImageError, plural

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from featx.extraction import Embedder
    from featx.reports import Found
    from featx.retrieval import DuplicateGroup, ImageSearch, RetrievalResult
    from featx.store import FeatureSet


Layer = Annotated[str, typer.Option(help="Which of the store's layers.")]
Center = Annotated[bool, typer.Option("--center", help="Subtract the mean of the gallery.")]
Whiten = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="PCA whitening with N axes. Measure it on your data first.")
]
Expand = Annotated[int, typer.Option(min=0, metavar="N", help="Expand each query by its N nearest images.")]
Html = Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a sheet with thumbnails, as one file.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(
        epilog="Examples:  featx search photos.featx new.jpg -k 5  |  "
        "featx search photos.featx ants/1.jpg --html alike.html"
    )(search)
    app.command("evaluate-retrieval", epilog="Example:  featx evaluate-retrieval photos.featx --center")(
        evaluate_retrieval
    )
    app.command(epilog="Example:  featx duplicates photos.featx --html duplicates.html")(duplicates)


def search(
    store: StoreArgument,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, folders, or ids of images in the store.")
    ],
    k: Annotated[int, typer.Option("-k", min=1, help="How many images to find for each query.")] = 10,
    layer: Layer = "penultimate",
    center: Center = False,
    whiten: Whiten = None,
    expand: Expand = 0,
    method: Annotated[
        Literal["auto", "exact", "approximate"],
        typer.Option(help="auto is exact up to a million images, or where faiss is not installed."),
    ] = "auto",
    include_self: Annotated[
        bool, typer.Option("--include-self", help="Let an image of the store be in its own answer.")
    ] = False,
    html: Html = None,
    source: SourceOption = None,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Find the images of a store that look like these.

    A file wins over an id of the same name. Images of the store are not computed again.
    """
    from featx.extraction import Embedder
    from featx.reports import image_finder, search_sheet
    from featx.retrieval import ImageSearch

    if html is not None:
        check_file(html, PAGE_MARK, example="alike.html")
        find = image_finder(store, source)
    with ProgressLine("embedding") as line:
        gallery = ImageSearch.open(
            store,
            layer=layer,
            method=method,
            center=center,
            whiten=whiten,
            expand=expand,
            say=lambda sentence: line.say(f"{sentence} ..."),
        )
        asked = _queries(gallery, images)
        refused: list[dict[str, Any]] = []
        if files := [query for query in asked if query.vector is None]:
            options = network_options(backbone, weights, engine, device)
            embedder = Embedder.like(gallery.features.provenance, where=store, **options)
            refused = _embed(files, gallery.features, embedder, line)
    good = [query for query in asked if query.vector is not None]
    # A row of the store is not in its own answer.
    own = [-1 if include_self or isinstance(query.origin, Path) else query.origin for query in good]
    vectors = [query.vector for query in asked if query.vector is not None]
    matches = gallery.query(vectors, k, exclude=own) if good else []
    found = [(query.name, query.origin, each) for query, each in zip(good, matches, strict=True)]
    answer = {
        "results": [{"query": name, "matches": [match.to_json() for match in matches]} for name, _, matches in found],
        "refused": refused,
        "method": gallery.index.method_,
        "recall": gallery.index.recall_,
        "options": {"center": center, "whiten": whiten, "expand": expand},
    }
    if html is not None:
        _say_missing(search_sheet(html, store, find, gallery.features, found))
    if as_json:
        print_json(answer)
    elif found:
        show(_match_table(found))
    if html is not None:
        say(f"Sheet: {html}", err=as_json)
    end_refused(refused, len(asked))


@dataclass
class _Query:
    """What was asked for: a file, or a row of the store; ``vector`` is None until it is embedded."""

    name: str
    origin: Path | int
    vector: NDArray[np.float32] | None


def _queries(gallery: ImageSearch, arguments: list[str]) -> list[_Query]:
    """What was asked for, in order; of files that the store has, too, the embeddings are known."""
    from featx.models import named_files

    embeddings = gallery.features.embeddings
    found = []
    for argument in arguments:
        try:
            files = named_files(Path(argument))
        except (OSError, ValueError):  # too long, or not a path at all: it may still be an id
            files = []
        for file in files:
            digest = _digest(file)
            row = None if digest is None else gallery.row_of_content(digest)
            found.append(_Query(str(file), file, None if row is None else embeddings[row]))
        if not files:
            row = gallery.row_of(argument)
            if row is None:
                raise gallery.no_such_image(argument)
            found.append(_Query(argument, row, embeddings[row]))
    return found


def _embed(files: list[_Query], features: FeatureSet, embedder: Embedder, line: ProgressLine) -> list[dict[str, Any]]:
    """Embed files; those that cannot be decoded, and why."""
    from featx.backbones import layer_place, of_layer
    from featx.store import layers_of

    layer = layer_place(features.layer, layers_of(features.provenance))
    refused = []
    for done, (query, (_, result)) in enumerate(
        zip(files, embedder.embed_files(Path(query.name) for query in files), strict=True), 1
    ):
        if isinstance(result, ImageError):
            refused.append({"query": query.name, "reason": result.reason, "message": result.what})
        else:
            query.vector = of_layer(result, layer)
        line.update(done, len(files))
    return refused


def _digest(path: Path) -> bytes | None:
    """The sha256 of a file, or None for what is no plain file of a sensible size (the decoder says what it is)."""
    from featx._files import sha256_file
    from featx.images import MAX_BYTES

    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        return bytes.fromhex(sha256_file(path))
    except OSError:
        return None


def _match_table(found: Found) -> Table:
    from rich.table import Column, Table

    table = Table(Column("query", overflow="fold"), "", Column("match", overflow="fold"), "label", "cosine", box=None)
    for name, _, matches in found:
        for rank, match in enumerate(matches, 1):
            cells = [name if rank == 1 else "", str(rank), match.id, match.label or "", f"{match.score:.3f}"]
            table.add_row(*cells, end_section=rank == len(matches))
    return table


def _say_missing(count: int) -> None:
    if count:
        say(f"Note: {plural(count, 'picture')} could not be shown; the sheet says why.", err=True)


def evaluate_retrieval(
    store: StoreArgument,
    layer: Layer = "penultimate",
    center: Center = False,
    whiten: Whiten = None,
    expand: Expand = 0,
    max_queries: Annotated[int, typer.Option(min=1, help="Draw at most this many queries.")] = 10_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure how well search finds the same class: every labelled image queries all the others."""
    import numpy as np

    from featx.retrieval import evaluate_retrieval as evaluate
    from featx.store import digest_keys, read_features

    features = read_features(store, layer=layer)
    with ProgressLine("searching") as line:
        result = evaluate(
            features.embeddings,
            features.labels,
            class_names=features.class_names,
            groups=np.unique(digest_keys(features.digests), return_inverse=True)[1].reshape(-1),
            center=center,
            whiten=whiten,
            expand=expand,
            max_queries=max_queries,
            random_state=seed,
            progress=line.update,
        )
    if as_json:
        print_json(result.to_json())
        return
    show(_metrics_table(result), least=80)
    for note in _notes(result):
        say(note)


def _metrics_table(result: RetrievalResult) -> Table:
    from rich.table import Column, Table

    from featx.evaluation import limits

    names = ("queries", "recall@1", "recall@5", "recall@10", "P@10", "mAP", "95 % interval")
    numbers = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("class", no_wrap=True), *numbers, box=None)

    for name, scores in [("all", result.overall), *result.per_class.items()]:
        precision = scores.mean_average_precision
        shares = [*(scores.recall_at_k[k] for k in (1, 5, 10)), scores.precision_at_k[10], precision]
        table.add_row(
            name, str(scores.queries), *(f"{100 * share.mean:.1f}" for share in shares), limits(precision),
            style="bold" if scores is result.overall else "",
        )  # fmt: skip
    return table


def _notes(result: RetrievalResult) -> list[str]:
    from featx.evaluation import percent

    first = result.overall.recall_at_k[1]
    notes = [f"recall@1 {percent(first)}; intervals: 95 %, bootstrap over queries, for this gallery."]
    if result.exact_duplicates:
        notes.append(
            f"{plural(result.exact_duplicates, 'exact duplicate')}; copies of a query are left out of its ranking "
            f"({plural(result.queries_with_copies, 'query')})."
        )
    if result.lonely:
        notes.append(f"{plural(result.lonely, 'image')} without another of the class: no queries.")
    if result.unlabelled:
        notes.append(f"{plural(result.unlabelled, 'unlabelled image')}: no queries, and never right.")
    if result.sampled_from > result.overall.queries:
        notes.append(f"{result.overall.queries} of {plural(result.sampled_from, 'query')} drawn (--max-queries).")
    return notes


def duplicates(
    store: StoreArgument,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.5,
            max=1.0,
            help="Find what has at least this cosine instead of what looks the same. A copy that was saved again or "
            "scaled may reach only 0.9. (default: by the images' looks; 0.98 in stores of version 0.2 and before)",
        ),
    ] = None,
    exact_only: Annotated[bool, typer.Option("--exact-only", help="Find only files with equal bytes.")] = False,
    layer: Layer = "penultimate",
    html: Html = None,
    source: SourceOption = None,
    as_json: Json = False,
) -> None:
    """Find copies and near copies: those across splits first, then those whose labels differ."""
    from featx.reports import duplicate_sheet, image_finder
    from featx.retrieval import count_duplicates, duplicate_groups
    from featx.store import read_features

    if html is not None:
        check_file(html, PAGE_MARK, example="alike.html")
        find = image_finder(store, source)
    features = read_features(store, layer=layer)
    if threshold is None and not exact_only and isinstance(features.near_copies, float):
        threshold = features.near_copies
    by = None if exact_only else features.near_copies if threshold is None else threshold
    groups = duplicate_groups(features, by=by)
    counts = count_duplicates(features, groups)
    if html is not None:
        _say_missing(duplicate_sheet(html, store, find, features, groups))
    if as_json:
        said = {"threshold": None if exact_only else threshold, "images": len(features), **counts}
        print_json({**said, "groups": [_group_json(features, group) for group in groups]})
    else:
        _say_groups(features, groups, counts)
        if by is None and not exact_only:
            say("Near copies were not looked for: the weights are random, and the store has no perceptual hashes.")
        if threshold is not None and threshold > 0.9 and not exact_only:
            say("Copies that were saved again or scaled may have a lower cosine: try --threshold 0.9.")
    if html is not None:
        say(f"Sheet: {html}", err=as_json)


def _group_json(features: FeatureSet, group: DuplicateGroup) -> dict[str, Any]:
    from featx.retrieval import label_of

    return {
        "across_splits": group.across_splits,
        "conflicting_labels": group.conflicting,
        "images": [
            {
                "id": str(features.ids[row]),
                "label": label_of(features, row),
                "split": str(features.splits[row]),
                "similarity": similarity,
                "exact": exact,
            }
            for row, similarity, exact in zip(group.rows, group.similarity, group.exact, strict=True)
        ],
    }


def _say_groups(features: FeatureSet, groups: list[DuplicateGroup], counts: dict[str, int]) -> None:
    say(
        f"{counts['exact']} exact and {plural(counts['near'], 'near duplicate')} in "
        f"{plural(counts['n_groups'], 'group')}; {plural(counts['across_splits'], 'group')} across splits, "
        f"{counts['conflicting_labels']} with different labels."
    )
    for number, group in enumerate(groups[:20], 1):
        say("", f"{group.title(number)}")
        for place, row in enumerate(group.rows):
            say(f"  {features.ids[row]}  ({group.likeness(place)})")
    if len(groups) > 20:
        say("", f"{plural(len(groups) - 20, 'more group')}: --json or --html FILE.html")
