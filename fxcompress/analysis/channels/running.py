"""Runs a graph on labels, beside its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.analysis.channels import arithmetic, movement, products
from fxcompress.analysis.channels.atoms import Ids
from fxcompress.analysis.channels.call import Call
from fxcompress.analysis.channels.labels import Labels
from fxcompress.analysis.channels.maps import Labelled, Product
from fxcompress.analysis.channels.modules import as_function, moves
from fxcompress.analysis.channels.probing import keeps_zero
from fxcompress.analysis.channels.skeleton import SkeletonRunner
from fxcompress.editing import get_attribute
from fxcompress.matching import describe, name_of_call, override_of

__all__ = ["Bound", "LabelRunner"]

_RULES = {**arithmetic.RULES, **products.RULES, **movement.RULES}
_ASKS = frozenset(("size", "dim", "numel", "shape", "ndim", "ndimension", "device", "dtype", "check_input", "stride"))
_MAKES = frozenset(("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"))
_SPREADS = frozenset(("expand", "broadcast_to"))
_PROPERTIES_THAT_MOVE = frozenset(("T", "mT", "H", "mH"))


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """A parameter or buffer and the atoms along its dimensions; those of size 1 have none."""

    tensor: torch.Tensor
    labelled: Labelled


class LabelRunner(SkeletonRunner):
    """Interprets ``gm`` on values (or on their shapes, see :class:`SkeletonRunner`), and on labels beside them.

    Attributes:
        labels: the engine.
        found: for every node its value with a :class:`Labelled` for each tensor.
        bound: parameters and buffers that were read, by identity.
        products: the contractions of each node.
        produced: the channels that each node has made.
    """

    def __init__(self, gm: fx.GraphModule, heads: bool, values: bool = True) -> None:
        super().__init__(gm, values)
        self.labels = Labels(heads)
        self.found: dict[fx.Node, Any] = {}
        self.bound: dict[int, Bound] = {}
        self.products: dict[fx.Node, tuple[Product, ...]] = {}
        self.produced: dict[fx.Node, tuple[Ids, ...]] = {}
        self._wrappers = _wrappers(gm.graph)

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("call_function", "call_method", "call_module"):
            real_args, real_kwargs = self.fetch_args_kwargs_from_env(n)
        else:
            real_args, real_kwargs = (), {}
        self.labels.place = describe(self._graph_module(), n)
        self.labels.products, self.labels.produced = [], []
        value = super().run_node(n)
        self.found[n] = self._label(n, real_args, real_kwargs, value)
        if self.labels.products:
            self.products[n] = tuple(self.labels.products)
        if self.labels.produced:
            self.produced[n] = tuple(self.labels.produced)
        return value

    def parameter(self, tensor: torch.Tensor) -> Labelled:
        """A parameter or buffer, with atoms of its own along every dimension; the same each time. Integers are mostly
        positions in something else and so stay as they are."""
        if id(tensor) not in self.bound:
            shape = tuple(tensor.shape)
            maps = tuple(
                self.labels.along(self.labels.atoms.new(size), d, len(shape))
                for d, size in enumerate(shape)
                if size > 1 and tensor.is_floating_point()
            )
            labelled = Labelled(shape, maps, self.labels.place, isinstance(tensor, nn.Parameter))
            self.bound[id(tensor)] = Bound(tensor, labelled)
        return self.bound[id(tensor)].labelled

    # ------------------------------------------------------------------------------------------------- one node
    def _label(self, n: fx.Node, real_args: Sequence[Any], real_kwargs: Mapping[str, Any], value: Any) -> Any:
        if n.op == "placeholder":
            return self._fixed(value, self.labels.place)
        if n.op == "get_attr":
            real = get_attribute(self._graph_module(), str(n.target))
            return pytree.tree_map_only(torch.Tensor, self.parameter, real)
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda node: self.found[node])
        if n.op == "output":
            self._freeze((args, kwargs), "the model's output")
            return None
        call = Call("", self._runner(n), args, kwargs, real_args, real_kwargs, value, self.labels)
        if n in self._wrappers and not isinstance(value, torch.Tensor) and not _is_plain(value):
            self._freeze((args, kwargs), "the model's output")
            return call.unlabelled("the model's output")
        if n.op == "call_module":
            return self._label_module(n, call)
        call = dataclasses.replace(call, name=self._name(n))
        found = self._label_function(call)
        self._note_write(n, call, found)
        return found

    @staticmethod
    def _runner(n: fx.Node) -> Callable[..., Any]:
        if n.op == "call_method" and n.target == "view":  # the same, and labels need not lie in memory as values do
            return lambda x, *args, **kwargs: x.reshape(*(args or kwargs.values()))
        if n.op == "call_method":
            return lambda x, *args, **kwargs: getattr(x, str(n.target))(*args, **kwargs)
        return n.target if callable(n.target) else lambda *args: None

    @staticmethod
    def _name(n: fx.Node) -> str:
        name = name_of_call(n) or getattr(n.target, "__name__", "")
        if name == "getattr":
            name = str(n.args[1])
        if name == "view" and any(isinstance(a, torch.dtype) for a in n.args):
            return "view of bits"
        return name.strip("_") or name

    def _note_write(self, n: fx.Node, call: Call, found: Any) -> None:
        """What is written in place is there from now on, also in the tensor that a view was written through."""
        target = str(n.target)
        if call.name == "setitem":
            value = call.args[2]
            zero = value.zero if isinstance(value, Labelled) else value == 0
        elif n.op == "call_method" and (target.startswith("__i") or (target.endswith("_") and target[-2] != "_")):
            zero = isinstance(found, Labelled) and found.zero
        else:
            return
        node = n.args[0] if n.args and not zero else None
        while isinstance(node, fx.Node):
            x = self.found[node]
            if isinstance(x, Labelled):
                self.found[node] = dataclasses.replace(x, zero=False)
            node = node.args[0] if node.args and self._name(node) in movement.RULES else None

    def _label_function(self, call: Call) -> Any:
        labelled = call.tensors()
        if call.name == "setitem":
            return self._label_assignment(call)
        if not labelled or not _has_tensors(call.out):
            if call.name not in _ASKS and call.out is not None and _has_maps(labelled):
                self._freeze(labelled, f"read by {self.labels.place}")
            return call.out if not _has_tensors(call.out) else call.unlabelled(self.labels.place)
        if call.name == "getitem" and not isinstance(call.args[0], Labelled):
            return call.args[0][call.real_args[1]]
        if call.name in _PROPERTIES_THAT_MOVE and len(call.args) == 2:
            return self.labels.move([call.first()], lambda t: getattr(t, call.name))
        if call.name in _MAKES:
            return call.unlabelled(self.labels.place)
        if not _has_maps(labelled) and call.name not in _SPREADS:
            return call.unlabelled(labelled[0].why)
        if rule := _RULES.get(call.name):
            return rule(call)
        if arithmetic.is_pointwise(call.name):
            return arithmetic.pointwise(call)
        return self._unknown(call, "is not known")

    def _label_assignment(self, call: Call) -> Any:
        """x[index] = y, which returns nothing: what is written goes with what was there, and so does a mask."""
        x, index, value = call.args
        if isinstance(index, Labelled) and index.shape == x.shape and call.real_args[1].dtype == torch.bool:
            there = self.labels.elementwise([x, index])
        else:
            there = movement.RULES["getitem"](
                dataclasses.replace(call, run=lambda t, i: t[i], args=call.args[:2], real_args=call.real_args[:2])
            )
        if isinstance(value, Labelled):
            self.labels.elementwise([there, value])
        return call.out

    def _label_module(self, n: fx.Node, call: Call) -> Any:
        module = self._graph_module().get_submodule(str(n.target))
        obstacle = override_of(module)
        if obstacle is None and not _has_maps(call.tensors()) and not any(True for _ in module.parameters()):
            return call.unlabelled(next((x.why for x in call.tensors()), self.labels.place))
        if obstacle is None and moves(module):
            return self.labels.move([call.first()], module)
        function = as_function(module, self.parameter) if obstacle is None else None
        if function is not None:
            name, rest = function
            args, real_args = (*call.args, *rest), (*call.real_args, *rest)
            run = getattr(torch, name, call.run)  # of functions that move, which have the very name
            call = dataclasses.replace(call, name=name, run=run, args=args, real_args=real_args)
            return (_RULES.get(name) or arithmetic.pointwise)(call)
        if obstacle is None and len(call.tensors()) == 1 and isinstance(call.real_args[0], torch.Tensor):
            x, real = call.first(), call.real_args[0]
            if isinstance(call.out, torch.Tensor) and self.is_elementwise(module, real):
                return call.same(x, x.zero and keeps_zero(module, real))
        self._freeze_parameters(module, f"inside {self.labels.place}")
        return self._unknown(call, obstacle or "")

    def _unknown(self, call: Call, why: str) -> Any:
        reason = f"read by {self.labels.place}" + (f", which {why}" if why else "")
        self._freeze((call.args, call.kwargs), reason)
        return call.unlabelled(reason)

    def _freeze_parameters(self, module: nn.Module, reason: str) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            self._freeze(self.parameter(tensor), reason)

    def _freeze(self, value: Any, reason: str) -> None:
        for leaf in pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, Labelled)):
            if isinstance(leaf, Labelled):
                self.labels.freeze(leaf, reason)

    @staticmethod
    def _fixed(value: Any, why: str) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda t: Labelled(tuple(t.shape), (), why), value)


def _wrappers(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that nothing reads but the output, or what itself only the output reads."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node.users and all(user in found for user in node.users)):
            found.add(node)
    return found


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is what operations return, and no object that a model puts its outputs into."""
    named = type(value).__module__ == "torch.return_types"
    return named or type(value) in (tuple, list, torch.Size) or isinstance(value, (int, float, bool, type(None)))


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _has_maps(labelled: Sequence[Labelled]) -> bool:
    return any(x.maps for x in labelled)
