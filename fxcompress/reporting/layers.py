"""The part of the page about single layers: parameters and MACs before and after, and what passes set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fxcompress.reporting.figures import change, count, percent_change, relative
from fxcompress.reporting.markup import Markup, tag
from fxcompress.reporting.pairing import LayerPair
from fxcompress.reporting.scoping import parents
from fxcompress.reporting.summary import bar, scrolling

__all__ = ["LayerFacts", "facts_of", "table"]


@dataclasses.dataclass
class LayerFacts:
    """What passes said of one layer: settings in words, errors by pass."""

    settings: list[str] = dataclasses.field(default_factory=list)
    errors: list[tuple[str, float | str]] = dataclasses.field(default_factory=list)

    @property
    def largest_error(self) -> float:
        """The largest error of a pass; 0 if none is known."""
        return max((error for _, error in self.errors if isinstance(error, float)), default=0.0)


def facts_of(passes: Iterable[Mapping[str, Any]], layers: Iterable[str]) -> dict[str, LayerFacts]:
    """Ranks, bits, channels and errors in the details of sites, by layer; what is below a layer counts for it."""
    found = {path: LayerFacts() for path in layers}
    for record in passes:
        for detail in record["details"]:
            path = str(detail.get("module") or detail["target"])
            owner = next((p for p in (path, *reversed(list(parents(path)))) if p in found), None)
            if owner is not None:
                facts = found[owner]
                prefix = f"{path[len(owner) + 1 :]}: " if path != owner else ""
                facts.settings += [prefix + text for text in _settings(detail) if prefix + text not in facts.settings]
                error = detail.get("error", detail.get("weight_error"))
                if isinstance(error, (int, float, str)) and error and not isinstance(error, bool):
                    facts.errors.append((record["name"], error))
    return found


def _settings(detail: Mapping[str, Any]) -> list[str]:
    found = []
    for key in ("out_channels", "in_channels", "out_features", "in_features", "num_features"):
        if f"{key}_before" in detail and detail[f"{key}_before"] != detail.get(f"{key}_after"):
            name = key.replace("_", " ").replace("num ", "")
            found.append(f"{name} {detail[f'{key}_before']} → {detail.get(f'{key}_after')}")
    if detail.get("rank") is not None:
        slices = detail.get("slices")
        found.append(f"rank {detail['rank']}" + (f" in {slices} slices" if slices and slices != 1 else ""))
    bits = [(name, detail.get(f"{name}_bits")) for name in ("weight", "activation")]
    known = [f"{name}s {value} bits" for name, value in bits if value is not None]
    if known:
        found.append(", ".join(known))
    if "left_whole" in detail:
        found.append(f"left whole: {detail['left_whole']}")
    if isinstance(detail.get("sensitivity"), (int, float)):
        found.append(f"sensitivity {detail['sensitivity']:.2g}")
    return found


def table(pairs: Sequence[LayerPair], facts: Mapping[str, LayerFacts]) -> Markup:
    """The table, with what filters and sorts it (which a script needs, and shows)."""
    most = max((max(pair.parameters) for pair in pairs), default=0)
    busiest = max((max(m or 0 for m in pair.macs) for pair in pairs), default=0)
    worst = max((f.largest_error for f in facts.values()), default=0.0)
    rows = [_row(i, pair, facts[pair.path], most, busiest, worst) for i, pair in enumerate(pairs)]
    heads = (("Layer", "index"), ("Parameters", "parameters"), ("MACs", "macs"), ("Settings", None), ("Error", "error"))
    controls = tag(
        "div",
        tag("label", "Find ", tag("input", type="search", id="layer-find", placeholder="path or setting")),
        tag("label", tag("input", type="checkbox", id="layer-changed"), " only changed"),
        tag("label", tag("input", type="checkbox", id="layer-relative"), " each layer at full width"),
        tag("output", f"{len(pairs)} layers", id="layer-count", for_="layer-find layer-changed"),
        class_="controls",
        hidden=True,
    )
    legend = tag(
        "p", tag("span", class_="key then"), "before ", tag("span", class_="key now"), "after", class_="legend"
    )
    whole = tag(
        "table",
        tag("caption", "Layers before and after", class_="hidden"),
        tag("thead", tag("tr", (tag("th", head, scope="col", data_sort=key) for head, key in heads))),
        tag("tbody", rows),
        class_="layers",
        id="layer-table",
    )
    return Markup(controls + legend + scrolling("Layers", whole, "tall"))


def _row(i: int, pair: LayerPair, facts: LayerFacts, most: int, busiest: int, worst: float) -> Markup:
    sizes = (*pair.parameters, *pair.macs)
    same = pair.kinds_before == pair.kinds_after and sizes[0] == sizes[1] and sizes[2] == sizes[3]
    changed = not same or any(not s.startswith("left whole") for s in facts.settings)
    kinds = change(" + ".join(pair.kinds_before) or "new", " + ".join(pair.kinds_after) or "gone")
    cells = (
        tag("th", tag("span", pair.path, class_="path"), tag("span", kinds, class_="kind"), scope="row"),
        _size_cell("parameters", *pair.parameters, most),
        _size_cell("MACs", *pair.macs, busiest),
        tag("td", (tag("span", text, class_="chip") for text in facts.settings)),
        _error_cell(facts, worst),
    )
    return tag(
        "tr",
        cells,
        data_index=i,
        data_parameters=pair.parameters[0],
        data_macs=pair.macs[0] or 0,
        data_error=facts.largest_error,
        data_changed="yes" if changed else "no",
    )


def _size_cell(what: str, before: int | None, after: int | None, largest: int) -> Markup:
    label = f"{what}: {count(before)} before, {count(after)} after"
    text = tag("span", change(count(before), count(after)), " ", tag("small", percent_change(before, after)))
    return tag("td", text, bar(before, after, largest, label), class_="size")


def _error_cell(facts: LayerFacts, worst: float) -> Markup:
    told = [tag("span", f"{name} {relative(error)}", class_="error") for name, error in facts.errors]
    size = facts.largest_error
    return tag("td", told, bar(0, size, worst, f"error {relative(size)}") if size else None, class_="errors")
