"""A FeatureSet as what other libraries take: a pandas frame, an AnnData. Pandas' and anndata's door."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from featx.errors import not_installed

if TYPE_CHECKING:
    import anndata
    import pandas

    from featx.store.reader import FeatureSet


def to_pandas(features: FeatureSet) -> pandas.DataFrame:
    """One row an image, by id: label (categorical), split, digest (hex), and a float32 column for each dimension."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise not_installed("pandas", "frames") from error
    frame = pandas.DataFrame(features.embeddings, index=_index(features), columns=_names(features), copy=True)
    frame = pandas.concat([_about(features), frame], axis=1)
    frame.attrs = {"layer": features.layer, "fingerprint": features.fingerprint}
    return frame


def to_anndata(features: FeatureSet) -> anndata.AnnData:
    """``X`` the embeddings (n, d), ``obs`` label, split and digest by id, ``uns["featx"]`` how they were made."""
    try:
        import anndata
        import pandas
    except ModuleNotFoundError as error:
        raise not_installed("anndata", "frames") from error
    told = {
        "layer": features.layer,
        "fingerprint": features.fingerprint,
        "provenance": json.dumps(dict(features.provenance), sort_keys=True),  # as text: it nests, and has lists
    }
    return anndata.AnnData(
        X=features.embeddings.copy(),
        obs=_about(features),
        var=pandas.DataFrame(index=pandas.Index(_names(features), dtype=object)),
        uns={"featx": told},
    )


def _about(features: FeatureSet) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(
        {
            "label": pandas.Categorical.from_codes(features.labels, categories=list(features.class_names)),
            "split": features.splits.astype(object),
            "digest": [row.tobytes().hex() for row in features.digests],
            **({"group": features.groups.astype(object)} if (features.groups != "").any() else {}),
            **{f"meta/{name}": values.astype(object) for name, values in features.metadata.items()},
        },
        index=_index(features),
    )


def _index(features: FeatureSet) -> pandas.Index[str]:
    import pandas

    return pandas.Index(features.ids.astype(object), name="id")


def _names(features: FeatureSet) -> list[str]:
    return [f"e{number}" for number in range(features.embeddings.shape[1])]
