"""One page that needs nothing else: no network, no other file. A policy in the page forbids it anything more."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from fxcompress.reporting import curves, graph, layers, notes, summary
from fxcompress.reporting.markup import Markup, tag
from fxcompress.reporting.pairing import layer_pairs, node_pairs, touched_by
from fxcompress.reporting.sketch import GraphSketch

__all__ = ["document", "page"]

_NO_GRAPH = "Not in this report: a version of fxcompress wrote it that kept no graphs."


def page(data: Mapping[str, Any], *, title: str | None = None, measured: Mapping[str, Any] | None = None) -> str:
    """The page of a report.

    Args:
        data: what ``Report.to_dict()`` gives.
        title: of the page; by default the class name of the model.
        measured: what the caller measured, by name, as further tiles.
    """
    before, after = (data[key] and GraphSketch.from_dict(data[key]) for key in ("graph_before", "graph_after"))
    parts = {"Summary": Markup(summary.tiles(data, measured or {}) + summary.passes(data))}
    refused = sum(len(record["refusals"]) for record in data["passes"])
    nothing = tag("p", _NO_GRAPH, class_="none")
    parts["Layers"] = parts["Graph"] = nothing
    if before and after:
        pairs = layer_pairs(before, after)
        facts = layers.facts_of(data["passes"], [pair.path for pair in pairs])
        parts["Layers"] = layers.table(pairs, facts)
    if data["sensitivity"]:
        parts["Sensitivity"] = curves.charts(data["sensitivity"])
    if before and after:
        del parts["Graph"]  # after the curves
        parts["Graph"] = graph.listing(node_pairs(before, after, touched_by(data["passes"])))
    parts[f"Refusals ({refused})" if refused else "Refusals"] = notes.refusals(data)
    parts["Warnings"] = notes.warnings(data)
    names = [record["name"] for record in data["passes"]]
    name = title or (before.model if before else "fxcompress report")
    return document(name, " → ".join(names) or "no passes", parts)


def document(title: str, subtitle: str, parts: Mapping[str, Markup]) -> str:
    """A page with a heading and a section for each of ``parts``, by name."""
    links, sections = [], []
    for name, content in parts.items():
        key = name.partition(" (")[0].lower().replace(" ", "-")
        links.append(tag("a", name, href=f"#{key}"))
        sections.append(
            tag("section", tag("h2", name, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")
        )
    toggle = tag("button", "Theme: auto", type="button", id="theme", hidden=True)
    body = tag(
        "body",
        tag("a", "Skip to the summary", href="#main", class_="skip"),
        tag("header", tag("div", tag("h1", title), tag("p", subtitle, class_="subtitle")), toggle),
        tag("nav", links, aria_label="Sections"),
        tag("main", sections, id="main", tabindex=-1),
        tag(
            "footer", "Written by fxcompress. Sizes are of the graph; errors are relative to the outputs before a pass."
        ),
        Markup(f"<script>{_resource('page.js')}</script>"),
    )
    return f"<!DOCTYPE html>\n{tag('html', _head(title), body, lang='en')}\n"


def _head(title: str) -> Markup:
    style, script = _resource("page.css"), _resource("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} · fxcompress"),
        Markup(f"<style>{style}</style>"),
    )


@cache
def _resource(name: str) -> str:
    return resources.files("fxcompress.reporting").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
