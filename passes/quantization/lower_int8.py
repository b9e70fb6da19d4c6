"""Integer kernels in place of the reference graph that ``quantize`` makes (APPROXIMATE: within a quantum each).

Where a layer reads dequantised integers, the layer, what is added to its result, the activation function and the
rounding that follow become one call of an int8 kernel of oneDNN (``kernels.py``). Operations that only move integers
work on them directly. What is left of quantising and dequantising stands at the borders to real numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress import editing, matching
from fxcompress.analysis.memory import Memory
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.pass_base import Guarantee, Need, Pass, PassContext, Refusal, Site
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.kernels import Int8Conv, Int8Layer, Int8Linear, PostOp, to_uint8, unavailable
from fxcompress.passes.quantization.kernels import max_pool2d as integer_max_pool2d
from fxcompress.passes.quantization.placement import Chain, chains_of, is_carrier, part_of, sources_of
from fxcompress.passes.quantization.vocabulary import (
    PerTensor,
    is_dequantize,
    is_quantize,
    is_weight_dequantize,
    per_tensor,
)

__all__ = ["LowerInt8"]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_EIGHT_BITS = (torch.uint8, torch.int8)
_PER_CHANNEL_ARGUMENTS = 7
_FRESH = frozenset(("max_pool2d", "cat", "concat", "stack", "flip", "roll"))
_POOLS = frozenset(f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3))
_POOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)


@dataclasses.dataclass(frozen=True)
class LowerInt8(Pass):
    """Let quantised layers run on the int8 kernels of oneDNN, eagerly.

    Put it last: ``["fold-batch-norm", "quantize", "lower-int8"]``. On a machine whose processor or build of PyTorch has
    no such kernels the graph stays as it is, and the record says why. ``torch.compile`` of the reference graph is
    the other way to the same kernels; it also works on the graph that this pass makes, whose modules show it what they
    stand for.

    Detail of a site: ``op``, and for a layer ``module``, ``post``, ``adds`` (``"integers"``, ``"reals"`` or ``None``),
    ``gives`` (``"integers"`` or ``"reals"``).
    """

    name: ClassVar[str] = "lower-int8"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})
    trainable: ClassVar[bool] = False

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`: layers, then what is between them."""
        found = _Found(context)
        if found.lowerings and (reason := unavailable()):
            for lowering in found.lowerings:
                yield Refusal(lowering.layer, reason)
            return
        if found.lowerings:
            yield from self._sites(context, found)
        yield from found.refusals

    def _sites(self, context: PassContext, found: _Found) -> Iterator[Site]:
        for lowering in found.lowerings:
            yield Site(lowering.layer, lowering, lowering.said())
        memory = Memory(context.gm, lambda node: isinstance(context.shapes[node], TensorSpec))
        for node in context.gm.graph.nodes:
            if node.op == "call_method" and node.target == "view" and memory.writer_after(node) is None:
                yield Site(node, _Reshaped(node), {"op": "reshape"})
            if is_dequantize(node) and node.args[-1] is torch.int8:
                yield Site(node, _Shifted(node), {"op": "shift"})
        for node in context.gm.graph.nodes:
            if is_quantize(node) and node not in found.absorbed and node.args[-1] in _EIGHT_BITS:
                moved = _Moved.of(context, node)
                yield Site(node, moved or _Rounded(node), {"op": "round" if moved is None else "move"})

    def rewrite(self, site: Site) -> None:
        """See :meth:`Pass.rewrite`."""
        site.data.operate()


def _unsigned(by: PerTensor) -> PerTensor:
    """The same scale with unsigned integers, which kernels want: signed ones are moved up by 128."""
    if by.grid.dtype is torch.uint8:
        return by
    grid = Grid(by.grid.low + 128, by.grid.high + 128, torch.uint8)
    return PerTensor(by.scale, by.zero_point + 128, grid)


