"""Two sketches side by side: which nodes and layers of one are which of the other."""

from __future__ import annotations

import dataclasses
import difflib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal

from fxcompress.reporting.scoping import parents
from fxcompress.reporting.sketch import GraphSketch, NodeSketch

__all__ = ["LayerPair", "NodePair", "Status", "layer_pairs", "node_pairs", "touched_by"]

Status = Literal["same", "changed", "added", "removed"]


@dataclasses.dataclass(frozen=True)
class NodePair:
    """A node before and the same one after, or one of them, and the passes that say they were at it."""

    before: NodeSketch | None
    after: NodeSketch | None
    passes: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """What became of it. One that only reads others than before is the same."""
        if self.before is None:
            return "added"
        if self.after is None:
            return "removed"
        same = dataclasses.replace(self.before, inputs=(), scope="") == dataclasses.replace(
            self.after, inputs=(), scope="", name=self.before.name
        )
        return "same" if same and not self.passes else "changed"

    @property
    def scope(self) -> str:
        """The module that it is in."""
        node = self.before or self.after
        assert node is not None, "one of both"
        return node.scope


@dataclasses.dataclass(frozen=True)
class LayerPair:
    """What a layer had and what stands in its place: itself, or layers below its path.

    Attributes:
        path: of the layer, before if it was there.
        kinds_before, kinds_after: classes of modules, names of functions.
        parameters, macs, bytes: before and after.
    """

    path: str
    kinds_before: tuple[str, ...]
    kinds_after: tuple[str, ...]
    parameters: tuple[int, int]
    macs: tuple[int | None, int | None]
    bytes: tuple[int, int]


def touched_by(passes: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Names of nodes and modules -> the passes that name them at a site, in order."""
    found: dict[str, dict[str, None]] = {}
    for record in passes:
        for detail in record["details"]:
            if "left_whole" not in detail:
                for value in detail.values():
                    if isinstance(value, str):
                        found.setdefault(value, {})[record["name"]] = None
    return {name: tuple(names) for name, names in found.items()}


def node_pairs(before: GraphSketch, after: GraphSketch, touched: Mapping[str, Sequence[str]]) -> list[NodePair]:
    """One sequence with the nodes of both in their orders; those of one name, or calls of one module, are one pair."""
    old, new = list(before.nodes), list(after.nodes)
    renamed = _same_calls(old, new)
    keys = [node.name for node in old], [renamed.get(node.name, node.name) for node in new]
    pairs: list[NodePair] = []
    for code, a, b, c, d in difflib.SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        if code == "equal":
            pairs += [_pair(x, y, touched) for x, y in zip(old[a:b], new[c:d], strict=True)]
        else:
            pairs += _interleaved(old[a:b], new[c:d], touched)
    return pairs


def _same_calls(old: Sequence[NodeSketch], new: Sequence[NodeSketch]) -> dict[str, str]:
    """New names of nodes that call the module that one old node, gone by its name, called."""
    names = {node.name for node in old} & {node.name for node in new}
    first, second = (_only_calls(n for n in nodes if n.name not in names) for nodes in (old, new))
    return {second[path].name: first[path].name for path in first.keys() & second.keys()}


def _only_calls(nodes: Iterable[NodeSketch]) -> dict[str, NodeSketch]:
    found: dict[str, list[NodeSketch]] = {}
    for node in nodes:
        if node.op == "call_module":
            found.setdefault(node.target, []).append(node)
    return {path: calls[0] for path, calls in found.items() if len(calls) == 1}


def _interleaved(
    old: Sequence[NodeSketch], new: Sequence[NodeSketch], touched: Mapping[str, Sequence[str]]
) -> Iterator[NodePair]:
    """Removed and added nodes of one stretch: what replaces a layer comes right after it, what is in one module stays
    together."""
    left = deque(new)
    for node, following in zip_longest(old, old[1:]):
        yield _pair(node, None, touched)
        while left and node.layer and _is_within(left[0].layer or left[0].target, node.layer):
            yield _pair(None, left.popleft(), touched)
        while left and following is not None and left[0].scope == node.scope != following.scope:
            yield _pair(None, left.popleft(), touched)
    yield from (_pair(None, node, touched) for node in left)


def _pair(before: NodeSketch | None, after: NodeSketch | None, touched: Mapping[str, Sequence[str]]) -> NodePair:
    names: dict[str, None] = {}
    for node in (before, after):
        if node is not None:
            keys = [node.name, *([node.target] if node.op in ("call_module", "get_attr") else []), node.layer]
            names |= dict.fromkeys(name for key in keys for name in touched.get(key, ()))
    return NodePair(before, after, tuple(names))


def _is_within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


@dataclasses.dataclass
class _Sum:
    kinds: dict[str, None] = dataclasses.field(default_factory=dict)
    parameters: int = 0
    bytes: int = 0
    macs: int | None = None

    def add(self, node: NodeSketch) -> None:
        self.kinds["weights" if node.op == "get_attr" else node.kind] = None
        self.parameters += node.parameters
        self.bytes += node.bytes
        if node.macs is not None:
            self.macs = (self.macs or 0) + node.macs


def layer_pairs(before: GraphSketch, after: GraphSketch) -> list[LayerPair]:
    """All that has parameters, buffers or MACs, in the order of the graph before; what is new comes where it stands."""
    old, new = _sums(before, {}), _sums(after, _origins(before, after))
    order = list(old)
    previous = -1
    for path in new:
        if path in old:
            previous = order.index(path)
        else:
            previous += 1
            order.insert(previous, path)
    return [_layer(path, old.get(path, _Sum()), new.get(path, _Sum())) for path in order]


def _layer(path: str, old: _Sum, new: _Sum) -> LayerPair:
    known = old.macs is not None or new.macs is not None
    macs = (old.macs or 0, new.macs or 0) if known else (None, None)
    sizes = (old.parameters, new.parameters), macs, (old.bytes, new.bytes)
    return LayerPair(path, tuple(old.kinds), tuple(new.kinds), *sizes)


def _origins(before: GraphSketch, after: GraphSketch) -> dict[str, str]:
    """Paths of layers after -> the layer before that each is below."""
    known = {node.layer for node in before.nodes if node.layer}
    found = {}
    for path in {node.layer for node in after.nodes if node.layer} - known:
        above = [parent for parent in parents(path) if parent in known]
        if above:
            found[path] = above[-1]
    return found


def _sums(graph: GraphSketch, origins: Mapping[str, str]) -> dict[str, _Sum]:
    found: dict[str, _Sum] = {}
    for node in graph.nodes:
        if node.layer:
            found.setdefault(origins.get(node.layer, node.layer), _Sum()).add(node)
    return found
