"""Layers that read dequantised integers, and what a kernel of ``kernels.py`` does in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxcompress import editing, matching
from fxcompress.pass_base import PassContext, Refusal
from fxcompress.passes.quantization.kernels import (
    WRONG_KERNEL,
    Int8Conv,
    Int8Layer,
    Int8Linear,
    IntegerLayer,
    PostOp,
    is_right,
    unavailable,
)
from fxcompress.passes.quantization.lowering_between import is_view, unsigned
from fxcompress.passes.quantization.placement import Chain, chains_of
from fxcompress.passes.quantization.vocabulary import (
    is_by_output,
    is_dequantize,
    is_quantize,
    is_weight_dequantize,
    per_tensor,
)

__all__ = ["EIGHT_BITS", "OTHER_SCALES", "FoundLayers", "LayerLowering", "fused", "path_of", "post_op", "put_kernel"]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
EIGHT_BITS = (torch.uint8, torch.int8)
OTHER_SCALES = "its weight has other scales than one for each output channel"


@dataclasses.dataclass(frozen=True, eq=False)
class LayerLowering:
    """A layer that becomes a call of a kernel.

    Attributes:
        gm: the graph module.
        layer: the node.
        reads: the dequantisation that it reads.
        end: the last node of what the kernel does, before rounding.
        inner: the nodes before that, from the last to the layer.
        rounds: the quantisation after that; ``None`` if it gives real numbers.
        post: the activation function.
        addition: what adds :attr:`other`, if something does.
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
    addition: fx.Node | None = None
    other: fx.Node | None = None
    adds_integers: bool = False
    keeps_other: bool = False

    @property
    def last(self) -> fx.Node:
        """The node in whose place the kernel is called."""
        return self.end if self.rounds is None else self.rounds

    def said(self) -> dict[str, Any]:
        """For the record."""
        adds = None if self.other is None else ("integers" if self.adds_integers else "reals")
        gives = "reals" if self.rounds is None else "integers"
        return {"op": "layer", "module": path_of(self.layer), "post": self.post.name, "adds": adds, "gives": gives}

    def operate(self) -> None:
        """Put the kernel in place of all that it does."""
        graph = self.gm.graph
        path = put_kernel(self.gm, self.layer, self.module())
        with graph.inserting_before(self.last):
            arguments: list[Any] = [self.reads.args[0]]
            if self.addition is not None:
                # Another kernel may have taken the place of what was to be added since.
                other = next(a for a in self.addition.args if a not in self.inner)
                assert isinstance(other, fx.Node), "the sum of two tensors"
                added = other.args[0] if self.adds_integers else other
                arguments.append(graph.call_method("clone", (added,)) if self.keeps_other else added)
            editing.replace(self.last, graph.call_module(path, tuple(arguments)))
        for node in (self.end, *self.inner):  # in place on what the layer gave, perhaps, and so not dead by itself
            if node is not self.last:
                editing.erase(node)

    def module(self) -> Int8Layer:
        """What calls the kernel."""
        made = None if self.rounds is None else unsigned(per_tensor(self.rounds))
        other = unsigned(per_tensor(self.other)) if self.adds_integers and self.other is not None else None
        holder, given = self.gm.get_submodule(path_of(self.layer)), unsigned(per_tensor(self.reads))
        common = (holder, given, made, self.post, self.other is not None, other)
        if matching.is_call(self.layer, ("linear",)):
            return Int8Linear(*common)
        stride, padding, dilation, groups = self.layer.args[3:7]
        sizes = {"stride": stride, "padding": padding, "dilation": dilation}
        return Int8Conv(*common, groups=groups, **{name: list(size) for name, size in sizes.items()})  # type: ignore[arg-type]


