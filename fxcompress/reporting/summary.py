"""The first part of the page: tiles with the totals, and a table of the passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxcompress.reporting.figures import bytes_, change, count, percent_change, relative, seconds, shortened
from fxcompress.reporting.markup import Markup, number, tag

__all__ = ["bar", "passes", "scrolling", "tiles", "total_latency"]

_SIZES = (("parameters", "Parameters", count), ("macs", "MACs", count), ("bytes", "Bytes", bytes_))
_NOT_MEASURED = "not measured"
_NOTICEABLE = 1.01
"""From which growth on a bar has another colour."""


def bar(before: float | None, after: float | None, largest: float | None, label: str) -> Markup | None:
    """Two bars, one on the other, as shares of ``largest``; ``None`` if a number is missing or there is nothing."""
    if before is None or after is None or not largest:
        return None
    shares = [100 * max(value, 0) / largest for value in (before, after)]
    kinds = "now more" if after > _NOTICEABLE * before else "now"
    rects = (
        tag("rect", class_="then", y=0, width=f"{number(shares[0])}%", height=10, rx=2),
        tag("rect", class_=kinds, y=2, width=f"{number(shares[1])}%", height=6, rx=2),
    )
    return tag("svg", rects, class_="bar", width="100%", height=10, role="img", aria_label=label)


def scrolling(label: str, content: Markup, class_: str = "") -> Markup:
    """A part that scrolls by itself, by the keyboard too."""
    return tag("div", content, class_=f"scroll {class_}".strip(), tabindex=0, role="region", aria_label=label)


def tiles(data: Mapping[str, Any], measured: Mapping[str, Any]) -> Markup:
    """Totals before and after; what was not measured says so."""
    total, own = data["total"], {str(key).lower(): key for key in measured}
    found = []
    for key, title, words in _SIZES:
        found.append(_tile(title, total[f"{key}_before"], total[f"{key}_after"], words))
    if "latency" not in own:
        found.append(_tile("Latency", *total_latency(data["passes"]), seconds))
    if "error" not in own:
        found.append(_error_tile(data["passes"]))
    for key, value in measured.items():
        found.append(_simple_tile(str(key).capitalize(), str(value), "measured by the caller"))
    return tag("div", found, class_="tiles")


def total_latency(records: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Latency before the first and after the last pass that changed the graph, if all of these were measured."""
    kept = [record for record in records if record["sites"] and not record["rolled_back"]]
    known = [(record["latency_before"], record["latency_after"]) for record in kept]
    if not known or any(before is None or after is None for before, after in known):
        return None, None
    return known[0][0], known[-1][1]


def _tile(title: str, before: float | None, after: float | None, words: Any) -> Markup:
    if before is None or after is None:
        return _simple_tile(title, _NOT_MEASURED, "", missing=True)
    shift = percent_change(before, after)
    content = (
        tag("h3", title),
        tag("p", words(after), class_="big"),
        tag(
            "p",
            f"from {words(before)}".replace(" ", "\N{NO-BREAK SPACE}") if shift else "unchanged",
            tag("span", shift, class_="shift" + (" worse" if after > before else "")) if shift else None,
            class_="from",
        ),
        bar(before, after, max(before, after), f"{title}: {words(before)} before, {words(after)} after"),
    )
    return tag("div", content, class_="tile")


def _simple_tile(title: str, big: str, small: str, missing: bool = False) -> Markup:
    lines = (tag("h3", title), tag("p", big, class_="missing" if missing else "big"), tag("p", small, class_="from"))
    return tag("div", lines, class_="tile")


def _error_tile(records: Sequence[Mapping[str, Any]]) -> Markup:
    known = [(r["error"], r["name"]) for r in records if isinstance(r["error"], (int, float)) and r["sites"]]
    if not known:
        return _simple_tile("Error", _NOT_MEASURED, "", missing=True)
    error, name = max(known)
    return _simple_tile("Largest error of a pass", relative(error), f"relative, of the outputs, by {name}")


def passes(data: Mapping[str, Any]) -> Markup:
    """The table: a row for each pass, and the total."""
    total, timed = data["total"], any(r["latency_before"] is not None for r in data["passes"])
    heads = ["Pass", "Guarantee", "Sites", "Refusals", "Error", "Parameters", "MACs", "Bytes"]
    heads += ["Latency", "Seconds"] if timed else ["Seconds"]
    rows = [_pass_row(i, record, total, timed) for i, record in enumerate(data["passes"], 1)]
    last = [tag("th", "Total", scope="row", colspan=5), *_size_cells(total, total)]
    last += [_latency_cell(*total_latency(data["passes"]))] if timed else []
    last.append(tag("td", f"{total['seconds']:.2f}", class_="n"))
    table = tag(
        "table",
        tag("caption", "What each pass did, in order", class_="hidden"),
        tag(
            "thead",
            tag("tr", (tag("th", head, scope="col", class_=None if i < 2 else "n") for i, head in enumerate(heads))),
        ),
        tag("tbody", rows),
        tag("tfoot", tag("tr", last)),
        class_="passes",
    )
    return scrolling("Passes", table)


def _pass_row(i: int, record: Mapping[str, Any], total: Mapping[str, Any], timed: bool) -> Markup:
    refused = len(record["refusals"])
    cells = [
        tag("th", tag("span", i, class_="step", aria_hidden="true"), _pass_details(record), scope="row"),
        tag("td", tag("span", record["guarantee"], class_=f"badge {record['guarantee']}")),
        tag("td", "rolled back" if record["rolled_back"] else record["sites"], class_="n"),
        tag("td", tag("a", refused, href="#refusals") if refused else 0, class_="n"),
        tag("td", _error(record), class_="n"),
        *_size_cells(record, total),
    ]
    if timed:
        cells.append(_latency_cell(record["latency_before"], record["latency_after"]))
    cells.append(tag("td", f"{record['seconds']:.2f}", class_="n"))
    return tag("tr", cells, class_="undone" if record["rolled_back"] else None)


def _pass_details(record: Mapping[str, Any]) -> Markup:
    options = [(tag("dt", key), tag("dd", shortened(str(value), 200))) for key, value in record["options"].items()]
    told = (
        tag("p", "✓ " if record["verified"] else "not verified: ", record["verification"]),
        tag("dl", options, class_="options") if options else tag("p", "no options"),
    )
    return tag("details", tag("summary", record["name"]), told)


def _error(record: Mapping[str, Any]) -> Any:
    if record["rolled_back"]:
        return "-"
    return relative(record["error"]) if record["verified"] else tag("span", "unverified", class_="shift worse")


def _size_cells(sizes: Mapping[str, Any], total: Mapping[str, Any]) -> list[Markup]:
    found = []
    for key, title, words in _SIZES:
        before, after = sizes[f"{key}_before"], sizes[f"{key}_after"]
        label = f"{title}: {words(before)} before, {words(after)} after"
        largest = max((v for v in (total[f"{key}_before"], before, after) if v is not None), default=None)
        text = change(words(before), words(after))
        found.append(tag("td", tag("span", text), bar(before, after, largest, label), class_="n size"))
    return found


def _latency_cell(before: float | None, after: float | None) -> Markup:
    return tag("td", change(seconds(before), seconds(after)), class_="n")
