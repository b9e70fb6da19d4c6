"""One call as the rules see it: labels where tensors were, and the real values beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxcompress.analysis.channels.labels import Labels
from fxcompress.analysis.channels.maps import Labelled

__all__ = ["Call", "Rule"]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a function or method that the graph has made.

    Attributes:
        name: of the function, without the underscores around or behind it.
        run: runs it, on whatever is put in the place of the arguments.
        args, kwargs: what it was given, a :class:`Labelled` for every tensor.
        real_args, real_kwargs: the same with the tensors themselves.
        out: what it returned.
        labels: the engine.
    """

    name: str
    run: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    real_args: Sequence[Any]
    real_kwargs: Mapping[str, Any]
    out: Any
    labels: Labels

    def tensors(self) -> list[Labelled]:
        """Everything labelled among the arguments, in order."""
        leaves = pytree.tree_leaves((list(self.args), dict(self.kwargs)), is_leaf=lambda v: isinstance(v, Labelled))
        return [v for v in leaves if isinstance(v, Labelled)]

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by position or by one of its names."""
        if position < len(self.args):
            return self.args[position]
        return next((self.kwargs[n] for n in names if n in self.kwargs), default)

    def first(self) -> Labelled:
        """The first argument, a tensor."""
        x = self.get(0, "input", "self", "tensor", "query")
        assert isinstance(x, Labelled), f"{self.name} is given no tensor"
        return x

    def dim(self, value: Any, rank: int | None = None) -> int:
        """A dimension of the first argument, counted from the front."""
        rank = len(self.first().shape) if rank is None else rank
        return int(value) % max(rank, 1)

    def dims(self, value: Any) -> list[int]:
        """Dimensions of the first argument, counted from the front; all of them for ``None``."""
        rank = len(self.first().shape)
        if value is None or (isinstance(value, (tuple, list)) and not value):
            return list(range(rank))
        return [self.dim(v) for v in (value if isinstance(value, (tuple, list, torch.Size)) else [value])]

    def unlabelled(self, why: str) -> Any:
        """The result with nothing labelled in it."""
        return pytree.tree_map_only(torch.Tensor, lambda t: Labelled(tuple(t.shape), (), why), self.out)

    def same(self, x: Labelled, zero: bool | None = None) -> Any:
        """The result with the labels of ``x`` in each of its tensors, whose sizes may only differ where ``x`` has no
        labels."""
        zero = x.zero if zero is None else zero
        return pytree.tree_map_only(
            torch.Tensor, lambda t: dataclasses.replace(x, shape=tuple(t.shape), zero=zero), self.out
        )


Rule = Callable[[Call], Any]
"""From a call to its result, a :class:`Labelled` for every tensor."""
