"""Shape, dtype and device of every value in a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.analysis.running import GraphRunner
from fxcompress.errors import UsageError

__all__ = ["Shapes", "TensorSpec", "outline", "shapes"]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor without its elements."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass(frozen=True, eq=False)
class Shapes:
    """The values of one run with a :class:`TensorSpec` in place of every tensor. Made by :func:`shapes`.

    ``shapes[node]`` keeps containers as they are (a ``split`` gives a tuple of specs) and so does it with other values
    (``x.size(0)`` gives an int).
    """

    specs: Mapping[fx.Node, Any] = dataclasses.field(repr=False)

    def __contains__(self, node: object) -> bool:
        return node in self.specs

    def __getitem__(self, node: fx.Node) -> Any:
        """The value of ``node``, specs for tensors.

        Raises:
            UsageError: ``node`` was not in the graph when it ran.
        """
        if node not in self.specs:
            raise UsageError(f"node '{node}' has no recorded shape: it was not in the graph when shapes() ran it")
        return self.specs[node]

    def spec(self, node: fx.Node) -> TensorSpec:
        """The spec of ``node``, whose value must be a single tensor.

        Raises:
            UsageError: it is not, or ``node`` was not in the graph when it ran.
        """
        value = self[node]
        if not isinstance(value, TensorSpec):
            raise UsageError(
                f"node '{node}' ({node.op} {node.target}) should be a tensor but is a {type(value).__name__}; "
                "use shapes[node] for its structure"
            )
        return value

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of the tensor at ``node``; raises like :meth:`spec`."""
        return self.spec(node).shape

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype of the tensor at ``node``; raises like :meth:`spec`."""
        return self.spec(node).dtype


def shapes(gm: fx.GraphModule, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Shapes:
    """Run ``gm(*args, **kwargs)`` once and record the shape, dtype and device of every node's value.

    The module (also batch norm in training mode), the inputs and the random state stay as they were.

    Raises:
        UsageError: the inputs do not fit the graph.
    """
    runner = _ShapeRunner(gm)
    runner.observe(args, kwargs)
    return Shapes(runner.specs)


class _ShapeRunner(GraphRunner):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.specs: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        # At once: a later in-place operation may change the shape of this very tensor.
        self.specs[n] = pytree.tree_map_only(torch.Tensor, _spec, value)
        return value


def outline(value: Any) -> Any:
    """``value`` with a :class:`TensorSpec` in place of every tensor and its type in place of every other leaf."""
    return pytree.tree_map(lambda leaf: _spec(leaf) if isinstance(leaf, torch.Tensor) else type(leaf), value)


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device)
