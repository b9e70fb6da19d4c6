"""Which tensor of a network's output losses read, and the node that gives it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxcompress.analysis.outputs import tensor_leaves
from fxcompress.analysis.running import GraphRunner
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.pass_base import Example

__all__ = ["output_node", "output_read"]


def output_read(output: Any, path: str | None) -> tuple[str, Tensor]:
    """The tensor of ``output`` that losses read: the first, or that at ``path``; and how it is reached.

    Raises:
        UsageError: there is none.
    """
    found = [(where.removeprefix("output"), t) for where, t in tensor_leaves(output) if t.is_floating_point()]
    for where, tensor in found:
        if path is None or where in (path, f".{path}", f"[{path!r}]"):
            return where, tensor
    known = ", ".join(repr(where) for where, _ in found) or "none"
    raise UsageError(f"there is no output {path!r} for losses to read; tensors in it: {known}")


class _Origins(GraphRunner):
    """Which node last gave an object."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.origin: dict[int, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            self.origin[id(result)] = n
        return result


def output_node(gm: fx.GraphModule, example: Example, path: str | None) -> fx.Node:
    """The node that gives the tensor that losses read of what ``gm`` gives.

    Raises:
        UsageError: there is no such tensor.
        PreconditionError: no node gives it by itself.
    """
    run = _Origins(gm)
    where, tensor = output_read(run.observe(example.args, example.kwargs), path)
    node = run.origin.get(id(tensor))
    if node is None:
        raise PreconditionError(f"no node gives output{where} by itself; choose another with `output`")
    return node
