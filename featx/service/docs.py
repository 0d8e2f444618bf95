"""The API as one page of HTML, written from its OpenAPI document: no script, and nothing fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 50rem; margin: 0 auto; padding: 1rem; }
h2 { border-top: 1px solid #8886; padding-top: 1rem; } h2 b { font-weight: 600; opacity: .65; }
code, pre { font: .9em ui-monospace, monospace; } pre { overflow-x: auto; padding: .75rem; background: #8881; }
table { border-collapse: collapse; } td { padding: .1rem 1rem .1rem 0; vertical-align: top; }
"""


def docs_page(document: Mapping[str, Any], base: str) -> str:
    """The page.

    Parameters
    ----------
    document : of OpenAPI.
    base : the URL that clients see, for the examples.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>featx API</title><style>{_STYLE}</style><h1>featx API</h1>",
        f"<p>{escape(document['info']['description'])}",
        "<p>For programs: <a href=/openapi.json>openapi.json</a>. To try it by hand: <a href=/>the page</a>.",
    ]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            parts.append(_route(path, method.upper(), route, base))
    return "\n".join(parts)


def _route(path: str, method: str, route: Mapping[str, Any], base: str) -> str:
    body = route.get("requestBody", {}).get("content", {})
    file = ' -H "Content-Type: image/jpeg" --data-binary @photo.jpg' if body else ""
    parts = [
        f"<h2><b>{method}</b> {escape(path)}</h2><p>{escape(route.get('description', ''))}",
        f"<pre>curl{file} {escape(base + path)}</pre>",
    ]
    if body:
        parts.append(f"<p>Body: {', '.join(f'<code>{escape(kind)}</code>' for kind in body)}.")
    rows = [(each["name"], f"{each['in']}, {_schema(each['schema'])}") for each in route.get("parameters", [])]
    rows += [(status, str(each["description"])) for status, each in sorted(route["responses"].items())]
    cells = "".join(f"<tr><td><code>{escape(name)}</code><td>{escape(text)}" for name, text in rows)
    return "".join([*parts, f"<table>{cells}</table>"])


def _schema(schema: Mapping[str, Any]) -> str:
    words = [str(schema.get("type", ""))]
    words += [f"{word} {schema[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in schema]
    if "default" in schema:
        words.append(f"(default {schema['default']})")
    return " ".join(words)
