"""Which values of a graph become integers, who then reads them, and which of them share a scale.

A layer that is to compute with integers wants its input as integers. The wish travels upward: through operations that
only move or select elements (*carriers*: reshapes, slices, concatenation, zero padding, max-pooling), since they can
work on the integers as well; and, where a layer's sum is added to something (``layer -> add``) and the result is wanted
as integers, to what is added. What a carrier reads and gives is on one scale.

A value that a layer makes (alone or with the activation function and the addition after it) or that a carrier gives is
made as integers, so all of its readers get these; any other value (of a layer norm, say) is rounded for the readers who
wish it only.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from fxcompress import matching
from fxcompress.analysis.memory import Memory
from fxcompress.analysis.running import undisturbed
from fxcompress.analysis.shapes import Shapes, TensorSpec, shapes
from fxcompress.editing import is_inplace
from fxcompress.examples import on_larger_batch
from fxcompress.modules import StochasticDepth
from fxcompress.pass_base import PassContext
from fxcompress.passes.quantization.vocabulary import REAL_DTYPES

__all__ = [
    "Chain",
    "Placement",
    "Value",
    "chain_of",
    "chains_of",
    "is_carrier",
    "is_idle",
    "padding_of",
    "part_of",
    "place",
    "sources_of",
]

_MOVING_CALLS = frozenset(
    "view reshape flatten permute transpose contiguous squeeze unsqueeze getitem narrow select expand unflatten "
    "pixel_shuffle channel_shuffle flip roll max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d".split()
)
_JOINING_CALLS = frozenset(("cat", "concat", "stack"))
_PARTING_CALLS = frozenset(("chunk", "split", "unbind", "tensor_split"))
_MOVING_MODULES = (
    nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.ChannelShuffle, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_PADDING_MODULES: tuple[type[Any], ...] = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
)  # fmt: skip
_IDLE_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    StochasticDepth,
)  # fmt: skip
_ACTIVATIONS = frozenset("relu relu6 hardtanh hardswish silu gelu tanh leaky_relu clamp".split())
_ACTIVATION_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.GELU, nn.Tanh, nn.LeakyReLU)
_ASKING_CALLS = frozenset("size dim numel getattr is_floating_point".split())


@dataclasses.dataclass(frozen=True)
class Chain:
    """A layer and what may be computed along with it.

    Attributes:
        layer: the call of the layer.
        nodes: the layer, the addition if there is one, the activation function if there is one, and whatever between
            them does nothing (:func:`is_idle`).
        addition: what adds something to the result.
        other: what is added.
        activation: the function that follows.
    """

    layer: fx.Node
    nodes: tuple[fx.Node, ...]
    addition: fx.Node | None = None
    other: fx.Node | None = None
    activation: fx.Node | None = None

    @property
    def end(self) -> fx.Node:
        """What gives the result."""
        return self.nodes[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value that is to be integers.

    Attributes:
        node: what gives it.
        readers: those that are to read the integers.
        scale: values with the same number share a scale.
    """

    node: fx.Node
    readers: tuple[fx.Node, ...]
    scale: int

    def replace(self, make: Callable[[], fx.Node]) -> None:
        """Let :attr:`readers` read what ``make`` puts after it, and after all inputs of the graph if it is one."""
        last = self.node
        while last.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        with last.graph.inserting_before(last.next):
            made = make()
        for reader in self.readers:
            reader.replace_input_with(self.node, made)


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """All values that are to be integers, in graph order."""

    values: tuple[Value, ...]

    def sharing(self) -> Iterator[tuple[Value, ...]]:
        """Values that share a scale, group by group."""
        groups: dict[int, list[Value]] = {}
        for value in self.values:
            groups.setdefault(value.scale, []).append(value)
        yield from (tuple(g) for g in groups.values())


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads the elements of ``node``, and not only its shape."""
    return [user for user in node.users if not matching.is_call(user, _ASKING_CALLS)]


def _is_activation(context: PassContext, node: fx.Node) -> bool:
    if matching.called(context.gm, node, *_ACTIVATION_MODULES) is not None:
        return True
    return matching.is_call(node, _ACTIVATIONS) and len(node.all_input_nodes) == 1


def _added(context: PassContext, node: fx.Node, to: fx.Node) -> fx.Node | None:
    """What ``node`` adds to ``to``, element by element, both of the same shape whatever the batch size."""
    if not matching.is_call(node, ("add", "iadd", "add_")) or len(node.args) != 2 or node.kwargs:
        return None
    others = [a for a in node.args if isinstance(a, fx.Node) and a is not to]
    if len(others) != 1 or (is_inplace(node) and node.args[0] is not to):
        return None
    specs = [context.shapes[n] for n in (to, others[0])]
    if not all(isinstance(s, TensorSpec) for s in specs) or specs[0] != specs[1]:
        return None
    if 1 in specs[0].shape:  # a table of positions, say, is as large as an example of one only
        larger = _of_larger_batch(context)
        if larger is not None and larger[to] != larger[others[0]]:
            return None
    return others[0]


_LARGER: weakref.WeakKeyDictionary[PassContext, Shapes | None] = weakref.WeakKeyDictionary()


def _of_larger_batch(context: PassContext) -> Shapes | None:
    """What ``context.shapes`` would be with a batch larger by one; ``None`` if the graph runs on none."""
    if context not in _LARGER:
        assert context.example is not None, "its shapes were asked for"
        gm = context.gm
        _LARGER[context] = on_larger_batch(gm, context.example, lambda larger: shapes(gm, larger.args, larger.kwargs))
    return _LARGER[context]


def chain_of(context: PassContext, layer: fx.Node, *, adds: bool = True) -> Chain:
    """``layer`` with the addition (if ``adds``) and the activation function after it, as far as nobody else reads what
    is between."""
    nodes = [layer]

    def only_reader() -> fx.Node | None:
        while True:
            readers = _readers(nodes[-1])
            if len(readers) != 1 or not is_idle(context, readers[0]):
                return readers[0] if len(readers) == 1 else None
            nodes.append(readers[0])

    addition = other = activation = None
    reader = only_reader()
    if adds and reader is not None:
        other = _added(context, reader, nodes[-1])
        if other is not None:
            addition = reader
            nodes.append(reader)
            reader = only_reader()
    if reader is not None and _is_activation(context, reader):
        activation = reader
        nodes.append(reader)
    return Chain(layer, tuple(nodes), addition, other, activation)


def chains_of(context: PassContext, layers: Iterable[fx.Node]) -> dict[fx.Node, Chain]:
    """The chain of each of ``layers``, given in graph order. Of two that are added up the later one has the addition in
    its chain."""
    found = {layer: chain_of(context, layer) for layer in layers}
    takes = {chain.addition: layer for layer, chain in found.items()}
    for layer, chain in found.items():
        if chain.addition is not None and takes[chain.addition] is not layer:
            found[layer] = chain_of(context, layer, adds=False)
    return found


def is_idle(context: PassContext, node: fx.Node) -> bool:
    """Whether ``node`` calls a module that, not training, gives what it is given, the very tensor: dropout, stochastic
    depth. Of a module without state whose code is not torch's a call tells."""
    module = context.module(node)
    if module is None or module.training or len(node.args) != 1 or node.kwargs:
        return False
    if type(module) in _IDLE_MODULES:
        return True
    stateless = not [*module.parameters(), *module.buffers(), *module.children()]
    if not stateless or type(module).__module__.startswith("torch.") or matching.override_of(module):
        return False
    source = matching.tensor_input(node)
    if source is None or not _is_real(context, source):
        return False
    x = torch.rand(context.shapes.shape(source), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), undisturbed(module):
        return module(x) is x


