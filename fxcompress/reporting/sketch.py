"""A graph in plain values, for reports: what each node is, what it reads, gives and costs.

Everything comes from the graph and from the run in which its cost was counted; nothing runs for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.cost import Cost
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.analysis.storage import memory_blocks
from fxcompress.reporting.figures import shortened
from fxcompress.reporting.scoping import owner_of, scopes_of

__all__ = ["CURVE", "Curve", "GraphSketch", "NodeSketch", "curves_in", "sketch", "target_of"]

CURVE = "curve"
"""The key of a site's detail with ``{"knob": str, "points": [[setting, error], ...]}``, a :class:`Curve`."""

_LONGEST = 160


@dataclasses.dataclass(frozen=True)
class NodeSketch:
    """One node.

    Attributes:
        name, op: as in ``torch.fx``.
        kind: class of the module, or name of the function or method.
        target: module path or name of an attribute, method or function.
        inputs: names of the nodes it reads.
        settings: what a module says of its options, or the arguments that are no nodes; cut if long.
        value: shape and dtype of what it gives, such as ``"1x8x4x4 float32"``; empty if not known.
        scope: path of the module that it is in, as far as known.
        layer: path of the layer that its parameters and MACs count for; empty if it has none.
        parameters, bytes: elements of parameters, and bytes of parameters and buffers, at the first node that has them.
        macs: multiply-accumulates of one run; ``None`` without example inputs.
    """

    name: str
    op: str
    kind: str
    target: str
    inputs: tuple[str, ...] = ()
    settings: str = ""
    value: str = ""
    scope: str = ""
    layer: str = ""
    parameters: int = 0
    bytes: int = 0
    macs: int | None = None


