"""Taps: the values inside a network that a loss on features reads, by name, and pairs of them that fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxcompress import matching
from fxcompress.analysis.shapes import Shapes, TensorSpec, shapes
from fxcompress.errors import UsageError
from fxcompress.examples import as_example
from fxcompress.report import PassRecord
from fxcompress.scopes import end_of
from fxcompress.trace import trace

__all__ = ["pairs_of", "resolve_tap", "suggest_taps"]


def resolve_tap(gm: fx.GraphModule, name: str, of: str, history: Sequence[PassRecord] = ()) -> fx.Node:
    """The node whose value the tap ``name`` reads.

    Args:
        gm: the network.
        name: of a node; or the path of a module: what its last call gives. Of a module that is no call in the graph and
            whose last node is there no more, what leaves the calls inside it, where that is one value.
        of: whose tap it is, for messages.
        history: of ``gm``: which pass may have taken a module away.

    Raises:
        UsageError: there is no such place, or it is not clear; the message says what comes near, or which pass
            rewrote it.
    """
    nodes: list[fx.Node] = [n for n in gm.graph.nodes if n.op != "output"]
    for node in nodes:
        if node.name == name:
            return node
    calls = [n for n in nodes if n.op == "call_module" and n.target == name]
    if calls:
        return calls[-1]
    end = end_of(gm, name)
    if end is not None:
        return end
    inside = {n for n in nodes if n.op in ("call_module", "get_attr") and str(n.target).startswith(f"{name}.")}
    if inside:
        leaving = _leaving(nodes, inside)
        if len(leaving) == 1:
            return leaving[0]
        found = ", ".join(matching.describe(gm, n) for n in leaving[:8])
        raise UsageError(f"{len(leaving)} values leave {name!r} of the {of} ({found}); name the node that is meant")
    raise UsageError(_missing(gm, name, of, history))


def _leaving(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
    """The values that others read of the nodes that lie between those ``inside``; sums of these are taken along."""
    nodes = list(nodes)
    after, before = set(inside), set(inside)
    for node in nodes:
        if not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    for node in reversed(nodes):
        if not before.isdisjoint(node.users):
            before.add(node)
    region = after & before
    entering = {source for node in inside for source in node.all_input_nodes if source not in region}
    while True:
        leaving = [n for n in nodes if n in region and n.op != "get_attr" and any(u not in region for u in n.users)]
        joins = {
            user
            for node in leaving
            for user in node.users
            if user not in region and user.op != "call_module" and len(user.all_input_nodes) > 1
            and region.union(entering).issuperset(user.all_input_nodes)
        }  # fmt: skip
        if not joins:
            return leaving
        region |= joins


def _missing(gm: fx.GraphModule, name: str, of: str, history: Sequence[PassRecord]) -> str:
    for record in reversed(history):
        for detail in record.details:
            values = [str(v) for v in detail.values()]
            if any(v == name or v.startswith(f"{name}.") for v in values):
                others = ", ".join(v for k, v in detail.items() if isinstance(v, str) and k != "node" and v != name)
                return (
                    f"there is no tap {name!r} in the {of} any more: pass {record.name!r} rewrote it; name what took "
                    f"its place ({others or 'see the report'}), or attach before that pass"
                )
    known = {n.name for n in gm.graph.nodes if n.op != "output"}
    for path in (str(n.target) for n in gm.graph.nodes if n.op == "call_module"):
        parts = path.split(".")
        known |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.0)
    return f"there is no module or node {name!r} in the {of}; near it: {', '.join(near)}"


# ------------------------------------------------------------------------------------------------- suggestions
def suggest_taps(
    student: nn.Module,
    teacher: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    most: int = 4,
) -> list[tuple[str, str]]:
    """Pairs of taps at like positions and of like shapes.

    Of feature maps the last of each spatial size that both networks have is taken, as in attention transfer
    (Zagoruyko & Komodakis 2017, section 3.1); where all have one size, as in a transformer, values at even distances.

    Args:
        student: the network that learns, or its graph.
        teacher: the network that is learnt from, or its graph.
        example_inputs: inputs of both; see :func:`fxcompress.trace`.
        example_kwargs: keyword arguments of both.
        most: at most so many pairs, the deepest.

    Returns:
        (tap of the student, tap of the teacher), in the order in which they are computed.

    Raises:
        UsageError: no two values have like shapes.
    """
    example = as_example(example_inputs, example_kwargs)
    if example is None:
        raise UsageError("shapes of taps come from a run; pass `example_inputs`")
    args, kwargs = example.args, dict(example.kwargs)
    mine, theirs = (trace(network, args, example_kwargs=kwargs) for network in (student, teacher))
    return pairs_of((mine, shapes(mine, args, kwargs)), (theirs, shapes(theirs, args, kwargs)), most)


def pairs_of(
    student: tuple[fx.GraphModule, Shapes], teacher: tuple[fx.GraphModule, Shapes], most: int = 4
) -> list[tuple[str, str]]:
    """What :func:`suggest_taps` says of graphs whose shapes are known."""
    mine, theirs = _candidates(*student), _candidates(*teacher)
    common = [size for size in mine if size in theirs]
    if not common:
        raise UsageError(
            "no feature of the student has the positions of one of the teacher's: "
            f"{sorted(mine)} and {sorted(theirs)}; name pairs yourself, and resize=True"
        )
    if len(common) > 1:
        return [(mine[size][-1], theirs[size][-1]) for size in common][-most:]
    found = [names[common[0]] for names in (mine, theirs)]
    ends = [[names[(i + 1) * len(names) // most - 1] for i in range(most)] for names in found]
    return list(dict.fromkeys(zip(*ends, strict=True)))


def _candidates(gm: fx.GraphModule, known: Shapes) -> dict[tuple[int, ...], list[str]]:
    """What modules and sums give, by the sizes of its positions (height and width, or tokens), in graph order."""
    found: dict[tuple[int, ...], list[str]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module" and not matching.is_call(node, ("add", "iadd", "add_")):
            continue
        spec = known[node]
        if not isinstance(spec, TensorSpec) or not spec.dtype.is_floating_point or len(spec.shape) not in (3, 4):
            continue
        positions = spec.shape[2:] if len(spec.shape) == 4 else spec.shape[1:2]
        if max(positions) > 1:
            single = node.op == "call_module" and sum(n.target == node.target for n in gm.graph.nodes) == 1
            found.setdefault(tuple(positions), []).append(str(node.target) if single else node.name)
    return found