def is_carrier(context: PassContext, node: fx.Node) -> bool:
    """Whether ``node`` only moves or selects elements, of one tensor or of several that it joins."""
    if is_inplace(node):
        return False
    if is_idle(context, node):
        return True
    if padding_of(context, node) is not None:
        return True
    module = matching.called(context.gm, node, *_MOVING_MODULES)
    if module is not None:
        return not getattr(module, "return_indices", False) and len(node.args) == 1
    if matching.is_call(node, _JOINING_CALLS):
        return True
    if not matching.is_call(node, _MOVING_CALLS) or node.kwargs.get("return_indices"):
        return False
    return not any(_is_tensor(context, a) for a in node.all_input_nodes[1:])  # an index that is a tensor


def padding_of(context: PassContext, node: fx.Node) -> Any:
    """How many zeros ``node`` puts around what it reads, as ``F.pad`` takes it; ``None`` if it does something else."""
    padding, value = _padding(context, node)
    return padding if value == 0 else None


def _padding(context: PassContext, node: fx.Node) -> tuple[Any, Any]:
    """How much of which number ``node`` puts around what it reads; ``None`` twice if it does something else."""
    module = matching.called(context.gm, node, *_PADDING_MODULES)
    if module is not None:
        return (module.padding, getattr(module, "value", 0)) if len(node.args) == 1 else (None, None)
    if not matching.is_call(node, ("pad",)) or matching.argument(node, 2, "mode", "constant") != "constant":
        return None, None
    value = matching.argument(node, 3, "value", None)
    return matching.argument(node, 1, "pad"), 0 if value is None else value


