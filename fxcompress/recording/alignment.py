"""Two recordings of one model at different input sizes -> one graph whose integers follow the sizes.

Both runs must have made the same calls in the same order. An integer that is the same in both is a constant; one that
differs is written as an expression of the sizes of the inputs and, where those do not explain it, of sizes of
intermediate tensors. Two points do not determine a function, so the result has to be checked at a third size.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from fxcompress.errors import TraceError
from fxcompress.recording import internals
from fxcompress.recording.session import Session

__all__ = ["Symbol", "align"]


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A dimension whose size is free: its ``sizes`` in the two recordings and where the graph can ask for it.

    ``source`` is a node of the first recording whose value is a tensor; ``dim`` is its dimension.
    """

    name: str
    sizes: tuple[int, int]
    source: fx.Node
    dim: int


def align(first: Session, second: Session, symbols: list[Symbol]) -> bool:
    """Turn ``first.graph`` into a graph for every size of ``symbols``, guided by ``second``.

    Returns:
        whether anything in the graph depends on the sizes.

    Raises:
        TraceError: the runs differ in more than integers, or an integer follows no rule that is known here.
    """
    merge = _Merge(first, second, symbols)
    for a, b in itertools.zip_longest(list(first.graph.nodes), list(second.graph.nodes)):
        merge.node(a, b)
    return merge.found


