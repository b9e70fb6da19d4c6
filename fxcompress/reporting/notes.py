"""The parts of the page in words: refusals with their reasons, and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxcompress.reporting.markup import Markup, tag

__all__ = ["refusals", "warnings"]


def refusals(data: Mapping[str, Any]) -> Markup:
    """Places left alone: those of one pass and one reason together, most first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in data["passes"]:
        for refusal in record["refusals"]:
            groups.setdefault((record["name"], refusal["reason"]), []).append(refusal)
    if not groups:
        return tag("p", "No pass left a place alone that it looked at.", class_="none")
    names = dict.fromkeys(name for name, _ in groups)
    total = sum(map(len, groups.values()))
    controls = tag(
        "div",
        tag("label", "Find ", tag("input", type="search", id="refusal-find", placeholder="node, module or reason")),
        tag(
            "label",
            "Pass ",
            tag(
                "select", tag("option", "all", value=""), (tag("option", n, value=n) for n in names), id="refusal-pass"
            ),
        ),
        tag("output", f"{total} of {total} places", id="refusal-count", for_="refusal-find refusal-pass"),
        class_="controls",
        hidden=True,
    )
    ordered = sorted(groups.items(), key=lambda pair: -len(pair[1]))
    return Markup(controls + tag("div", (_group(*key, places) for key, places in ordered), id="refusal-list"))


def _group(name: str, reason: str, places: list[Mapping[str, Any]]) -> Markup:
    head = tag(
        "summary",
        tag("span", f"{len(places)}×", class_="times"),
        tag("span", name, class_="badge"),
        tag("span", reason, class_="reason"),
    )
    items = (tag("li", tag("code", place["node"]), " ", tag("span", _target(place), class_="kind")) for place in places)
    return tag("details", head, tag("ul", items, class_="places"), data_pass=name, open=len(places) == 1)


def _target(place: Mapping[str, Any]) -> str:
    return "" if place["target"] == place["node"] else str(place["target"])


def warnings(data: Mapping[str, Any]) -> Markup:
    """All warnings, and passes that nothing was verified of."""
    told = [(record["name"], text) for record in data["passes"] for text in record["warnings"]]
    told += [(r["name"], r["verification"]) for r in data["passes"] if not r["verified"] and not r["rolled_back"]]
    told += [("", text) for text in data["total"]["warnings"]]
    if not told:
        return tag("p", "None.", class_="none")
    unique = dict.fromkeys(told)
    lines = (tag("li", tag("span", name, class_="badge") if name else None, tag("span", text)) for name, text in unique)
    return tag("ul", lines, class_="warnings")
