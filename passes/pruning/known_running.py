"""Runs a graph beside what is sure of its values whatever it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.analysis.channels.modules import as_function, moves
from fxcompress.analysis.channels.probing import acts_elementwise, keeps_zero
from fxcompress.analysis.running import GraphRunner
from fxcompress.editing import is_inplace
from fxcompress.matching import name_of_call, override_of
from fxcompress.passes.pruning.known import Known, KnownCall
from fxcompress.passes.pruning.known_bounds import within_bounds
from fxcompress.passes.pruning.known_rules import rule_for

__all__ = ["KnownRunner", "constants_of"]


def constants_of(gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> KnownRunner:
    """What is sure of the values of ``gm``, from a run on an example; it stays as it is."""
    changed: frozenset[int] = frozenset()
    while True:
        runner = KnownRunner(gm, changed)
        runner.observe(args, kwargs)
        if runner.changed == changed:
            return runner
        changed = runner.changed


class KnownRunner(GraphRunner):
    """Interprets ``gm`` on values, and on what is sure of them.

    What a rule makes of an argument is what is sure of it at that time; a tensor that is changed in place, and all that
    lies in its memory, is unknown from then on.

    Attributes:
        known: for every node its value with a :class:`Known` for each tensor.
        calls: every call that was given a tensor, by its node.
        changed: memory of parameters and buffers that the graph changes; nothing in there is a constant.
    """

    def __init__(self, gm: fx.GraphModule, changed: Collection[int] = ()) -> None:
        super().__init__(gm)
        self.calls: dict[fx.Node, KnownCall] = {}
        self.changed = frozenset(changed)
        self._own = {_memory(t) for t in (*gm.parameters(), *gm.buffers())}
        self.known: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        given = [leaf for m in n.all_input_nodes for leaf in _tensors(self.env[m])]
        if n.op == "call_module":
            given += self._graph_module().get_submodule(str(n.target)).buffers()
        versions = [_version(t) for t in given]
        value = super().run_node(n)
        found = self._judge(n, value)
        written = {_memory(t) for t, before in zip(given, versions, strict=True) if _version(t) != before}
        if is_inplace(n):
            written |= {_memory(t) for t in given[:1]}
        if written:
            self._forget(written)
        self.known[n] = found
        return value

    def _forget(self, written: set[int]) -> None:
        self.changed |= written & self._own
        for m, value in self.env.items():
            if any(_memory(t) in written for t in _tensors(value)):
                self.known[m] = _nothing(value)

    def parameter(self, tensor: torch.Tensor) -> Known:
        """What is sure of a parameter or buffer: everything, unless the graph changes it."""
        self._own.add(_memory(tensor))
        return Known.nothing(tensor.shape) if _memory(tensor) in self.changed else Known.constant(tensor)

    def _judge(self, n: fx.Node, value: Any) -> Any:
        if n.op == "get_attr":
            return pytree.tree_map_only(torch.Tensor, self.parameter, value)
        if n.op in ("placeholder", "output"):
            return _nothing(value)
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda m: self.known[m])
        sized = any(not _is_known(self.known[m]) for m in n.all_input_nodes)
        call = KnownCall("", _runner(n), args, kwargs, value, sized)
        call = self._as_module(n, call) if n.op == "call_module" else dataclasses.replace(call, name=_name(n))
        self.calls[n] = dataclasses.replace(call, out=None)  # which would keep every activation
        if not _tensors(value):
            return value
        if call.name == "getitem" and isinstance(call.args[0], (tuple, list)) and not sized:
            return call.args[0][call.args[1]]
        rule = rule_for(call.name)
        return within_bounds(call, call.nothing() if rule is None else rule(call))

    def _as_module(self, n: fx.Node, call: KnownCall) -> KnownCall:
        module = self._graph_module().get_submodule(str(n.target))
        call = dataclasses.replace(call, module=module, run=module)
        if override_of(module) is not None or isinstance(module, nn.RReLU):  # random in training
            return dataclasses.replace(call, name="rrelu" if isinstance(module, nn.RReLU) else "")
        if moves(module):
            return dataclasses.replace(call, name="flatten")
        function = as_function(module, self.parameter)  # type: ignore[arg-type]
        if function is not None:
            name, rest = function
            return dataclasses.replace(call, name=name, args=(*call.args, *rest))
        x = call.first() if len(call.tensors()) == 1 and call.args else None
        real = self.env[n.all_input_nodes[0]] if x is not None else None
        if x is not None and isinstance(real, torch.Tensor) and isinstance(call.out, torch.Tensor):
            zero = Known.where(x.shape, x.zero, x.wide)
            if zero.any and acts_elementwise(module, real) and keeps_zero(module, real):
                return dataclasses.replace(call, name="identity", run=lambda t: t, args=(zero,))
        return call


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _nothing(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: Known.nothing(t.shape), value)


def _is_known(value: Any) -> bool:
    leaves = pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, Known))
    return any(isinstance(leaf, Known) for leaf in leaves)


def _runner(n: fx.Node) -> Callable[..., Any]:
    if n.op == "call_method" and n.target == "view":
        return lambda x, *args, **kwargs: x.reshape(*args, **kwargs)
    if n.op == "call_method":
        return lambda x, *args, **kwargs: getattr(x, str(n.target))(*args, **kwargs)
    if n.target is getattr:
        return lambda x, name: getattr(x, name)
    return n.target if callable(n.target) else lambda *args: None


def _name(n: fx.Node) -> str:
    """The name that rules go by."""
    name = str(n.args[1]) if n.target is getattr else name_of_call(n) or getattr(n.target, "__name__", "")
    if name == "view" and any(isinstance(a, torch.dtype) for a in n.args):
        return "view of bits"
    return name.strip("_") or name