class _Merge:
    def __init__(self, first: Session, second: Session, symbols: list[Symbol]) -> None:
        self.first, self.second, self.symbols = first, second, symbols
        self.graph = first.graph
        self.twin: dict[fx.Node, fx.Node] = {}
        self.size_nodes: dict[tuple[fx.Node, int], fx.Node] = {}
        self.expressions: dict[tuple[int | float, int | float], fx.Node] = {}
        self.found = False

    def node(self, a: fx.Node | None, b: fx.Node | None) -> None:
        """Merge one pair of nodes."""
        if a is None or b is None or a.op != b.op or not self._same_target(a, b):
            raise self._different(a, b)
        self.twin[a] = b
        if a.op == "get_attr":
            self._same_constant(a, b)
        if a.op in ("placeholder", "get_attr"):
            return
        with a.graph.inserting_before(a):
            args = self._value(a.args, b.args, a)
            kwargs = self._value(a.kwargs, b.kwargs, a)
        a.args, a.kwargs = args, kwargs

    def _same_target(self, a: fx.Node, b: fx.Node) -> bool:
        return bool(a.target is b.target or a.target == b.target)

    def _different(self, a: fx.Node | None, b: fx.Node | None) -> TraceError:
        def show(node: fx.Node | None, session: Session) -> str:
            if node is None:
                return "nothing more"
            fact = session.ledger.facts.get(node)
            return f"{node.op} {node.target}" + (f" at {fact.where}" if fact else "")

        return TraceError(
            "the model does other things at other input sizes, so no one graph can stand for it: "
            f"at sizes {[s.sizes[0] for s in self.symbols]} it runs {show(a, self.first)}, "
            f"at {[s.sizes[1] for s in self.symbols]} {show(b, self.second)}. Trace with dynamic_batch=False (and "
            "without dynamic_dims) for a graph of this one size"
        )

    def _same_constant(self, a: fx.Node, b: fx.Node) -> None:
        x, y = self.first.attributes.get(str(a.target)), self.second.attributes.get(str(b.target))
        if x is y or not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or internals.is_fake(y):
            return
        if x.shape != y.shape or x.dtype != y.dtype or not torch.equal(x.nan_to_num(), y.nan_to_num()):
            raise TraceError(
                f"a tensor used at {self.first.ledger.facts[a].where} was made without torch calls that can be seen "
                "(by numpy, torch.jit or a C++ extension) and changes with the inputs; it cannot be recorded. Keep the "
                "module that makes it as one call: opaque=[its path]"
            )

    def _value(self, a: Any, b: Any, at: fx.Node) -> Any:
        if isinstance(a, fx.Node):
            if not isinstance(b, fx.Node) or self.twin.get(a) is not b:
                raise self._different(at, self.twin[at])
            return a
        if isinstance(a, bool) or isinstance(b, bool) or not isinstance(a, (int, float)):
            return self._container(a, b, at)
        if a == b or (a != a and b != b):
            return a
        if not isinstance(b, (int, float)):
            raise self._different(at, self.twin[at])
        self.found = True
        return self._expression(a, b, at)

    def _container(self, a: Any, b: Any, at: fx.Node) -> Any:
        if isinstance(a, slice) and isinstance(b, slice):
            parts = [self._value(getattr(a, k), getattr(b, k), at) for k in ("start", "stop", "step")]
            return slice(*parts)
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
            return type(a)(self._value(x, y, at) for x, y in zip(a, b, strict=True))
        if isinstance(a, Mapping) and isinstance(b, Mapping) and list(a) == list(b):
            return {k: self._value(v, b[k], at) for k, v in a.items()}
        if a is b or a == b:
            return a
        raise self._different(at, self.twin[at])

    # ------------------------------------------------------------------------------------------------- expressions
    def _expression(self, a: int | float, b: int | float, at: fx.Node) -> fx.Node:
        """A node whose value is ``a`` in the first recording and ``b`` in the second, made where the cursor stands:
        nodes are merged in graph order, so what an earlier node has asked for is there for later ones."""
        if (a, b) in self.expressions:
            return self.expressions[a, b]
        made = self._of_inputs(a, b)
        if made is None and isinstance(a, int) and isinstance(b, int):
            made = self._of_intermediate(a, b, at) or self._affine(a, b)
        if made is None:
            fact = self.first.ledger.facts.get(at)
            raise TraceError(
                f"{at.target} at {fact.where if fact else 'an unknown place'} is called with {a} at input sizes "
                f"{[s.sizes[0] for s in self.symbols]} and with {b} at {[s.sizes[1] for s in self.symbols]}; no rule "
                "is known by which that number follows the sizes. Trace with dynamic_batch=False for this one size"
            )
        return made

    def _of_inputs(self, a: int | float, b: int | float) -> fx.Node | None:
        for count in (1, 2, 3):
            for chosen in itertools.combinations(self.symbols, count):
                x = math.prod(s.sizes[0] for s in chosen)
                y = math.prod(s.sizes[1] for s in chosen)
                made = self._proportional(a, b, x, y, chosen)
                if made is not None:
                    self.expressions[a, b] = made
                    return made
        return None

    def _affine(self, a: int, b: int) -> fx.Node | None:
        for symbol in self.symbols:
            x, y = symbol.sizes
            slope = Fraction(int(b) - int(a), y - x)
            if slope.denominator == 1 and slope > 0:
                scaled = self._times(self._size(symbol.source, symbol.dim), int(slope))
                made = self.graph.call_function(operator.add, (scaled, int(a) - int(slope) * x))
                self.expressions[a, b] = made
                return made
        return None

    def _proportional(
        self, a: int | float, b: int | float, x: int, y: int, chosen: tuple[Symbol, ...]
    ) -> fx.Node | None:
        if isinstance(a, int) and isinstance(b, int):
            ratio = Fraction(a, x)
            if ratio == 0 or Fraction(b, y) != ratio:
                return None
            product = self._times(self._product(chosen), ratio.numerator)
            if ratio.denominator == 1:
                return product
            return self.graph.call_function(operator.floordiv, (product, ratio.denominator))
        if math.isclose(a / x, b / y, rel_tol=1e-12):
            return self.graph.call_function(operator.mul, (self._product(chosen), a / x))
        if math.isclose(a * x, b * y, rel_tol=1e-12):
            return self.graph.call_function(operator.truediv, (a * x, self._product(chosen)))
        return None

    def _of_intermediate(self, a: int, b: int, at: fx.Node) -> fx.Node | None:
        """A size, or a product of two sizes of one tensor, that some earlier node of the graph has."""
        for node, dims in self._earlier_sizes(at):
            for i, pair in enumerate(dims):
                if pair == (a, b):
                    return self._size(node, i)
            for (i, p), (j, q) in itertools.combinations(enumerate(dims), 2):
                if (p[0] * q[0], p[1] * q[1]) == (a, b):
                    return self.graph.call_function(operator.mul, (self._size(node, i), self._size(node, j)))
        return None

    def _earlier_sizes(self, at: fx.Node) -> Iterator[tuple[fx.Node, list[tuple[int, int]]]]:
        node = at.prev
        while node.op != "root":
            twin = self.twin.get(node)
            if twin is not None and node in self.first.ledger.facts and twin in self.second.ledger.facts:
                x, y = self.first.ledger.facts[node].shape, self.second.ledger.facts[twin].shape
                if x is not None and y is not None and len(x) == len(y) and x != y:
                    yield node, list(zip(x, y, strict=True))
            node = node.prev

    def _size(self, source: fx.Node, dim: int) -> fx.Node:
        if (source, dim) not in self.size_nodes:
            self.size_nodes[source, dim] = self.graph.call_method("size", (source, dim))
        return self.size_nodes[source, dim]

    def _product(self, chosen: tuple[Symbol, ...]) -> fx.Node:
        result = self._size(chosen[0].source, chosen[0].dim)
        for symbol in chosen[1:]:
            result = self.graph.call_function(operator.mul, (result, self._size(symbol.source, symbol.dim)))
        return result

    def _times(self, node: fx.Node, factor: int) -> fx.Node:
        return node if factor == 1 else self.graph.call_function(operator.mul, (node, factor))
