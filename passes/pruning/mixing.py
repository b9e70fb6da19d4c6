"""Layers that mix channels: what each output takes from each input."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from fxcompress.passes.pruning.known import Along, Known, KnownCall

__all__ = ["MIXES", "Mix"]

_AT_ONCE = 1 << 22
"""How many weights are widened to float64 at a time."""

MIXES = frozenset(("linear", *(f"{kind}{i}d" for kind in ("conv", "conv_transpose") for i in (1, 2, 3))))
"""Functions with an input, a weight, and a bias."""


@dataclasses.dataclass(frozen=True, eq=False)
class Mix:
    """A linear layer or convolution with a constant weight.

    Attributes:
        dim: of the channels, in input and output.
        weight: of shape ``(groups, outputs, inputs, kernel)``, where outputs and inputs are those of one group.
        bias: ``None`` if there is none.
        uneven: why an input that is the same everywhere does not come out so; empty if it does.
    """

    dim: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    uneven: str = ""

    @staticmethod
    def of(call: KnownCall) -> Mix | None:
        """The layer that ``call`` calls; ``None`` if its parameters are no constants."""
        x, weight, bias = call.first(), call.get(1, "weight"), call.get(2, "bias")
        if not isinstance(weight, Known) or not weight.all or len(weight.shape) < 2:
            return None
        if isinstance(bias, Known) and not bias.all:
            return None
        shift = bias.wide.expand(bias.shape) if isinstance(bias, Known) else None
        value, dim = weight.value.expand(weight.shape), len(x.shape) - len(weight.shape) + 1
        if call.name == "linear":
            return Mix(dim, value[None, :, :, None], shift)
        groups = int(call.get(6, "groups", default=1))
        grouped = value.reshape(groups, value.shape[0] // groups, value.shape[1], -1)
        if "transpose" in call.name:
            return Mix(dim, grouped.transpose(1, 2), shift, _uneven_transposed(call, weight.shape[2:]))
        return Mix(dim, grouped, shift, _uneven(call))

    @property
    def nonzero(self) -> torch.Tensor:
        """Whether an output takes anything of an input: ``(groups, outputs, inputs)``."""
        return (self.weight != 0).any(-1)

    def constant_part(self, value: torch.Tensor) -> torch.Tensor:
        """What inputs that are ``value``, of shape ``(inputs,)``, everywhere give to each output; without the bias."""
        inputs = value.reshape(self.weight.shape[0], 1, -1)
        some = inputs.flatten().nonzero().flatten()
        if not len(some):
            return torch.zeros(self.weight.shape[0] * self.weight.shape[1], dtype=torch.float64)
        return (self.weight.double().sum(-1) * inputs).sum(-1).flatten()

    def range(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What no output is below, and above, where inputs, of which there are ``(inputs,)``, are not below ``low`` and
        above ``high``."""
        if self.uneven:  # of some taps nothing arrives
            low, high = low.clamp(max=0), high.clamp(min=0)
        groups = self.weight.shape[0]
        low, high = low.reshape(groups, 1, -1), high.reshape(groups, 1, -1)
        rows = max(1, _AT_ONCE // max(1, self.weight[:, :1].numel()))
        starts = range(0, self.weight.shape[1], rows)
        parts = [_range(self.weight[:, i : i + rows].double(), low, high) for i in starts]
        bias = 0.0 if self.bias is None else self.bias
        lowest, highest = (torch.cat(side, 1).flatten() + bias for side in zip(*parts, strict=True))
        return lowest, highest

    def output(self, x: Along, shape: tuple[int, ...]) -> Known:
        """What is sure of the output."""
        fine = x.zero if self.uneven else x.zero | x.sure
        blurred = self.nonzero & ~fine.reshape(self.weight.shape[0], 1, -1)
        sure = ~blurred.any(-1).flatten()
        if not bool(sure.any()):
            return Known.nothing(shape)
        value = self.constant_part(x.value * fine) + (0 if self.bias is None else self.bias)
        small = [-1 if d == self.dim else 1 for d in range(len(shape))]
        return Known.where(shape, sure.reshape(small), value.reshape(small))


def _range(weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of weights times what lies between ``low`` and ``high``, which may be infinite."""
    up, down = weight.clamp(min=0).sum(-1), weight.clamp(max=0).sum(-1)
    sums = []
    for a, b in ((low, high), (high, low)):  # what the positive weights meet, and the negative ones
        total = up * a.nan_to_num(posinf=0, neginf=0) + down * b.nan_to_num(posinf=0, neginf=0)
        endless = ((up > 0) & a.isinf()) | ((down < 0) & b.isinf())
        sums.append(torch.where(endless.any(-1), torch.inf, total.sum(-1)))
    return torch.where(sums[0].isinf(), -torch.inf, sums[0]), sums[1]


def _uneven(call: KnownCall) -> str:
    module: Any = call.module
    if module is not None and module.padding_mode != "zeros":
        return ""
    padding = call.get(4, "padding", default=0) if module is None else module.padding
    if padding == "valid":
        return ""
    if padding == "same":
        kernel = call.get(1, "weight").shape[2:]
        return "it pads with zeros" if any(k > 1 for k in kernel) else ""
    return "it pads with zeros" if any(_all(padding)) else ""


def _uneven_transposed(call: KnownCall, kernel: tuple[int, ...]) -> str:
    """A transposed convolution with a stride of 1 whose border is cropped reaches every place alike."""
    at = {"stride": (3, 1), "padding": (4, 0), "output_padding": (5, 0), "dilation": (7, 1)}
    module: nn.Module | None = call.module
    options = {
        k: _all(call.get(position, k, default=default) if module is None else getattr(module, k))
        for k, (position, default) in at.items()
    }
    count = len(kernel)
    crops, dilation = ((v * count)[:count] if len(v) == 1 else v for v in (options["padding"], options["dilation"]))
    cropped = all(c >= d * (k - 1) for c, d, k in zip(crops, dilation, kernel, strict=True))
    if cropped and set(options["stride"]) == {1} and not any(options["output_padding"]):
        return ""
    return "it is transposed and reaches its outputs unevenly"


def _all(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
