"""What is sure of a tensor whatever a graph is given: which elements are constants, and their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

__all__ = ["Along", "Known", "KnownCall"]


@dataclasses.dataclass(frozen=True)
class Along:
    """What is sure of each index along one dimension, all elements there taken together; each of shape ``(size,)``.

    Attributes:
        sure: whether all elements there are one constant.
        value: that constant, in float64; else 0.
        zero: whether all elements there are zero.
    """

    sure: torch.Tensor
    value: torch.Tensor
    zero: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """What is sure of one tensor.

    Attributes:
        shape: of the tensor.
        sure: which elements are constants. Of the tensor's rank, and of size 1 along each dimension along which, by
            construction and not only on the example, neither this nor the value changes.
        value: these constants, of the shape of ``sure``; 0 where nothing is sure. On the CPU.
        bounds: what no element is below, and above; they broadcast with ``sure``. ``None`` if there are none.
    """

    shape: tuple[int, ...]
    sure: torch.Tensor
    value: torch.Tensor
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def nothing(shape: Sequence[int]) -> Known:
        """Of a tensor of this shape nothing is sure."""
        small = (1,) * len(shape)
        return Known(tuple(shape), torch.zeros(small, dtype=torch.bool), torch.zeros(small))

    @staticmethod
    def constant(tensor: torch.Tensor) -> Known:
        """A tensor that is always this one, such as a parameter."""
        value = tensor.detach().cpu()
        odd = value.is_complex() or value.is_quantized or value.layout is not torch.strided
        if odd or not bool(torch.isfinite(value).all()):
            return Known.nothing(tensor.shape)
        return Known(tuple(tensor.shape), torch.ones((), dtype=torch.bool).expand(value.shape), value)

    @staticmethod
    def filled(shape: Sequence[int], value: float) -> Known:
        """A tensor that is the same everywhere."""
        small = (1,) * len(shape)
        return Known(tuple(shape), torch.ones(small, dtype=torch.bool), torch.full(small, value, dtype=torch.float64))

    @staticmethod
    def where(shape: Sequence[int], sure: torch.Tensor, value: torch.Tensor) -> Known:
        """``value`` where it is ``sure`` (they broadcast) and finite, nothing elsewhere."""
        if 0 in shape or value.is_complex():
            return Known.nothing(shape)
        sure = sure & value.isfinite()
        value = torch.where(sure, value, torch.zeros((), dtype=value.dtype))
        return Known(tuple(shape), sure.expand(value.shape), value)

    @staticmethod
    def shrunk(shape: Sequence[int], sure: torch.Tensor, value: torch.Tensor) -> Known:
        """As :meth:`where`, of size 1 wherever nothing changes; for what was moved in the shape of the tensor."""
        for dim in range(sure.dim()):
            if sure.shape[dim] > 1:
                first_sure, first_value = sure.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
                if bool((sure == first_sure).all()) and bool(((value == first_value) | ~sure).all()):
                    sure, value = first_sure, first_value
        return Known.where(shape, sure, value)

    @cached_property
    def any(self) -> bool:
        """Whether there is a constant at all."""
        return bool(self.sure.any())

    @cached_property
    def all(self) -> bool:
        """Whether there is nothing else."""
        return bool(self.sure.all())

    @property
    def zero(self) -> torch.Tensor:
        """Which elements are always zero."""
        return self.sure & (self.value == 0)

    @property
    def wide(self) -> torch.Tensor:
        """The values, those of floating point in float64."""
        return self.value.double() if self.value.is_floating_point() else self.value

    @property
    def bounded(self) -> bool:
        """Whether anything bounds any element."""
        return self.bounds is not None or self.any

    @property
    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What no element is below, and above, in float64; infinite where there is no such thing."""
        infinite = torch.tensor(torch.inf, dtype=torch.float64)
        low, high = (-infinite, infinite) if self.bounds is None else self.bounds
        value = self.wide.double()
        return torch.where(self.sure, value, low), torch.where(self.sure, value, high)

    def along(self, dim: int) -> Along:
        """What is sure of each index along ``dim``."""

        def rows(t: torch.Tensor) -> torch.Tensor:
            return t.movedim(dim, 0).reshape(t.shape[dim], -1)

        sure, value = rows(self.sure), rows(self.wide.double())
        same = sure.all(1) & (value == value[:, :1]).all(1)
        size = self.shape[dim]
        first = torch.where(same, value[:, 0], 0.0)
        return Along(same.expand(size), first.expand(size), rows(self.zero).all(1).expand(size))

    def aligned(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``sure`` and the values with dimensions of size 1 in front, as they broadcast."""
        shape = (1,) * (rank - len(self.shape)) + tuple(self.sure.shape)
        return self.sure.reshape(shape), self.wide.reshape(shape)

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``sure`` and the values in the shape of the tensor."""
        return self.sure.expand(self.shape), self.wide.expand(self.shape)


@dataclasses.dataclass(frozen=True)
class KnownCall:
    """A call that a graph has made.

    Attributes:
        name: of the function or method, without the underscores around or behind it.
        run: runs it.
        args, kwargs: what it was given, a :class:`Known` for every tensor.
        out: what it returned.
        sized: whether a number among the arguments follows from a size.
        module: the module that was called, if one was.
    """

    name: str
    run: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    out: Any
    sized: bool = False
    module: nn.Module | None = None

    def tensors(self) -> list[Known]:
        """Every tensor among the arguments, in order."""
        leaves = pytree.tree_leaves((list(self.args), dict(self.kwargs)), is_leaf=lambda v: isinstance(v, Known))
        return [v for v in leaves if isinstance(v, Known)]

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by position or by one of its names."""
        if position < len(self.args):
            return self.args[position]
        return next((self.kwargs[n] for n in names if n in self.kwargs), default)

    def first(self) -> Known:
        """The first argument, a tensor."""
        x = self.get(0, "input", "self", "tensor", "query")
        return x if isinstance(x, Known) else Known.nothing(())

    def dims(self, value: Any) -> list[int]:
        """Dimensions of the first argument, counted from the front; all of them for ``None``."""
        rank = len(self.first().shape)
        if value is None or (isinstance(value, (tuple, list)) and not value):
            return list(range(rank))
        return [int(v) % max(rank, 1) for v in (value if isinstance(value, (tuple, list)) else [value])]

    def reduced(self) -> list[int]:
        """The dimensions that a reduction goes over."""
        dim = self.get(2 if self.name in ("norm", "vector_norm") else 1, "dim", "axis")
        return self.dims(None if isinstance(dim, bool) else dim)

    def nothing(self) -> Any:
        """The result with nothing sure of it."""
        return pytree.tree_map_only(torch.Tensor, lambda t: Known.nothing(t.shape), self.out)
