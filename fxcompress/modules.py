"""Modules that this package puts into graphs because ``torch.nn`` has none for the purpose.

Those that run code of the model's own (``AutogradCall``, ``MethodCall``, ``Refill``) are not storable: who loads a
graph with them has to trust them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.storable import storable

__all__ = [
    "AutogradCall",
    "GroupedLinear",
    "MethodCall",
    "MultiHeadAttentionForward",
    "Refill",
    "ScaledDotProductAttention",
    "StochasticDepth",
]


@storable
class ScaledDotProductAttention(nn.Module):
    """``torch.nn.functional.scaled_dot_product_attention`` whose dropout obeys ``train()`` and ``eval()``.

    Args:
        dropout: probability with which an attention weight is dropped in training mode.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Attention; shapes and keywords as in the function, except ``dropout_p``, which is this module's."""
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, **kwargs
        )

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


@storable
class StochasticDepth(nn.Module):
    """Drops whole residual branches in training mode (Huang et al. 2016, arXiv 1603.09382); the identity otherwise.

    Args:
        p: probability that a branch is dropped.
        scale: divide what stays by ``1 - p``, so that the mean is kept.
        whole: one draw for the batch instead of one for each sample.
        floored: draw uniform numbers and round ``1 - p`` plus these down, as Hugging Face does (``scale`` is meant).
    """

    def __init__(self, p: float, scale: bool = True, whole: bool = False, floored: bool = False) -> None:
        super().__init__()
        self.p, self.scale, self.whole, self.floored = p, scale, whole, floored

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, of shape ``(N, ...)``, with samples or all of it zeroed."""
        if not self.training or self.p == 0.0:
            return x
        shape = [1 if self.whole else x.shape[0]] + [1] * (x.dim() - 1)
        if self.floored:
            return x.div(1.0 - self.p) * (1.0 - self.p + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()
        kept = x.new_empty(shape).bernoulli_(1.0 - self.p)
        if self.scale and self.p < 1.0:
            kept.div_(1.0 - self.p)
        return x * kept

    def extra_repr(self) -> str:
        return f"p={self.p}, scale={self.scale}, whole={self.whole}, floored={self.floored}"


@storable
class MultiHeadAttentionForward(nn.Module):
    """``torch.nn.functional.multi_head_attention_forward`` whose dropout obeys ``train()`` and ``eval()``; it stands
    where the call has no explicit form."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the function, except for ``training``, which is this module's."""
        return F.multi_head_attention_forward(*args, **{**kwargs, "training": self.training})


class AutogradCall(nn.Module):
    """One call of a ``torch.autograd.Function``, kept whole so that its own backward stays in use.

    Args:
        function: the subclass of ``torch.autograd.Function``.
    """

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``function.apply(*args, **kwargs)`` returns."""
        return self.function.apply(*args, **kwargs)

    def extra_repr(self) -> str:
        return str(self.function.__qualname__)


class MethodCall(nn.Module):
    """A method of a module, other than forward, kept as one call.

    Args:
        owner: the module.
        method: the name of its method.
    """

    def __init__(self, owner: nn.Module, method: str) -> None:
        super().__init__()
        self.owner = owner
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``owner.method(*args, **kwargs)`` returns."""
        return getattr(self.owner, self.method)(*args, **kwargs)

    def extra_repr(self) -> str:
        return self.method


class _Hole:
    """Stands where a tensor goes."""


class Refill(nn.Module):
    """Puts tensors into a copy of an object of a class that this package knows nothing about.

    Args:
        value: the object; a copy without its tensors is kept as the template.
        paths: where each tensor goes: steps ("item", key) or ("attr", name) from the object to the tensor.
    """

    def __init__(self, value: Any, paths: list[tuple[tuple[str, Any], ...]]) -> None:
        super().__init__()
        self.paths = paths
        holes = {id(_step_to(value, path)): _Hole() for path in paths}
        self.template = copy.deepcopy(value, dict(holes))

    def forward(self, *tensors: torch.Tensor) -> Any:
        """The object with ``tensors`` in it, in the order of ``paths``."""
        result = copy.deepcopy(self.template)
        for path, tensor in zip(self.paths, tensors, strict=True):
            owner = _step_to(result, path[:-1])
            kind, key = path[-1]
            if kind == "item":
                owner[key] = tensor
            else:
                setattr(owner, key, tensor)
        return result


def _step_to(value: Any, path: tuple[tuple[str, Any], ...]) -> Any:
    for kind, key in path:
        value = value[key] if kind == "item" else getattr(value, key)
    return value


@storable
class GroupedLinear(nn.Module):
    """A linear layer without bias whose features fall into groups, as the channels of a grouped convolution do.

    Args:
        in_features: features that come in, a multiple of ``groups``.
        out_features: features that go out, a multiple of ``groups``.
        groups: how many groups; each makes its outputs from its own inputs alone.
        device, dtype: of the weight, of shape ``(out_features, in_features / groups)``.
    """

    def __init__(self, in_features: int, out_features: int, groups: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features // groups, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From ``(..., in_features)`` to ``(..., out_features)``."""
        rows = x.reshape(-1, self.groups, self.in_features // self.groups).transpose(0, 1)
        weight = self.weight.view(self.groups, self.out_features // self.groups, -1).transpose(1, 2)
        return torch.bmm(rows, weight).transpose(0, 1).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, groups={self.groups}"
