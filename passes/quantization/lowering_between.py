"""What stands between layers on integers: operations that move them, and roundings at the borders to real numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress import editing, matching
from fxcompress.pass_base import PassContext
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.kernels import max_pool2d as integer_max_pool2d
from fxcompress.passes.quantization.kernels import to_uint8
from fxcompress.passes.quantization.placement import is_carrier, is_idle, padding_of, part_of, sources_of
from fxcompress.passes.quantization.vocabulary import PerTensor, is_dequantize, per_tensor

__all__ = ["Moved", "Reshaped", "Rounded", "Shifted", "is_view", "unsigned", "unsigned_grid"]

_FRESH = frozenset(("max_pool2d", "cat", "concat", "stack", "flip", "roll"))
_POOLS = frozenset(f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3))
_POOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip


def unsigned(by: PerTensor) -> PerTensor:
    """The same scale with unsigned integers, which kernels want: signed ones are moved up by 128."""
    grid = unsigned_grid(by.grid)
    return PerTensor(by.scale, by.zero_point + grid.low - by.grid.low, grid)


def unsigned_grid(grid: Grid) -> Grid:
    """The unsigned integers to which those of 8 bits are moved."""
    return grid if grid.dtype is torch.uint8 else Grid(grid.low + 128, grid.high + 128, torch.uint8)


def is_view(context: PassContext, node: Any) -> bool:
    """Whether ``node``, if it moves integers, may give the memory that it is given."""
    if not isinstance(node, fx.Node) or not (is_carrier(context, node) or part_of(node) is not None):
        return False
    if matching.is_call(node, _FRESH) or padding_of(context, node) is not None:
        return False
    return matching.called(context.gm, node, nn.MaxPool2d) is None


@dataclasses.dataclass(frozen=True, eq=False)
class Moved:
    """An operation that moves dequantised integers and whose result is quantised to the same scale: it moves integers.

    Attributes:
        context: of the graph.
        rounds: the quantisation.
    """

    context: PassContext
    rounds: fx.Node

    @classmethod
    def of(cls, context: PassContext, rounds: fx.Node) -> Moved | None:
        """That which ends in ``rounds``, if there is one that can be done with integers."""
        value = rounds.args[0]
        if not isinstance(value, fx.Node) or not is_carrier(context, value):
            return None
        sources, scale = sources_of(value), per_tensor(rounds)
        if not sources or not all(is_dequantize(s) and per_tensor(s) == scale for s in sources):
            return None
        pools = matching.is_call(value, _POOLS) or matching.called(context.gm, value, *_POOL_MODULES) is not None
        if pools and _pool_sizes(context, value) is None:
            return None
        return cls(context, rounds)

    def operate(self) -> None:
        """Do it with integers."""
        value = self.rounds.args[0]
        assert isinstance(value, fx.Node)
        with self.rounds.graph.inserting_before(self.rounds):
            editing.replace(self.rounds, self._moved(value))

    def _moved(self, value: fx.Node) -> fx.Node:
        graph = value.graph
        integers: dict[fx.Node, Any] = {reals: reals.args[0] for reals in sources_of(value)}
        if (whole := part_of(value)) is not None:
            parts = graph.node_copy(whole, lambda n: integers.get(n, n))
            return graph.call_function(value.target, (parts, *value.args[1:]))  # type: ignore[arg-type]
        sizes = _pool_sizes(self.context, value)
        if sizes is not None:
            return graph.call_function(integer_max_pool2d, (next(iter(integers.values())), *sizes))
        padding = padding_of(self.context, value)
        if padding is not None:
            (reals,) = sources_of(value)
            zero = unsigned(per_tensor(reals)).zero_point
            return graph.call_function(F.pad, (reals.args[0], padding), {"value": zero})
        if is_idle(self.context, value):
            kept: fx.Node = next(iter(integers.values()))
            return kept
        return graph.node_copy(value, lambda n: integers.get(n, n))


def _pool_sizes(context: PassContext, node: fx.Node) -> tuple[Any, ...] | None:
    """Kernel size, stride, padding, dilation and ceil mode of max-pooling over two dimensions."""
    module = matching.called(context.gm, node, nn.MaxPool2d)
    words = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    if module is not None:
        given = [getattr(module, word) for word in words]
    elif matching.is_call(node, ("max_pool2d",)):
        defaults = (None, None, 0, 1, False)
        given = [matching.argument(node, i + 1, w, d) for i, (w, d) in enumerate(zip(words, defaults, strict=True))]
    else:
        return None
    given[1] = given[0] if given[1] is None else given[1]
    if any(isinstance(v, fx.Node) for v in given):
        return None
    return (*([v, v] if isinstance(v, int) else list(v) for v in given[:4]), given[4])


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
    """A quantisation that stays, at the border from real numbers, by faster steps."""

    node: fx.Node

    def operate(self) -> None:
        """Put them in."""
        by = unsigned(per_tensor(self.node))
        with self.node.graph.inserting_before(self.node):
            arguments = (self.node.args[0], by.scale, by.zero_point, by.grid.low, by.grid.high)
            editing.replace(self.node, self.node.graph.call_function(to_uint8, arguments))


@dataclasses.dataclass(frozen=True, eq=False)
class Shifted:
    """A dequantisation of signed integers, which are unsigned now."""

    node: fx.Node

    def operate(self) -> None:
        """Let it read those."""
        self.node.args = (self.node.args[0], *unsigned(per_tensor(self.node)).arguments)


@dataclasses.dataclass(frozen=True, eq=False)
class Reshaped:
    """A view that may not be one any more: kernels give their results channels last."""

    node: fx.Node

    def operate(self) -> None:
        """Let it copy where it must."""
        self.node.target = "reshape"
