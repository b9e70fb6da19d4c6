"""Which operations compute in the low dtype, and which parameters are stored in it; nothing is run here.

A parameter is stored low if everything that computes with it wants it low, under all of its names: else a layer that
needs it low would have to cast it in every call, and a layer that needs it exact would not find it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress import matching
from fxcompress.analysis.memory import Memory
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.editing import get_attribute, is_inplace
from fxcompress.layers import LAYERS
from fxcompress.pass_base import PassContext
from fxcompress.passes.precision.rules import Kind, attention_mask, is_cast_to_float32, kind_of

__all__ = ["Placement", "Survey", "specs"]

_WORST_ROUNDING = 2.0**-7
"""Of a weight, relative to its norm. Rounding to 8 bits costs 2^-9.5; more means that it leaves the dtype's range."""


def specs(value: object) -> list[TensorSpec]:
    """The tensors in the recorded value of a node."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, TensorSpec)]


class Survey:
    """What does not depend on any decision: kinds, memory, and where values come from.

    Args:
        context: of the graph.
        dtype: the low one.
        kept: nodes that the caller wants in float32.
    """

    def __init__(self, context: PassContext, dtype: torch.dtype, kept: frozenset[fx.Node]) -> None:
        self.context, self.dtype, self.kept = context, dtype, kept
        self.gm = context.gm
        self.nodes = list(self.gm.graph.nodes)
        self.memory = Memory(self.gm, lambda node: isinstance(context.shapes[node], TensorSpec))
        self.kinds = {node: kind_of(self.gm, node) for node in self.nodes}
        self.learned: set[fx.Node] = set()
        """What depends on a parameter or on real numbers among the inputs. The rest (positions, sizes) are numbers that
        the model makes itself, and means exactly."""
        self.fixed: set[fx.Node] = set()
        """What depends on no input."""
        for node in self.nodes:
            if self._is_source(node) or any(n in self.learned for n in node.all_input_nodes):
                self.learned.add(node)
            if node.op == "get_attr" or (node.all_input_nodes and self.fixed.issuperset(node.all_input_nodes)):
                self.fixed.add(node)
        self._rounded: dict[int, str | None] = {}

    def _is_source(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return self.is_real(node)
        if node.op == "get_attr":
            return isinstance(get_attribute(self.gm, str(node.target)), nn.Parameter)
        module = self.context.module(node)
        return module is not None and any(True for _ in module.parameters())

    def is_real(self, node: fx.Node) -> bool:
        """Whether there is a float32 tensor in what ``node`` gives in the original graph."""
        return any(spec.dtype is torch.float32 for spec in specs(self.context.shapes[node]))

    @cached_property
    def written(self) -> frozenset[fx.Node]:
        """Values that something is written to after they were made."""
        return frozenset(node for node in self.nodes if self.memory.writer_after(node) is not None)

    def kept_because(self, node: fx.Node) -> str | None:
        """Why a contraction computes in float32 whatever the others do; ``""`` if there is nothing to say about it."""
        module = self.context.module(node)
        if node in self.kept or not self.is_real(node):
            return ""
        if module is not None and (reason := matching.override_of(module)):
            return reason
        if node not in self.learned:
            return ""
        integers = [n for n in node.all_input_nodes if "quantized_decomposed" in str(n.target)]
        return f"reads integers that {integers[0].name!r} makes real" if integers else None

    def storing(self, tensor: Tensor) -> str | None:
        """Why ``tensor`` cannot be stored in the low dtype."""
        if id(tensor) not in self._rounded:
            self._rounded[id(tensor)] = _obstacle_to_storing(tensor, self.dtype)
        return self._rounded[id(tensor)]


def _obstacle_to_storing(tensor: Tensor, dtype: torch.dtype) -> str | None:
    if tensor.layout is not torch.strided or type(tensor) not in (nn.Parameter, Tensor):
        return f"is a {type(tensor).__name__} of layout {tensor.layout}"
    if tensor.dtype is not torch.float32 or not tensor.numel():
        return f"has dtype {tensor.dtype}" if tensor.numel() else None
    low = tensor.detach().to(dtype)
    if bool((low.isinf() & tensor.isfinite()).any()):
        return f"has numbers up to {float(tensor.detach().abs().max()):.2g}, which {dtype} cannot hold"
    error = rounding_error(tensor, low)
    if error > _WORST_ROUNDING:
        return f"is too small for {dtype}, which would change it by {error:.1g} of its norm"
    return None


def rounding_error(tensor: Tensor, low: Tensor) -> float:
    """The norm of what rounding ``tensor`` to ``low`` changes, relative to its norm; 0 if it is all zero."""
    norm = float(torch.linalg.vector_norm(tensor.detach()))
    return float(torch.linalg.vector_norm(tensor.detach() - low.float())) / norm if norm else 0.0


class Placement:
    """Contractions that compute in the low dtype, and what is stored in it.

    Args:
        survey: of the graph.
        forced: nodes that must compute in float32.

    Attributes:
        low: contractions in the low dtype.
        wants: nodes of whose values every reader wants the low dtype, if only by passing it on.
        exact: nodes of whose values every reader wants float32, if only by passing it on.
        stored: ``get_attr`` nodes whose tensors are stored low.
        obstacles: why other contractions are in float32.
    """

    def __init__(self, survey: Survey, forced: Mapping[fx.Node, str]) -> None:
        self._survey, self._forced = survey, forced
        self.obstacles: dict[fx.Node, str] = {}
        self.low: set[fx.Node] = set()
        for node in survey.nodes:
            module = survey.context.module(node)
            if isinstance(module, LAYERS) and type(module) not in LAYERS and node not in survey.kept:
                subclass = f"a {type(module).__name__} is a subclass that may compute something else"
                self.obstacles[node] = matching.override_of(module) or subclass
            if survey.kinds[node] is Kind.LOW:
                reason = forced.get(node) or survey.kept_because(node)
                if reason is None:
                    self.low.add(node)
                elif reason:
                    self.obstacles[node] = reason
        self.wants: set[fx.Node] = set()
        self.stored: set[fx.Node] = set()
        while self._settle():
            pass
        self.exact = self._find_exact()

    def kind(self, node: fx.Node) -> Kind:
        """What ``node`` asks, all told."""
        kind = self._survey.kinds[node]
        if node in self._forced or node in self._survey.kept or (kind is Kind.LOW and node not in self.low):
            return Kind.FLOAT32
        return kind

    def comes_early(self, node: fx.Node) -> bool:
        """Whether ``node`` moves what will be rounded, and may as well move it rounded."""
        source = matching.tensor_input(node)
        if self.kind(node) is not Kind.MOVES or node not in self.wants or source is None or is_inplace(node):
            return False
        if source in self._survey.written or node in self._survey.written:
            return False
        if node in self._survey.fixed:
            return True
        shapes = self._survey.context.shapes
        before, after = (sum(torch.Size(s.shape).numel() for s in specs(shapes[n])) for n in (source, node))
        return after >= before  # else there is less to round afterwards

    def comes_late(self, node: fx.Node) -> bool:
        """Whether ``node`` computes what will be cast to float32, and may as well compute it in that: one rounding
        less, and no more casts. So the sums between the norms of a transformer stay in float32."""
        if self.kind(node) is not Kind.FOLLOWS or node not in self.exact or is_inplace(node):
            return False
        shapes = self._survey.context.shapes
        sizes = [sum(torch.Size(s.shape).numel() for s in specs(shapes[n])) for n in (node, *node.all_input_nodes)]
        return sizes[0] >= max(sizes)

    def parameters(self, node: fx.Node) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of what ``node`` computes with that is stored low."""
        module = self._survey.context.module(node)
        if node in self.low and module is not None:
            yield from module.named_parameters(prefix=str(node.target))
        elif node in self.stored:
            yield str(node.target), get_attribute(self._survey.gm, str(node.target))

    # ------------------------------------------------------------------------------------------------- settling
    def _settle(self) -> bool:
        """Work out what is wanted and stored under the present choice; whether that took a layer out of it."""
        survey = self._survey
        self.wants = set()
        for node in reversed(survey.nodes):
            if self._is_wanted_low(node):
                self.wants.add(node)
        attributes = {n for n in survey.nodes if n.op == "get_attr" and survey.is_real(n)}
        self.stored = {
            n for n in attributes & self.wants if n not in survey.written | survey.kept and n not in self._forced
        }
        taken_out = False
        for node in survey.nodes:
            module = survey.context.module(node)
            tensors = list(module.parameters()) if module is not None and node in self.low else []
            if node in self.stored:
                tensors = [get_attribute(survey.gm, str(node.target))]
            reason = next((r for r in map(self._obstacle, tensors) if r), None)
            if reason is None:
                continue
            self.stored.discard(node)
            if node in self.low:
                self.low.remove(node)
                self.obstacles[node] = f"its weight {reason}"
                taken_out = True
        return taken_out

    def _find_exact(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in reversed(self._survey.nodes):
            readers = [reader for reader in node.users if not self._only_asks(reader)]
            if readers and all(self._is_exact(reader, found) for reader in readers):
                found.add(node)
        return found

    def _is_exact(self, reader: fx.Node, found: set[fx.Node]) -> bool:
        kind = self.kind(reader)
        if kind is Kind.FLOAT32 or is_cast_to_float32(reader) or (kind is Kind.ONCE and reader not in self.wants):
            return True
        return kind in (Kind.FOLLOWS, Kind.MOVES) and reader in found and not is_inplace(reader)

    def _obstacle(self, tensor: Tensor) -> str | None:
        survey, aliasing = self._survey, self._survey.context.aliasing
        for reader in aliasing.readers(tensor):
            if reader not in self.low and reader not in self.stored:
                return f"is read in float32 by {matching.describe(survey.gm, reader)} as well"
        for name in aliasing.names(tensor):
            other = get_attribute(survey.gm, name)
            if other is not tensor:
                return f"overlaps in memory with {name!r}"
        return survey.storing(tensor)

    def _is_wanted_low(self, node: fx.Node) -> bool:
        readers = [reader for reader in node.users if not self._only_asks(reader)]
        if not readers:
            return node.op == "get_attr" and bool(node.users)
        return all(self._wants_low(reader, node) for reader in readers)

    def _only_asks(self, reader: fx.Node) -> bool:
        """Whether ``reader`` asks for a size or the like and computes with no element."""
        silent = self._survey.kinds[reader] in (Kind.FOLLOWS, Kind.MOVES) or "fxcompress" in str(
            getattr(reader.target, "__module__", "")
        )
        return silent and reader.op != "output" and not specs(self._survey.context.shapes[reader])

    def _wants_low(self, reader: fx.Node, node: fx.Node) -> bool:
        if reader in self.low:
            return attention_mask(self._survey.gm, reader) is not node and not is_inplace(reader)
        return self.comes_early(reader) and matching.tensor_input(reader) is node