@dataclasses.dataclass(frozen=True)
class GraphSketch:
    """A graph: the class name of its model, and its nodes in order."""

    model: str
    nodes: tuple[NodeSketch, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is at its default is left out of a node."""
        return {"model": self.model, "nodes": [_without_defaults(node) for node in self.nodes]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraphSketch:
        """The inverse of :meth:`to_dict`."""
        nodes = ({**node, "inputs": tuple(node.get("inputs", ()))} for node in data["nodes"])
        return cls(data["model"], tuple(NodeSketch(**node) for node in nodes))


@dataclasses.dataclass(frozen=True)
class Curve:
    """How the error follows one setting of one layer, all else as it was.

    Attributes:
        layer: path of the layer.
        knob: what is set: ``"rank"``, ``"bits"``, ``"ratio"``, ...
        points: pairs of the setting and the error there.
    """

    layer: str
    knob: str
    points: tuple[tuple[float, float], ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Curve:
        """The inverse of ``dataclasses.asdict``."""
        return cls(data["layer"], data["knob"], tuple((float(x), float(y)) for x, y in data["points"]))


def curves_in(details: Iterable[Mapping[str, Any]]) -> Iterator[Curve]:
    """The curves that passes put into the details of their sites (see :data:`CURVE`)."""
    for detail in details:
        if detail.get(CURVE):
            yield Curve.from_dict({"layer": str(detail.get("module", detail["target"])), **detail[CURVE]})


def _without_defaults(node: NodeSketch) -> dict[str, Any]:
    values = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    kept = {f.name: values[f.name] for f in dataclasses.fields(node) if values[f.name] != f.default}
    return {**kept, "inputs": list(node.inputs)} if node.inputs else kept


def sketch(gm: fx.GraphModule, cost: Cost) -> GraphSketch:
    """The sketch of ``gm``, whose cost (or that of a copy of it) is ``cost``."""
    macs = {node.name: count for node, count in cost.macs_by_node.items()}
    values = {node.name: _in_words(value) for node, value in cost.values_by_node.items()}
    nodes = list(gm.graph.nodes)
    scopes, held, layers = scopes_of(gm), _Holdings(gm), _layers_of(nodes, macs)
    found = []
    for node in nodes:
        parameters, size = held.at(node)
        drawn = NodeSketch(
            name=node.name,
            op=node.op,
            kind=_kind(gm, node),
            target=target_of(node),
            inputs=tuple(source.name for source in node.all_input_nodes),
            settings=shortened(_settings(gm, node), _LONGEST),
            value=shortened(values.get(node.name, ""), _LONGEST),
            scope=scopes[node],
            layer=layers[node] if parameters or size or macs.get(node.name) else "",
            parameters=parameters,
            bytes=size,
            macs=macs.get(node.name),
        )
        found.append(drawn)
    return GraphSketch(type(gm).__name__, tuple(found))


def target_of(node: fx.Node) -> str:
    """What ``node`` calls or reads, in words: a module path, a method's or a function's name."""
    return node.target if isinstance(node.target, str) else torch.typename(node.target)


class _Holdings:
    """What memory nodes hold; each piece is given out once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        blocks = memory_blocks(gm.parameters())
        self._elements = {id(t): (i, block.elements) for i, block in enumerate(blocks) for t in block.tensors}
        blocks = memory_blocks([*gm.parameters(), *gm.buffers()])
        self._bytes = {id(t): (i, block.bytes) for i, block in enumerate(blocks) for t in block.tensors}
        self._seen: set[tuple[str, int]] = set()

    def at(self, node: fx.Node) -> tuple[int, int]:
        """Elements and bytes at ``node`` that no node before it has."""
        tensors = list(_tensors(self._gm, node))
        return self._new("elements", self._elements, tensors), self._new("bytes", self._bytes, tensors)

    def _new(self, what: str, sizes: Mapping[int, tuple[int, int]], tensors: Iterable[torch.Tensor]) -> int:
        total = 0
        for block, size in (sizes[id(t)] for t in tensors if id(t) in sizes):
            if (what, block) not in self._seen:
                self._seen.add((what, block))
                total += size
        return total


def _tensors(gm: fx.GraphModule, node: fx.Node) -> Iterator[torch.Tensor]:
    if node.op == "call_module":
        called = gm.get_submodule(str(node.target))
        yield from called.parameters()
        yield from called.buffers()
    elif node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(gm.get_submodule(owner), name)
        if isinstance(value, torch.Tensor):
            yield value


def _layers_of(nodes: Iterable[fx.Node], macs: Mapping[str, int]) -> dict[fx.Node, str]:
    """The layer that each node counts for: its own module, or that of the constant that it computes with."""
    constant: dict[fx.Node, str] = {}
    found: dict[fx.Node, str] = {}
    for node in nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr":
            constant[node] = owner_of(str(node.target))
        elif sources and all(source in constant for source in sources):
            constant[node] = next((constant[source] for source in sources if constant[source]), "")
        if node.op == "call_module":
            found[node] = str(node.target)
        elif node in constant:
            found[node] = constant[node] or node.name
        else:
            found[node] = next((constant[source] for source in sources if constant.get(source)), node.name)
    return found


def _kind(gm: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target) if node.op == "call_method" else node.op


def _settings(gm: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return _said(module) if next(module.children(), None) is None else ""
    if node.op in ("call_function", "call_method"):
        plain = [str(value) for value in node.args if not isinstance(value, fx.Node)]
        named = [f"{key}={value}" for key, value in node.kwargs.items() if not isinstance(value, fx.Node)]
        return ", ".join(plain + named)
    return ""


def _said(module: nn.Module) -> str:
    try:
        return " ".join(module.extra_repr().split())
    except Exception as error:  # the model's own code, which has nothing to do with what is compiled
        return f"extra_repr() failed: {type(error).__name__}"


def _in_words(value: Any) -> str:
    if isinstance(value, TensorSpec):
        return f"{'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_in_words, value))})"
    return value.__name__ if isinstance(value, type) else type(value).__name__
