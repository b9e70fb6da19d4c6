"""Which activations of a graph may lie in the same memory, and which are written in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import fx, nn

from fxcompress import matching
from fxcompress.editing import is_inplace
from fxcompress.modules import GroupedLinear, ScaledDotProductAttention

__all__ = ["Memory"]

_OWN_MODULES = (GroupedLinear, ScaledDotProductAttention)
"""Of this package; they give new tensors and write to nothing."""

# Files of torch.nn.modules whose modules return new tensors (unless in place), and calls that do.
_FRESH_FILES = frozenset(
    "activation batchnorm conv instancenorm normalization padding pooling sparse upsampling".split()
)
_FRESH_CALLS = frozenset(
    "add sub mul div truediv matmul bmm addmm cat stack where clone linear conv1d conv2d conv3d relu relu6 gelu silu "
    "mish elu selu leaky_relu hardswish hardsigmoid sigmoid tanh softmax log_softmax softplus exp log sqrt rsqrt neg "
    "abs pow mean sum amax amin argmax argmin batch_norm layer_norm group_norm instance_norm embedding pad interpolate "
    "scaled_dot_product_attention max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d size dim numel".split()
)
# What gives a tensor without gaps or overlaps if it is given one.
_REARRANGING_CALLS = frozenset(
    "view reshape flatten permute transpose unsqueeze squeeze contiguous detach dropout dropout1d dropout2d dropout3d "
    "alpha_dropout feature_alpha_dropout".split()
)
_VIEWING_CALLS = _REARRANGING_CALLS | frozenset("expand narrow select chunk split unbind getitem to type".split())
# What fails, or gives something else, on a tensor of the same values and other strides.
_STRIDED_CALLS = frozenset(
    "view view_as unflatten as_strided view_as_real view_as_complex stride is_contiguous storage_offset".split()
)


class Memory:
    """Classes of values that may share memory, erring on the safe side, and the last writer of each.

    Values are classed together (union-find, near-linear time) unless an operation is known to return a new tensor. This
    is a question about activations; for parameters ask ``fxcompress.analysis.aliasing``.

    Args:
        gm: the graph; it must not change while this object is in use.
        is_tensor: whether a node gives one tensor, which tells the sum of two tensors from that of two lists.
    """

    def __init__(self, gm: fx.GraphModule, is_tensor: Callable[[fx.Node], bool]) -> None:
        self._gm = gm
        self._is_tensor = is_tensor
        self._parent: dict[fx.Node, fx.Node] = {}
        self._position: dict[fx.Node, int] = {}
        for position, node in enumerate(gm.graph.nodes):
            self._parent[node] = node
            self._position[node] = position
            for source in self.passed_on(node):
                self._parent[self._root(source)] = self._root(node)
        self._last_strided: fx.Node | None = None
        self._last_writer: dict[fx.Node, fx.Node] = {}
        self._writes: list[tuple[fx.Node, fx.Node]] = []
        self._outside: dict[fx.Node, set[str]] = {}
        for node in gm.graph.nodes:
            if self._is_strided(node):
                self._last_strided = node
            for written in self._written_by(node):
                self._last_writer[self._root(written)] = node
                self._writes.append((node, written))
            if node.op in ("placeholder", "get_attr", "output"):
                for value in node.all_input_nodes or [node]:
                    self._outside.setdefault(self._root(value), set()).add(node.op)

    def obstacle_to_sharing(self, copy: fx.Node, source: fx.Node, *, keeps_strides: bool) -> str | None:
        """Why ``copy``, a node that copies ``source``, could not as well be ``source`` itself; ``None`` if it could.

        Args:
            copy: the node.
            source: what it copies.
            keeps_strides: whether the copy of a tensor without gaps or overlaps has that tensor's strides.
        """
        for value in (copy, source):
            writer = self._last_writer.get(self._root(value))
            if writer is not None and self._position[writer] > self._position[copy]:
                return f"{matching.describe(self._gm, writer)} may write to it or to its original later"
        handed_out = "output" in self._outside.get(self._root(copy), ())
        if handed_out and self._outside.get(self._root(source)):
            return "both it and its original are seen outside the graph"
        strided = self._last_strided
        alike = keeps_strides and self._is_dense(source)
        if strided is not None and not alike and self._position[strided] > self._position[copy]:
            return f"{matching.describe(self._gm, strided)} may count on how the copy lies in memory"
        return None

    def writer_between(self, value: fx.Node, reader: fx.Node) -> fx.Node | None:
        """The first node that may write to ``value`` after it was made and before ``reader`` reads it."""
        root, first, last = self._root(value), self._position[value], self._position[reader]
        found = (node for node, of in self._writes if first < self._position[node] < last and self._root(of) is root)
        return next(found, None)

    def writer_after(self, value: fx.Node) -> fx.Node | None:
        """The last node that may write to ``value`` after it was made."""
        writer = self._last_writer.get(self._root(value))
        return writer if writer is not None and self._position[writer] > self._position[value] else None

    def sharing(self, value: fx.Node) -> list[fx.Node]:
        """Every node whose value may share memory with ``value``, itself among them, in graph order."""
        root = self._root(value)
        return [node for node in self._position if self._root(node) is root]

    def _is_dense(self, node: fx.Node) -> bool:
        """Whether a tensor surely has neither gaps nor overlaps: newly made, or rearranged from one that was."""
        source = matching.tensor_input(node)
        while source is not None and (self._only_rearranges(node) or is_inplace(node)):
            node, source = source, matching.tensor_input(source)
        return self._is_fresh(node)

    def _only_rearranges(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._gm.get_submodule(str(node.target))
            return type(module) is nn.Identity or type(module).__module__ == "torch.nn.modules.dropout"
        return matching.is_call(node, _REARRANGING_CALLS)

    def _root(self, node: fx.Node) -> fx.Node:
        root = node
        while self._parent[root] is not root:
            root = self._parent[root]
        while self._parent[node] is not root:  # path compression
            self._parent[node], node = root, self._parent[node]
        return root

    def passed_on(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of ``node`` that its result may share memory with."""
        if node.op == "output" or self._is_fresh(node):
            return []
        if matching.is_torch_call(node) and is_inplace(node):
            return list(self._written_by(node))
        first = matching.tensor_input(node)
        if first is not None and matching.is_call(node, _VIEWING_CALLS):
            return [first]  # the others are sizes, which many views may share
        return list(node.all_input_nodes)

    def _is_fresh(self, node: fx.Node) -> bool:
        if is_inplace(node):
            return False
        if node.op == "call_module":
            return _is_fresh_module(self._gm.get_submodule(str(node.target)))
        if isinstance(node.target, torch._ops.OpOverload):  # whose schema says what is shared
            return all(returned.alias_info is None for returned in node.target._schema.returns)
        if node.op == "call_function" and node.target is getattr:
            return node.args[1] in ("shape", "dtype", "device", "ndim")
        sure = node.op == "call_method" or getattr(node.target, "__module__", "") not in ("_operator", "operator")
        return matching.is_call(node, _FRESH_CALLS) and (sure or self._is_tensor(node))

    def _is_strided(self, node: fx.Node) -> bool:
        if node.op in ("placeholder", "get_attr", "output") or node.target is getattr:
            return False
        module = self._gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(module, nn.Unflatten) or matching.is_call(node, _STRIDED_CALLS) or not self._is_known(node)

    def _is_known(self, node: fx.Node) -> bool:
        if matching.called(self._gm, node, *_OWN_MODULES) is not None:
            return True
        return matching.is_torch_call(node) and not isinstance(node.target, torch._ops.OpOverload)

    def _written_by(self, node: fx.Node) -> Iterator[fx.Node]:
        """The values that ``node`` may write to: what it is in place on, or anything if nothing is known of it."""
        if node.op in ("placeholder", "get_attr", "output") or node.target is getattr:
            return
        if node.op == "call_function" and getattr(node.target, "__module__", "").startswith("fxcompress."):
            return  # guards and the like, which write to nothing
        if node.op == "call_function" and isinstance(node.target, type) and dataclasses.is_dataclass(node.target):
            return  # what a model puts its outputs in
        if isinstance(node.target, torch._ops.OpOverload):  # whose name tells less than its schema
            if node.target._schema.is_mutable:
                yield from node.all_input_nodes
        elif not self._is_known(node):
            yield from node.all_input_nodes
        elif is_inplace(node):
            out = node.kwargs.get("out")
            first = matching.tensor_input(node)
            targets = [first] if first is not None else node.all_input_nodes
            yield from [out] if isinstance(out, fx.Node) else targets


def _is_fresh_module(module: nn.Module) -> bool:
    package, _, file = type(module).__module__.rpartition(".")
    if type(module) in (nn.Linear, *_OWN_MODULES):
        return True
    return package == "torch.nn.modules" and file in _FRESH_FILES