# ------------------------------------------------------------------------------------------------- layers
@dataclasses.dataclass(frozen=True, eq=False)
class _Lowering:
    """A layer that becomes a call of a kernel.

    Attributes:
        gm: the graph module.
        layer: the node.
        reads: the dequantisation that it reads.
        end: the last node of what the kernel does, before rounding.
        inner: the nodes before that, from the last to the layer.
        rounds: the quantisation after that; ``None`` if it gives real numbers.
        post: the activation function.
        other: what is added; a dequantisation if ``adds_integers``.
        adds_integers: whether the kernel adds integers.
        keeps_other: whether what is added is needed later, so that it may not be written to.
    """

    gm: fx.GraphModule
    layer: fx.Node
    reads: fx.Node
    end: fx.Node
    inner: tuple[fx.Node, ...]
    rounds: fx.Node | None
    post: PostOp
    other: fx.Node | None = None
    adds_integers: bool = False
    keeps_other: bool = False

    @property
    def path(self) -> str:
        """Of the layer."""
        weight = self.layer.args[1]
        assert isinstance(weight, fx.Node), "a layer of integer weights"
        return str(weight.args[0].target).rpartition(".")[0]  # type: ignore[union-attr]

    @property
    def last(self) -> fx.Node:
        """The node in whose place the kernel is called."""
        return self.end if self.rounds is None else self.rounds

    @property
    def addition(self) -> fx.Node:
        """The node that adds :attr:`other`, if there is one."""
        return (*self.inner[::-1], self.end)[1]

    def said(self) -> dict[str, Any]:
        """For the record."""
        adds = None if self.other is None else ("integers" if self.adds_integers else "reals")
        gives = "reals" if self.rounds is None else "integers"
        return {"op": "layer", "module": self.path, "post": self.post.name, "adds": adds, "gives": gives}

    def operate(self) -> None:
        """Put the kernel in place of all that it does."""
        graph = self.gm.graph
        path, module = self.path, self._module()
        if isinstance(self.gm.get_submodule(path), Int8Layer):  # an earlier call of the same weight took it
            path = editing.add_module(self.gm, path, module)
        else:
            editing.set_attribute(self.gm, path, module)
        with graph.inserting_before(self.last):
            arguments: list[Any] = [self.reads.args[0]]
            if self.other is not None:
                # Another kernel may have taken the place of what was to be added since.
                other = next(a for a in self.addition.args if a is not self.layer)
                assert isinstance(other, fx.Node), "the sum of two tensors"
                added = other.args[0] if self.adds_integers else other
                arguments.append(graph.call_method("clone", (added,)) if self.keeps_other else added)
            editing.replace(self.last, graph.call_module(path, tuple(arguments)))
        for node in (self.end, *self.inner):  # in place on what the layer gave, perhaps, and so not dead by itself
            if node is not self.last:
                editing.erase(node)

    def _module(self) -> Int8Layer:
        made = None if self.rounds is None else _unsigned(per_tensor(self.rounds))
        other = _unsigned(per_tensor(self.other)) if self.adds_integers and self.other is not None else None
        holder, given = self.gm.get_submodule(self.path), _unsigned(per_tensor(self.reads))
        common = (holder, given, made, self.post, self.other is not None, other)
        if matching.is_call(self.layer, ("linear",)):
            return Int8Linear(*common)
        stride, padding, dilation, groups = self.layer.args[3:7]
        sizes = {"stride": stride, "padding": padding, "dilation": dilation}
        return Int8Conv(*common, groups=groups, **{name: list(size) for name, size in sizes.items()})  # type: ignore[arg-type]


class _Found:
    """The layers of a graph that a kernel can take, and those that none can."""

    def __init__(self, context: PassContext) -> None:
        self._context = context
        self._position = {node: i for i, node in enumerate(context.gm.graph.nodes)}
        self.refusals: list[Refusal] = []
        layers = []
        for node in context.gm.graph.nodes:
            if not matching.is_call(node, ("linear", *_CONVOLUTIONS)) or not is_weight_dequantize(node.args[1]):
                continue
            if reason := self._obstacle(node):
                self.refusals.append(Refusal(node, reason))
            else:
                layers.append(node)
        drafts = [self._draft(chain) for chain in chains_of(context, layers).values()]
        self.absorbed = {d.rounds for d in drafts if d.rounds is not None}
        self._runs_at: dict[fx.Node, int] = {}
        for draft in drafts:
            for part in (draft.layer,) if draft.other is None else (draft.layer, draft.addition):
                self._runs_at[part] = self._position[draft.last]
        self.lowerings = [dataclasses.replace(d, keeps_other=self._keeps_other(d)) for d in drafts]

    def _obstacle(self, node: fx.Node) -> str | None:
        reads, weight = node.args[:2]
        if not is_dequantize(reads):
            return "does not read integers of a fixed scale"
        assert isinstance(reads, fx.Node)
        assert isinstance(weight, fx.Node)
        if reads.args[-1] not in _EIGHT_BITS:
            return "reads integers of more than 8 bits"
        if len(weight.args) != _PER_CHANNEL_ARGUMENTS or weight.args[3] != 0:
            return "its weight has other scales than one for each output channel"
        if self._context.shapes.dtype(node) is not torch.float32:
            return f"computes in {self._context.shapes.dtype(node)}, and the kernels in float32"
        if matching.is_call(node, ("linear",)):
            return None
        if not matching.is_call(node, ("conv2d",)):
            return f"there is no kernel for {matching.name_of_call(node)}"
        if isinstance(node.args[4], str):
            return f"has padding {node.args[4]!r}, of which the kernels know numbers only"
        if len(self._context.shapes.shape(node)) != len(("batch", "channel", "height", "width")):
            return "reads a single image without a batch dimension"
        return None

    def _draft(self, chain: Chain) -> _Lowering:
        layer = chain.layer
        reads, rest = layer.args[0], list(chain.nodes[1:])
        assert isinstance(reads, fx.Node)
        end, post, other = layer, PostOp(), chain.other
        if other is not None:
            end = rest.pop(0)
        if rest:
            found = post_op(self._context.gm, rest[0], linear=matching.is_call(layer, ("linear",)))
            if found is not None and (other is None or found.name == "relu"):
                post, end = found, rest[0]
        rounds = self._rounded_by(end)
        adds_integers = False
        if other is not None and rounds is not None:
            adds_integers = is_dequantize(other) and matching.is_call(layer, ("conv2d",))
            if not adds_integers:  # real numbers are added to real numbers only
                rounds = None
        nodes = chain.nodes[: chain.nodes.index(end)]
        return _Lowering(self._context.gm, layer, reads, end, nodes[::-1], rounds, post, other, adds_integers)

    def _rounded_by(self, end: fx.Node) -> fx.Node | None:
        readers = list(end.users)
        alone = len(readers) == 1 and is_quantize(readers[0]) and readers[0].args[-1] in _EIGHT_BITS
        return readers[0] if alone else None

    def _keeps_other(self, draft: _Lowering) -> bool:
        """Whether what a convolution adds, and writes its result to, may be read after that."""
        other = draft.other
        if other is None or matching.is_call(draft.layer, ("linear",)):
            return False
        if not draft.adds_integers:
            return len(other.users) > 1 or not is_dequantize(other)
        source = other.args[0]
        assert isinstance(source, fx.Node)
        if not is_quantize(source) or _is_view(self._context, source.args[0]):
            return True
        mine, now = self._runs_at, self._position[draft.last]
        for reader in {reader for reals in source.users for reader in reals.users}:
            if _is_view(self._context, reader):
                return True
            if mine.get(reader, -1) >= now and other not in reader.all_input_nodes:
                return True
        return sum(mine.get(reader, -1) >= now for reader in other.users) > 1


