"""Two reports side by side: totals, passes, and the layers in which the two results differ."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from fxcompress.files import write_text
from fxcompress.reporting.figures import bytes_, count, percent_change, relative, seconds
from fxcompress.reporting.markup import Markup, tag
from fxcompress.reporting.page import document
from fxcompress.reporting.pairing import layer_pairs
from fxcompress.reporting.sketch import GraphSketch
from fxcompress.reporting.summary import bar, scrolling, total_latency

__all__ = ["Comparison", "LayerDifference", "compare"]

_MOST_LAYERS = 30

Row = tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class LayerDifference:
    """What is left of one layer in the one result and in the other; ``None`` where it is in neither graph."""

    path: str
    parameters: tuple[int | None, int | None]
    macs: tuple[int | None, int | None]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Made by :func:`compare`; ``str()`` is tables.

    Attributes:
        names: what the two are called.
        totals: rows of name, first, second, difference in percent of the first.
        passes: rows of first and second pass at one place, each with what it did; empty where one has none.
        layers: those in which the two differ, largest difference of parameters first.
        notes: what the reader should know.
    """

    names: tuple[str, str]
    totals: tuple[Row, ...]
    passes: tuple[Row, ...]
    layers: tuple[LayerDifference, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        a, b = self.names
        shown = [_layer_row(layer) for layer in self.layers[:_MOST_LAYERS]]
        parts = [
            _table(("total", a, b, "difference"), self.totals),
            _table((f"pass of {a}", "did", f"pass of {b}", "did"), self.passes),
            _table(("layer", f"parameters, {a}", f"parameters, {b}", f"MACs, {a}", f"MACs, {b}"), shown)
            if shown
            else "no layer differs in parameters or MACs",
        ]
        if self.layers[_MOST_LAYERS:]:
            parts[-1] += f"\n... and {len(self.layers) - _MOST_LAYERS} more layers"
        return "\n\n".join([*parts, *(f"note: {note}" for note in self.notes)])

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page, as ``Report.to_html`` does.

        Raises:
            UsageError: the file cannot be written.
        """
        a, b = self.names
        notes = tag("ul", (tag("li", note) for note in self.notes), class_="warnings") if self.notes else Markup("")
        nothing = tag("p", "No layer differs in parameters or MACs.", class_="none")
        parts = {
            "Totals": Markup(notes + _html_table("Totals", ("", a, b, "Difference"), self.totals)),
            "Passes": _html_table("Passes", (f"Pass of {a}", "Did", f"Pass of {b}", "Did"), self.passes),
            "Layers": _layer_bars(self.layers, a, b) if self.layers else nothing,
        }
        write_text(path, document(f"{a} and {b}", "two results side by side", parts))


def compare(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Put two reports side by side.

    Args:
        first: what ``Report.to_dict()`` gives.
        second: another.
        names: what to call them.
    """
    notes = []
    if any(first["total"][f"{key}_before"] != second["total"][f"{key}_before"] for key in ("parameters", "macs")):
        notes.append("the two did not start from graphs of one size: another model, or other example inputs")
    layers = _layers(first, second)
    if layers is None:
        notes.append("layers are not compared, as one of the reports keeps no graph")
    return Comparison(names, tuple(_totals(first, second)), tuple(_passes(first, second)), layers or (), tuple(notes))


def _totals(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Row]:
    sizes: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
        ("parameters", "parameters_after", count),
        ("MACs", "macs_after", count),
        ("bytes", "bytes_after", bytes_),
    )
    for name, key, words in sizes:
        yield _row(name, first["total"][key], second["total"][key], words)
    yield _row("latency", total_latency(first["passes"])[1], total_latency(second["passes"])[1], seconds)
    worst = [
        max((r["error"] for r in d["passes"] if isinstance(r["error"], float)), default=None) for d in (first, second)
    ]
    yield _row("largest error of a pass", worst[0], worst[1], relative)
    yield _row("time to compress", first["total"]["seconds"], second["total"]["seconds"], seconds)


def _row(name: str, a: float | None, b: float | None, words: Callable[[float | None], str]) -> Row:
    one, other = ("not measured" if value is None else words(value) for value in (a, b))
    return name, one, other, percent_change(a, b)


def _passes(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Row]:
    old, new = first["passes"], second["passes"]
    names = [record["name"] for record in old], [record["name"] for record in new]
    for code, a, b, c, d in difflib.SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        together = zip(old[a:b], new[c:d], strict=True) if code == "equal" else _apart(old[a:b], new[c:d])
        for one, other in together:
            yield (*_did(one, other), *_did(other, one))


def _apart(old: Sequence[Any], new: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    yield from ((record, None) for record in old)
    yield from ((None, record) for record in new)


def _did(record: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> tuple[str, str]:
    if record is None:
        return "", ""
    words = ["rolled back" if record["rolled_back"] else f"{record['sites']} sites"]
    if not record["verified"]:
        words.append("not verified")
    elif record["error"] is not None:
        words.append(f"error {relative(record['error'])}")
    words += [f"{len(record['refusals'])} refusals"] if record["refusals"] else []
    if other is not None:
        options = record["options"].items()
        words += [f"{key}={value}" for key, value in options if other["options"].get(key, value) != value]
    return record["name"], ", ".join(words)


def _layers(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[LayerDifference, ...] | None:
    found = []
    for data in (first, second):
        before, after = data["graph_before"], data["graph_after"]
        if not before or not after:
            return None
        pairs = layer_pairs(GraphSketch.from_dict(before), GraphSketch.from_dict(after))
        found.append({pair.path: (pair.parameters[1], pair.macs[1]) for pair in pairs})
    one, other = found
    missing = (None, None)
    both = {path: (one.get(path, missing), other.get(path, missing)) for path in (*one, *other)}
    differ = [LayerDifference(p, (a[0], b[0]), (a[1], b[1])) for p, (a, b) in both.items() if a != b]
    return tuple(sorted(differ, key=lambda layer: -abs((layer.parameters[0] or 0) - (layer.parameters[1] or 0))))


def _layer_row(layer: LayerDifference) -> tuple[str, ...]:
    return layer.path, *map(count, layer.parameters), *map(count, layer.macs)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return tabulate(rows, headers=heads, disable_numparse=True)


def _html_table(label: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    head = tag("thead", tag("tr", (tag("th", text, scope="col") for text in heads)))
    body = tag("tbody", (tag("tr", tag("th", row[0], scope="row"), (tag("td", v) for v in row[1:])) for row in rows))
    return scrolling(label, tag("table", head, body))


def _layer_bars(layers: Sequence[LayerDifference], a: str, b: str) -> Markup:
    most = max((v or 0 for layer in layers for v in layer.parameters), default=0)
    busiest = max((v or 0 for layer in layers for v in layer.macs), default=0)
    rows = [
        (
            tag("span", layer.path, class_="path"),
            _both("parameters", *layer.parameters, most),
            _both("MACs", *layer.macs, busiest),
        )
        for layer in layers
    ]
    legend = tag("p", tag("span", class_="key then"), f" {a} ", tag("span", class_="key now"), f" {b}", class_="legend")
    return Markup(legend + _html_table("Layers that differ", ("Layer", "Parameters", "MACs"), rows))


def _both(what: str, a: int | None, b: int | None, largest: int) -> Markup:
    text = tag("span", f"{count(a)} | {count(b)} ", tag("small", percent_change(a, b)))
    drawn = bar(a or 0, b or 0, largest, f"{what}: {count(a)} and {count(b)}")
    return tag("div", text, drawn, class_="size")
