"""The API as one page of HTML, written from its OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featx.reports import render_template

_BOUNDS = {"minimum": "from", "maximum": "to", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}


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
    rows = [(each["name"], _parameter(each)) for each in route.get("parameters", [])]
    rows += [(status, str(each["description"])) for status, each in sorted(route["responses"].items())]
    return {
        "path": path,
        "method": method,
        "description": route.get("description", ""),
        "example": f"curl{file} {base + path}",
        "bodies": bodies,
        "rows": rows,
    }


def _parameter(parameter: Mapping[str, Any]) -> str:
    schema = parameter["schema"]
    kind = schema.get("anyOf", [schema])[0]  # of one that may be left out, what it is where it is given
    words = [f"{parameter['in']}, {kind['type']}"]
    words += [f"{word} {kind[key]:g}" for key, word in _BOUNDS.items() if key in kind]
    if schema.get("default") not in (None, ""):
        words.append(f"(default {schema['default']})")
    description = parameter.get("description")
    return " ".join(words) + (f". {description}" if description else "")