def _is_infinite(context: PassContext, node: fx.Node) -> bool:
    """Whether it pads with infinities, as before max-pooling: there is no scale for those."""
    value = _padding(context, node)[1]
    return isinstance(value, float) and math.isinf(value)


def _is_tensor(context: PassContext, node: fx.Node) -> bool:
    return isinstance(context.shapes[node], TensorSpec)


def _is_real(context: PassContext, node: fx.Node) -> bool:
    spec = context.shapes[node]
    return isinstance(spec, TensorSpec) and spec.dtype in REAL_DTYPES


class _Scales:
    """A union-find over values."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}

    def root(self, node: fx.Node) -> fx.Node:
        root = node
        while (above := self._parent.get(root, root)) is not root:
            root = above
        self._parent[node] = root
        return root

    def unite(self, a: fx.Node, b: fx.Node) -> None:
        self._parent[self.root(a)] = self.root(b)


def part_of(node: fx.Node) -> fx.Node | None:
    """The call that gave the parts of which ``node`` takes one."""
    source = matching.tensor_input(node)
    return source if matching.is_call(node, ("getitem",)) and matching.is_call(source, _PARTING_CALLS) else None


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The tensors that a carrier reads."""
    if matching.is_call(node, _JOINING_CALLS):
        tensors = matching.argument(node, 0, "tensors")
        return [t for t in tensors if isinstance(t, fx.Node)] if isinstance(tensors, (list, tuple)) else []
    source = matching.tensor_input(part_of(node) or node)
    return [] if source is None else [source]


def place(
    context: PassContext,
    layers: Callable[[fx.Node], bool],
    chains: Callable[[fx.Node], bool],
    *,
    round_addends: bool = False,
) -> Placement:
    """Decide; see the module.

    Args:
        context: of the graph.
        layers: whether a node calls a layer that wants its input as integers.
        chains: whether a node calls a layer whose result may be made as integers.
        round_addends: a layer's sum becomes integers before something is added to it, too.
    """
    nodes = list(context.gm.graph.nodes)
    memory = Memory(context.gm, lambda n: _is_tensor(context, n))
    ends = {chain.end: chain for chain in chains_of(context, filter(chains, nodes)).values()}
    wishes: dict[fx.Node, set[fx.Node]] = {}
    scales, native = _Scales(), {e for e in ends if memory.writer_after(e) is None}

    def may_read(value: fx.Node, reader: fx.Node) -> bool:
        if not _is_real(context, value) or value.op == "get_attr" or _is_infinite(context, value):
            return False
        return memory.writer_between(value, reader) is None

    def wish(value: fx.Node, reader: fx.Node) -> None:
        wishes.setdefault(value, set()).add(reader)

    for node in reversed(nodes):
        if layers(node):
            source = matching.tensor_input(node)
            assert source is not None, "a layer reads one tensor"
            wish(source, node)
        if node not in wishes:
            continue
        if node in ends:
            chain = ends[node]
            if chain.other is not None and chain.addition is not None and may_read(chain.other, chain.addition):
                wish(chain.other, chain.addition)
                own = chain.nodes[chain.nodes.index(chain.addition) - 1]
                if round_addends and may_read(own, chain.addition):
                    wish(own, chain.addition)
        elif is_carrier(context, node):
            sources = sources_of(node)
            reader = part_of(node) or node
            if sources and all(may_read(source, reader) for source in sources):
                if memory.writer_after(node) is None:
                    native.add(node)
                for source in sources:
                    wish(source, reader)
                    scales.unite(source, node)
    numbers: dict[fx.Node, int] = {}
    values = []
    for node in nodes:
        if node in wishes:
            readers = tuple(node.users) if node in native else tuple(u for u in node.users if u in wishes[node])
            number = numbers.setdefault(scales.root(node), len(numbers))
            values.append(Value(node, readers, number))
    return Placement(tuple(values))
