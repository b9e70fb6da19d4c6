"""Blocks that hold other blocks: residual sums, concatenated branches, split channels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.networks.base import WIDEST, Block, Options, Signal, Stack, project


class Residual(Block):
    """``x + body(x)``, with a projection behind the body where channels changed or the sum is made in place."""

    OPTIONS: ClassVar[Options] = {
        "form": ("x + y", "y + x", "y += x", "torch.add", "add_", "alpha", "twice", "operator", "relu after")
    }

    def __init__(self, signal: Signal, form: str, body: Stack) -> None:
        super().__init__(signal)
        self.form, self.body = form, body
        # In place only on a fresh tensor of our own: the sum must not reach back into x or into what backward needs.
        fits = body.out == signal and form not in ("y += x", "add_", "relu after")
        self.fit = nn.Identity() if fits else project(body.out, signal.channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fit(self.body(x))
        if self.form == "y += x":
            y += x
            return y
        if self.form == "relu after":
            return (y + x).relu_()
        return SUMS[self.form](x, y)


SUMS: dict[str, Any] = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "torch.add": lambda x, y: torch.add(x, y),
    "add_": lambda x, y: y.add_(x),
    "alpha": lambda x, y: torch.add(x, y, alpha=0.5),
    "twice": lambda x, y: x + y + x,
    "operator": lambda x, y: x.__add__(y),
}


class Concat(Block):
    """Two readers of one tensor, side by side along the channels; projected where that gets too wide."""

    OPTIONS: ClassVar[Options] = {"form": ("with input", "cat", "concat", "negative dim", "three", "stack")}

    def __init__(self, signal: Signal, form: str, body: Stack) -> None:
        extra = {"three": 2 * signal.channels, "stack": 0}.get(form, signal.channels)
        width = body.out.channels + extra
        super().__init__(signal.widened(width if width <= WIDEST else 4))
        self.form, self.body, self.axis = form, body, signal.axis
        same = form in ("with input", "three")
        self.branch = (
            nn.Identity() if same else project(signal, body.out.channels if form == "stack" else signal.channels)
        )
        self.fit = nn.Identity() if width <= WIDEST else project(body.out.widened(width), 4)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.body(x), self.branch(x)
        if self.form == "stack":
            return self.fit(torch.stack([y, z]).sum(0))
        if self.form == "three":
            return self.fit(torch.cat((z, y, x), self.axis))
        if self.form == "concat":
            return self.fit(torch.concat([y, z], dim=self.axis))
        if self.form == "negative dim":
            return self.fit(torch.cat([y, z], dim=self.axis - y.dim()))
        return self.fit(torch.cat([z, y], self.axis))


class Split(Block):
    """Half of the channels goes through the body, the other half past it."""

    OPTIONS: ClassVar[Options] = {
        "form": ("chunk", "split", "split sizes", "slice", "narrow", "tensor_split", "gate", "unbind")
    }

    def __init__(self, signal: Signal, form: str, body: Stack) -> None:
        super().__init__(signal)
        self.form, self.axis, self.half = form, signal.axis, signal.channels // 2
        self.body = body
        self.fit = nn.Identity() if body.out.channels == self.half else project(body.out, self.half)
        self.merge = project(signal.widened(self.half), signal.channels) if form == "gate" else nn.Identity()

    @classmethod
    def accepts(cls, signal: Signal) -> bool:
        return signal.channels % 4 == 0

    @staticmethod
    def inner(signal: Signal) -> Signal:
        """The signal that the body reads."""
        return signal.widened(signal.channels // 2)

    def halves(self, x: Tensor) -> tuple[Tensor, ...]:
        axis, half = self.axis, self.half
        if self.form == "split":
            return x.split(half, axis)
        if self.form == "split sizes":
            return torch.split(x, [half, half], dim=axis)
        if self.form == "tensor_split":
            return x.tensor_split(2, dim=axis)
        if self.form == "narrow":
            return x.narrow(axis, 0, half), x.narrow(axis, half, half)
        if self.form == "slice":
            return (x[..., :half], x[..., half:]) if axis == 2 else (x[:, :half], x[:, half:])
        if self.form == "unbind":
            return x.unflatten(axis, (2, half)).unbind(axis)
        return x.chunk(2, dim=axis)

    def forward(self, x: Tensor) -> Tensor:
        past, through = self.halves(x)
        through = self.fit(self.body(through))
        if self.form == "gate":
            return self.merge(past * torch.sigmoid(through))
        return torch.cat([past, through], dim=self.axis)


COMPOSITES: tuple[type[Block], ...] = (Residual, Concat, Split)
