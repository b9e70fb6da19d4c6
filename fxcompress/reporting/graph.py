"""The part of the page with the graph: a list in running order, before on the left and after on the right, folded by
module path. The script draws the edges between what is unfolded.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from fxcompress.reporting.figures import change, count
from fxcompress.reporting.markup import Markup, tag
from fxcompress.reporting.pairing import NodePair, Status
from fxcompress.reporting.sketch import NodeSketch

__all__ = ["Group", "grouped", "listing"]

_MOST_OPEN = 48
_SIGNS = {"same": "", "changed": "~", "added": "+", "removed": "−"}
_PARTS = ("name", "kind", "settings", "value")


@dataclasses.dataclass
class Group:
    """A stretch of the list that is in one module: rows (by number) and groups."""

    path: str
    children: list[int | Group]
    open: bool = False

    def rows(self) -> Iterator[int]:
        """All rows in it."""
        for child in self.children:
            if isinstance(child, Group):
                yield from child.rows()
            else:
                yield child


def grouped(pairs: Sequence[NodePair]) -> Group:
    """The list as a tree by module path; a module with one row, or with nothing but one group, is no group itself."""
    root = _group("", list(range(len(pairs))), [pair.scope for pair in pairs])
    shown, level = len(root.children), [c for c in root.children if isinstance(c, Group)]
    while level:
        below: list[Group] = []
        for group in level:
            if shown + len(group.children) <= _MOST_OPEN:
                group.open = True
                shown += len(group.children)
                below += [c for c in group.children if isinstance(c, Group)]
        level = below
    return root


def _group(path: str, rows: Sequence[int], scopes: Sequence[str]) -> Group:
    start = len(path) + 1 if path else 0
    children: list[int | Group] = []
    for name, members in groupby(rows, lambda row: scopes[row][start:].partition(".")[0]):
        inside = list(members)
        if not name or len(inside) == 1:
            children += inside
            continue
        group = _group(f"{path}.{name}" if path else name, inside, scopes)
        only = group.children[0]
        children.append(only if len(group.children) == 1 and isinstance(only, Group) else group)
    return Group(path, children)


def listing(pairs: Sequence[NodePair]) -> Markup:
    """The list, its legend, and what folds and filters it."""
    counts = Counter(pair.status for pair in pairs)
    words: tuple[tuple[Status, str], ...]
    words = (("changed", "changed"), ("added", "added"), ("removed", "removed"), ("same", "as before"))
    legend = tag(
        "p",
        (tag("span", f"{_SIGNS[key]} {counts[key]} {text}".strip(), class_=f"status {key}") for key, text in words),
        class_="legend",
    )
    buttons = (("graph-open", "Unfold all"), ("graph-close", "Fold all"))
    controls = tag(
        "div",
        (tag("button", text, type="button", id=name) for name, text in buttons),
        tag("label", "Find ", tag("input", type="search", id="graph-find", placeholder="node, kind or shape")),
        tag("label", tag("input", type="checkbox", id="graph-changed"), " only changed"),
        tag("output", id="graph-count", for_="graph-find graph-changed"),
        class_="controls",
        hidden=True,
    )
    hint = tag(
        "p",
        "Arrow keys move through the list, right and left unfold and fold. A node's edges light up where you are.",
        class_="hint",
        hidden=True,
        id="graph-hint",
    )
    old = {pair.before.name: i for i, pair in enumerate(pairs) if pair.before}
    new = {pair.after.name: i for i, pair in enumerate(pairs) if pair.after}
    rows = [_row(i, pair, old, new) for i, pair in enumerate(pairs)]
    heads = tag("div", tag("span", "before"), tag("span"), tag("span", "after"), class_="heads", aria_hidden="true")
    root = grouped(pairs)
    body = (_child(child, pairs, rows, 0) for child in root.children)
    whole = tag("div", heads, body, class_="graph", id="graph-list", role="group", aria_label="Nodes in running order")
    return Markup(legend + controls + hint + whole)


def _child(child: int | Group, pairs: Sequence[NodePair], rows: Sequence[Markup], depth: int) -> Markup:
    if not isinstance(child, Group):
        return rows[child]
    members = [pairs[i] for i in child.rows()]
    counts = Counter(pair.status for pair in members)
    chips = [tag("span", f"{_SIGNS[key]}{counts[key]}", class_=f"status {key}", title=f"{counts[key]} {key}")
             for key in ("changed", "added", "removed") if counts[key]]  # fmt: skip
    before = sum(pair.before.parameters for pair in members if pair.before)
    after = sum(pair.after.parameters for pair in members if pair.after)
    head = tag(
        "summary",
        tag("span", child.path, class_="path"),
        tag("span", f"{len(members)} nodes", class_="kind"),
        chips,
        tag("span", f"{change(count(before), count(after))} parameters", class_="kind") if before or after else None,
    )
    content = (_child(inner, pairs, rows, depth + 1) for inner in child.children)
    return tag("details", head, content, class_=f"d{min(depth, 7)}", open=child.open)


def _row(i: int, pair: NodePair, old: dict[str, int], new: dict[str, int]) -> Markup:
    status = pair.status
    if status == "same":
        assert pair.after is not None, "there before and after"
        cells = tag("div", _node(pair.after, None), class_="cell both")
    else:
        sign = tag("span", _SIGNS[status], class_="sign", title=" ".join([status, *_by(pair)]))
        cells = Markup(_cell(pair.before, pair.after) + sign + _cell(pair.after, pair.before))
    return tag(
        "div",
        cells,
        class_=f"row {status}",
        id=f"n{i}",
        data_b=_sources(pair.before, old),
        data_a=_sources(pair.after, new),
    )


def _by(pair: NodePair) -> list[str]:
    return ["by", ", ".join(pair.passes)] if pair.passes else []


def _sources(node: NodeSketch | None, places: dict[str, int]) -> str | None:
    """Rows of what ``node`` reads."""
    return None if node is None else ",".join(str(places[name]) for name in node.inputs if name in places) or None


def _cell(node: NodeSketch | None, other: NodeSketch | None) -> Markup:
    return tag("div", class_="cell empty") if node is None else tag("div", _node(node, other), class_="cell")


def _node(node: NodeSketch, other: NodeSketch | None) -> Iterator[Markup]:
    """The parts of a node in words; what ``other`` has otherwise is marked."""
    for part in _PARTS:
        text = getattr(node, part)
        if part == "kind" and node.op in ("placeholder", "output"):
            text = {"placeholder": "input", "output": "output"}[node.op]
        if text and not (part == "kind" and text == node.name):
            comparable = other is not None and (part == "kind" or other.kind == node.kind)
            differs = comparable and getattr(other, part) != getattr(node, part)
            yield tag("mark" if differs else "span", text, class_=part)
            yield Markup(" ")
    if node.parameters:
        differs = other is not None and other.parameters != node.parameters
        yield tag("mark" if differs else "span", f"{count(node.parameters)} parameters", class_="value")
