"""The commands about what looks alike: search, evaluate-retrieval, duplicates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from featx.cli.options import (
    QUARANTINED,
    DeviceOption,
    EngineOption,
    Json,
    OwnBackbone,
    Seed,
    SourceOption,
    StoreArgument,
    Weights,
    network_options,
)
from featx.cli.predict import say_refused
from featx.cli.terminal import PAGE_MARK, ProgressLine, check_file, print_json, say, show
from featx.errors import ImageError, plural, visible

if TYPE_CHECKING:
    from rich.table import Table

    from featx.evaluation import Interval
    from featx.extraction import Embedder
    from featx.reports import Found
    from featx.retrieval import DuplicateGroup, ImageSearch, RetrievalResult, Scores
    from featx.store import FeatureSet


MethodName = Literal["auto", "exact", "approximate"]
"""How neighbours are found."""


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
        MethodName, typer.Option(help="auto is exact up to a million images, or where faiss is not installed.")
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
        asked = _Queries(gallery, images)
        if asked.files:
            options = network_options(backbone, weights, engine, device)
            embedder = Embedder.like(gallery.features.provenance, where=store, **options)
            asked.embed(embedder, line)
    found = asked.answer(k, include_self=include_self)
    answer = {
        "results": [{"query": name, "matches": [match.to_json() for match in matches]} for name, _, matches in found],
        "refused": asked.refused,
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
    for item in asked.refused:
        say(f"  refused {item['query']}: {item['reason']}, {item['message']}", err=True)
    if asked.refused:
        say_refused(len(asked.refused), len(asked.names))
        raise typer.Exit(QUARANTINED)


class _Queries:
    """What was asked for, in order: rows of the store, and files that have to be embedded."""

    def __init__(self, gallery: ImageSearch, arguments: list[str]) -> None:
        self.gallery = gallery
        self.names: list[str] = []
        self.origins: list[Path | int] = []
        self.rows: dict[int, int] = {}
        self.files: dict[int, Path] = {}
        self.vectors: dict[int, Any] = {}
        self.refused: list[dict[str, Any]] = []
        for argument in arguments:
            self._add(argument)

    def _add(self, argument: str) -> None:
        from featx.models import named_files

        try:
            files = named_files(Path(argument))
        except (OSError, ValueError):  # too long, or not a path at all: it may still be an id
            files = []
        for file in files:
            self._add_file(file)
        if not files:
            row = self.gallery.row_of(argument)
            if row is None:
                raise self.gallery.no_such_image(argument)
            self.rows[len(self.names)] = row
            self.names.append(argument)
            self.origins.append(row)

    def _add_file(self, path: Path) -> None:
        known = self.gallery.row_of_content(digest) if (digest := _digest(path)) is not None else None
        if known is not None:
            self.vectors[len(self.names)] = self.gallery.features.embeddings[known]
        else:
            self.files[len(self.names)] = path
        self.names.append(str(path))
        self.origins.append(path)

    def embed(self, embedder: Embedder, line: ProgressLine) -> None:
        """Embed the files; those that cannot be decoded go to ``refused``."""
        from featx.backbones import layer_place, of_layer
        from featx.store import layers_of

        layer = layer_place(self.gallery.features.layer, layers_of(self.gallery.features.provenance))
        found = embedder.embed_files(self.files.values())
        for done, (number, (_, result)) in enumerate(zip(self.files, found, strict=True), 1):
            if isinstance(result, ImageError):
                self.refused.append({"query": self.names[number], "reason": result.reason, "message": result.what})
            else:
                self.vectors[number] = of_layer(result, layer)
            line.update(done, len(self.files))

    def answer(self, k: int, *, include_self: bool) -> Found:
        """What was found for each query that could be read, in the order of the command line."""
        import numpy as np

        good = sorted({*self.vectors, *self.rows})
        if not good:
            return []
        embeddings = self.gallery.features.embeddings
        queries = np.stack([embeddings[self.rows[i]] if i in self.rows else self.vectors[i] for i in good])
        exclude = [-1 if include_self else self.rows.get(i, -1) for i in good]
        matches = self.gallery.query(queries, k, exclude=exclude)
        return [(self.names[i], self.origins[i], each) for i, each in zip(good, matches, strict=True)]


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
    from rich.table import Table
    from rich.text import Text

    table = Table("query", "", "match", "label", "cosine", box=None)
    for name, _, matches in found:
        for rank, match in enumerate(matches, 1):
            table.add_row(
                Text(visible(name) if rank == 1 else "", overflow="fold"),
                str(rank),
                Text(visible(match.id), overflow="fold"),
                Text(visible(match.label or "")),
                f"{match.score:.3f}",
                end_section=rank == len(matches),
            )
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
    from rich.table import Table
    from rich.text import Text

    from featx.evaluation import limits

    table = Table(box=None)
    table.add_column("class", no_wrap=True)
    for name in ("queries", "recall@1", "recall@5", "recall@10", "P@10", "mAP", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)

    def row(name: str, scores: Scores, style: str = "") -> None:
        precision = scores.mean_average_precision
        table.add_row(
            Text(visible(name), style=style),
            str(scores.queries),
            *(_points(scores.recall_at_k[k]) for k in (1, 5, 10)),
            _points(scores.precision_at_k[10]),
            _points(precision),
            limits(precision),
        )

    row("all", result.overall, "bold")
    for name, scores in result.per_class.items():
        row(name, scores)
    return table


def _points(value: Interval) -> str:
    return f"{100 * value.mean:.1f}"


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
