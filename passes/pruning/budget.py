"""What a graph would cost if only some channels stayed: from the groups alone, in about a millisecond."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from fxcompress.analysis.channels import ChannelGroups
from fxcompress.analysis.cost import Cost

__all__ = ["Budget"]


class _Products:
    """Sums of products: each term is a constant times, for each of its vectors of classes, how many of these stay."""

    def __init__(self) -> None:
        self._vectors: list[np.ndarray] = []
        self._term: list[int] = []
        self._constants: list[float] = []

    def add(self, constant: float, vectors: list[np.ndarray]) -> None:
        """A term; ``constant`` is for one of each vector's indices."""
        self._vectors += vectors
        self._term += [len(self._constants)] * len(vectors)
        self._constants.append(constant)

    def freeze(self) -> None:
        """No more terms come."""
        lengths = [len(v) for v in self._vectors]
        self._all = np.concatenate(self._vectors) if lengths else np.zeros(0, dtype=np.int64)
        self._starts = np.cumsum([0, *lengths[:-1]]) if lengths else np.zeros(0, dtype=np.int64)
        self._terms = np.array(self._term, dtype=np.int64)
        self._constant = np.array(self._constants, dtype=np.float64)

    def terms(self, kept: np.ndarray) -> np.ndarray:
        """The value of each term."""
        values = self._constant.copy()
        if len(self._all):
            counts = np.add.reduceat(kept[self._all].astype(np.int64), self._starts)
            np.multiply.at(values, self._terms, counts)
        return values


class Budget:
    """Parameters and multiply-accumulates of a graph as functions of what stays.

    Args:
        groups: of the graph.
        cost: of the graph as it is.
    """

    def __init__(self, groups: ChannelGroups, cost: Cost) -> None:
        self._parameters, self._macs = _Products(), _Products()
        vectors: dict[int, list[np.ndarray]] = {}
        tensors = {}
        for binding in groups.bindings:
            if isinstance(binding.tensor, nn.Parameter):
                vectors.setdefault(id(binding.tensor), []).append(binding.classes)
                tensors[id(binding.tensor)] = binding.tensor
        for key, found in vectors.items():
            self._parameters.add(tensors[key].numel() / math.prod(len(v) for v in found), found)
        for products in groups.products.values():
            for product in products:
                classes = [groups.classes_of(v) for v in product.vectors]
                self._macs.add(product.macs / math.prod(len(v) for v in classes), classes)
        self._parameters.freeze()
        self._macs.freeze()
        everything = np.ones(groups.classes, dtype=np.bool_)
        self._other_parameters = cost.parameters - float(self._parameters.terms(everything).sum())
        self._other_macs = (cost.macs or 0) - float(self._macs.terms(everything).sum())

    def parameters(self, kept: np.ndarray) -> int:
        """How many parameters there are when only classes with ``kept[class]`` stay."""
        return round(float(self._parameters.terms(kept).sum()) + self._other_parameters)

    def macs(self, kept: np.ndarray) -> int:
        """How many multiply-accumulates one call takes then."""
        return round(float(self._macs.terms(kept).sum()) + self._other_macs)