def _is_view(context: PassContext, node: Any) -> bool:
    """Whether ``node``, if it moves integers, may give the memory that it is given."""
    if not isinstance(node, fx.Node) or not (is_carrier(context, node) or part_of(node) is not None):
        return False
    return not matching.is_call(node, _FRESH) and matching.called(context.gm, node, nn.MaxPool2d) is None


def post_op(gm: fx.GraphModule, node: fx.Node, *, linear: bool) -> PostOp | None:
    """What ``node``, an activation function, is to the kernels; ``None`` if it is nothing to them."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    name = type(module).__name__.lower() if module is not None else matching.name_of_call(node).rstrip("_")

    def option(position: int, word: str, default: Any) -> Any:
        return getattr(module, word) if module is not None else matching.argument(node, position, word, default)

    if name in ("relu", "hardswish"):
        return PostOp(name)
    if name == "silu":
        return PostOp("swish")
    if name in ("relu6", "hardtanh", "clamp"):
        words = ("min", "max") if name == "clamp" else ("min_val", "max_val")
        limits = (0.0, 6.0) if name == "relu6" else (option(1, words[0], None), option(2, words[1], None))
        if name == "hardtanh" and module is None:
            limits = (option(1, "min_val", -1.0), option(2, "max_val", 1.0))
        if all(isinstance(v, (int, float)) for v in limits):
            return PostOp("hardtanh", (float(limits[0]), float(limits[1])))
        return None
    if not linear:
        return None
    if name == "gelu":
        return PostOp("gelu", (), option(1, "approximate", "none"))
    if name == "leaky_relu" or name == "leakyrelu":
        return PostOp("leaky_relu", (float(option(1, "negative_slope", 0.01)),))
    return PostOp("tanh") if name == "tanh" else None


# ------------------------------------------------------------------------------------------------- between layers
@dataclasses.dataclass(frozen=True, eq=False)
class _Moved:
    """An operation that moves dequantised integers and whose result is quantised to the same scale: it moves integers.

    Attributes:
        context: of the graph.
        rounds: the quantisation.
    """

    context: PassContext
    rounds: fx.Node

    @classmethod
    def of(cls, context: PassContext, rounds: fx.Node) -> _Moved | None:
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
        if matching.called(self.context.gm, value, *_DROPOUTS) is not None:
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
class _Rounded:
    """A quantisation that stays, at the border from real numbers, by faster steps."""

    node: fx.Node

    def operate(self) -> None:
        """Put them in."""
        by = _unsigned(per_tensor(self.node))
        with self.node.graph.inserting_before(self.node):
            arguments = (self.node.args[0], by.scale, by.zero_point, by.grid.low, by.grid.high)
            editing.replace(self.node, self.node.graph.call_function(to_uint8, arguments))


@dataclasses.dataclass(frozen=True, eq=False)
class _Shifted:
    """A dequantisation of signed integers, which are unsigned now."""

    node: fx.Node

    def operate(self) -> None:
        """Let it read those."""
        self.node.args = (self.node.args[0], *_unsigned(per_tensor(self.node)).arguments)


@dataclasses.dataclass(frozen=True, eq=False)
class _Reshaped:
    """A view that may not be one any more: kernels give their results channels last."""

    node: fx.Node

    def operate(self) -> None:
        """Let it copy where it must."""
        self.node.target = "reshape"