class FoundLayers:
    """The layers of a graph that a kernel can take, and those that none can.

    Attributes:
        lowerings: of layers that read integers of a fixed scale.
        absorbed: the quantisations that become part of these.
        on_reals: linear layers that read anything else.
        refusals: the others.
    """

    def __init__(self, context: PassContext) -> None:
        self._context = context
        self._position = {node: i for i, node in enumerate(context.gm.graph.nodes)}
        self.refusals: list[Refusal] = []
        self.on_reals: list[fx.Node] = []
        layers = []
        for node in context.gm.graph.nodes:
            if not matching.is_call(node, ("linear", *_CONVOLUTIONS)):
                continue
            if not is_weight_dequantize(matching.argument(node, 1, "weight", None)):
                continue
            if reason := self._obstacle(node):
                self.refusals.append(Refusal(node, reason))
            elif not is_dequantize(node.args[0]):
                self.on_reals.append(node)
            else:
                layers.append(node)
        drafts = list(filter(self._has_kernel, map(self._draft, chains_of(context, layers).values())))
        self.absorbed = {d.rounds for d in drafts if d.rounds is not None}
        self._runs_at: dict[fx.Node, int] = {}
        for draft in drafts:
            for part in filter(None, (draft.layer, draft.addition)):
                self._runs_at[part] = self._position[draft.last]
        self.lowerings = [dataclasses.replace(d, keeps_other=self._keeps_other(d)) for d in drafts]

    def _obstacle(self, node: fx.Node) -> str | None:
        reads, weight = node.args[:2]
        assert isinstance(weight, fx.Node)
        if self._context.shapes.dtype(node) is not torch.float32:
            return f"computes in {self._context.shapes.dtype(node)}, and the kernels in float32"
        if not is_dequantize(reads):
            return None if matching.is_call(node, ("linear",)) else "does not read integers of a fixed scale"
        assert isinstance(reads, fx.Node)
        if reads.args[-1] not in EIGHT_BITS:
            return "reads integers of more than 8 bits"
        if not is_by_output(weight):
            return OTHER_SCALES
        if matching.is_call(node, ("linear",)):
            return None
        if not matching.is_call(node, ("conv2d",)):
            return f"there is no kernel for {matching.name_of_call(node)}"
        if isinstance(node.args[4], str):
            return f"has padding {node.args[4]!r}, of which the kernels know numbers only"
        if len(self._context.shapes.shape(node)) != len(("batch", "channel", "height", "width")):
            return "reads a single image without a batch dimension"
        return None

    def _draft(self, chain: Chain) -> LayerLowering:
        layer, other, reads = chain.layer, chain.other, chain.layer.args[0]
        assert isinstance(reads, fx.Node)
        nodes, post = fused(self._context.gm, chain)
        rounds = self._rounded_by(nodes[-1])
        adds_integers = False
        if other is not None and rounds is not None:
            adds_integers = is_dequantize(other) and matching.is_call(layer, ("conv2d",))
            if not adds_integers:  # real numbers are added to real numbers only
                rounds = None
        inner = nodes[-2::-1]
        return LayerLowering(
            self._context.gm, layer, reads, nodes[-1], inner, rounds, post, chain.addition, other, adds_integers
        )

    def _has_kernel(self, draft: LayerLowering) -> bool:
        """Whether the kernel is right for what the example has; otherwise the layer is refused."""
        if unavailable():
            return True  # which is said of all of them
        shapes = self._context.shapes
        x, other = torch.empty(shapes.shape(draft.reads), dtype=torch.uint8), None
        if draft.other is not None:
            dtype = torch.uint8 if draft.adds_integers else torch.float32
            other = torch.empty(shapes.shape(draft.other), dtype=dtype)
        if not x.numel() or is_right(draft.module(), x, other):
            return True
        self.refusals.append(Refusal(draft.layer, WRONG_KERNEL))
        return False

    def _rounded_by(self, end: fx.Node) -> fx.Node | None:
        readers = list(end.users)
        alone = len(readers) == 1 and is_quantize(readers[0]) and readers[0].args[-1] in EIGHT_BITS
        return readers[0] if alone else None

    def _keeps_other(self, draft: LayerLowering) -> bool:
        """Whether what a convolution adds, and writes its result to, may be read after that."""
        other = draft.other
        if other is None or matching.is_call(draft.layer, ("linear",)):
            return False
        if not draft.adds_integers:
            return len(other.users) > 1 or not is_dequantize(other)
        source = other.args[0]
        assert isinstance(source, fx.Node)
        if not is_quantize(source) or is_view(self._context, source.args[0]):
            return True
        now = self._position[draft.last]
        readers = [(reals, reader) for reals in source.users for reader in reals.users if reader is not draft.addition]
        return any(is_view(self._context, n) or self._read_at(reals, n) >= now for reals, n in readers)

    def _read_at(self, reals: fx.Node, reader: fx.Node) -> int:
        """Where in the lowered graph the integers behind ``reals`` are read for ``reader``, at the latest."""
        if reader in self._runs_at:
            return self._runs_at[reader]
        # What moves integers is done where its result is rounded; what reads real numbers has them from ``reals``.
        rounds = [self._position[n] for n in reader.users if is_quantize(n)]
        return max(rounds, default=self._position[reals])


def put_kernel(gm: fx.GraphModule, layer: fx.Node, module: IntegerLayer) -> str:
    """Put ``module`` where the weight of ``layer`` is, or beside it if an earlier call of the same weight took that;
    returns its path."""
    path = path_of(layer)
    if isinstance(gm.get_submodule(path), IntegerLayer):
        return editing.add_module(gm, path, module)
    editing.set_attribute(gm, path, module)
    return path


def fused(gm: fx.GraphModule, chain: Chain) -> tuple[tuple[fx.Node, ...], PostOp]:
    """What of ``chain`` a kernel does, and the activation function at its end: after an addition they know relu."""
    if chain.activation is None:
        return chain.nodes, PostOp()
    post = post_op(gm, chain.activation, linear=matching.is_call(chain.layer, ("linear",)))
    if post is not None and (chain.other is None or post.name == "relu"):
        return chain.nodes, post
    return chain.nodes[: chain.nodes.index(chain.activation)], PostOp()


def path_of(layer: fx.Node) -> str:
    """Where the weight and the bias are of a layer of integer weights."""
    reals = layer.args[1]
    assert isinstance(reals, fx.Node), "a layer of integer weights"
    return next(str(n.target).rpartition(".")[0] for n in _back(reals) if n.op == "get_attr")


def _back(node: fx.Node) -> Iterator[fx.Node]:
    """``node``, and the first input of each from there on."""
    while True:
        yield node
        if not node.all_input_nodes:
            return
        node = node.all_input_nodes[0]


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
