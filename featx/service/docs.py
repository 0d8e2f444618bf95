"""The API as one page of HTML, written from its OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featx.reports import render_template


def docs_page(document: Mapping[str, Any], base: str) -> str:
    """The page.

    Parameters
    ----------
    document : of OpenAPI.
    base : the URL that clients see, for the examples.
    """
    routes = [
        _route(path, method.upper(), route, base)
        for path, methods in document["paths"].items()
        for method, route in methods.items()
    ]
    return render_template("api.html", title="featx API", description=document["info"]["description"], routes=routes)


def _route(path: str, method: str, route: Mapping[str, Any], base: str) -> dict[str, Any]:
    bodies = list(route.get("requestBody", {}).get("content", {}))
    file = ' -H "Content-Type: image/jpeg" --data-binary @photo.jpg' if bodies else ""
    rows = [(each["name"], f"{each['in']}, {_schema(each['schema'])}") for each in route.get("parameters", [])]
    rows += [(status, str(each["description"])) for status, each in sorted(route["responses"].items())]
    return {
        "path": path,
        "method": method,
        "description": route.get("description", ""),
        "example": f"curl{file} {base + path}",
        "bodies": bodies,
        "rows": rows,
    }


def _schema(schema: Mapping[str, Any]) -> str:
    words = [str(schema.get("type", ""))]
    words += [f"{word} {schema[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in schema]
    if "default" in schema:
        words.append(f"(default {schema['default']})")
    return " ".join(words)
