"""After alignment: what no input, size, parameter or random number can change becomes a buffer; tensors that are made
anew in each run are made on the device of the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress import editing
from fxcompress.recording.facts import Depends
from fxcompress.recording.session import Session

__all__ = ["fold_constants", "follow_device"]

_LARGEST = 1 << 24
"""Elements above which a constant stays an operation: a mask of ones is cheaper to make than to store."""


def fold_constants(session: Session, root: torch.nn.Module) -> None:
    """Replace every constant that something else reads by a buffer ``constants.cN`` of ``root``.

    A value is constant if it depends on nothing, has no size expression among its arguments, and shares its memory
    with nothing that an operation of the graph changes after the first reader outside the constant part has run.
    """
    graph = session.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    constant = _constant_nodes(session, order)
    boundary = [n for n in graph.nodes if n in constant and any(u not in constant for u in n.users)]
    values = _evaluate(graph, constant, root)
    for node in boundary:
        value = values.get(node)
        if not isinstance(value, torch.Tensor) or value.numel() > _LARGEST or node.op == "get_attr":
            continue
        path = editing.unique_path(root, "constants.c0")
        editing.set_attribute(root, path, value.detach().clone())
        first = min((u for u in node.users if u not in constant), key=order.__getitem__)
        with graph.inserting_before(first):
            stored = graph.create_node("get_attr", path)
        for user in [u for u in node.users if u not in constant]:
            user.replace_input_with(node, stored)
    for node in reversed([n for n in graph.nodes if n in constant]):
        if not node.users:
            graph.erase_node(node)


def _constant_nodes(session: Session, order: dict[fx.Node, int]) -> set[fx.Node]:
    constant: set[fx.Node] = set()
    for node in session.graph.nodes:
        fact = session.ledger.facts.get(node)
        if node.op == "placeholder" or fact is None or fact.depends is not Depends.NOTHING:
            continue
        if all(source in constant for source in node.all_input_nodes):
            constant.add(node)
    while True:
        unsafe = {n for n in constant if _is_unsafe(n, session, constant, order)}
        if not unsafe:
            return constant
        constant -= unsafe
        constant = {n for n in constant if all(source in constant for source in n.all_input_nodes)}


def _is_unsafe(node: fx.Node, session: Session, constant: set[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether folding ``node`` would lose or repeat a change to its memory."""
    storage = session.ledger.facts[node].storage
    writers = session.ledger.mutations.get(storage, []) if storage is not None else []
    if not writers:
        return False
    if any(w not in constant for w in writers):
        return True
    sharing = [n for n in constant if session.ledger.facts[n].storage == storage]
    outside = [order[u] for n in sharing for u in n.users if u not in constant]
    return bool(outside) and min(outside) < max(order[w] for w in writers)


def _evaluate(graph: fx.Graph, constant: set[fx.Node], root: torch.nn.Module) -> dict[fx.Node, object]:
    class Constants(fx.Interpreter):
        """Runs only the constant nodes."""

        def run_node(self, n: fx.Node) -> object:
            return super().run_node(n) if n in constant else None

    if not constant:
        return {}
    interpreter = Constants(root, garbage_collect_values=False, graph=graph)
    with torch.no_grad():
        for node in graph.nodes:
            if node in constant:
                interpreter.env[node] = interpreter.run_node(node)
    return dict(interpreter.env)


def follow_device(graph: fx.Graph, first_tensor: fx.Node, device: torch.device) -> None:
    """Let operations that were given ``device`` by name use the device of the first input tensor instead, so that the
    graph moves with ``gm.to(...)``."""
    named = [n for n in graph.nodes if n.op != "placeholder" and _names_device((n.args, n.kwargs), device)]
    if not named:
        return
    with graph.inserting_before(named[0]):
        node = graph.call_function(getattr, (first_tensor, "device"))

    def put(value: Any) -> Any:
        return node if isinstance(value, torch.device) and value == device else value

    for user in named:
        user.args = fx.node.map_aggregate(user.args, put)
        user.kwargs = fx.node.map_aggregate(user.kwargs, put)


def _names_device(value: Any, device: torch.device) -> bool:
    found: list[bool] = []

    def look(leaf: Any) -> Any:
        found.append(isinstance(leaf, torch.device) and leaf == device)
        return leaf

    fx.node.map_aggregate(value, look)
    return any(found)
