"""Blocks that change a tensor of their own in place, in the many ways that Python and PyTorch have for it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.base import BATCH_NORM, Block, Options, Signal, project


class InPlace(Block):
    """Changes its own fresh tensor in place, behind the back of a graph that only follows values."""

    OPTIONS: ClassVar[Options] = {
        "form": (
            "ReLU",
            "relu_",
            "F.relu",
            "add_",
            "+=",
            "*=",
            "setitem",
            "setitem mask",
            "augmented slice",
            "masked_fill_",
            "view then add_",
            "clamp_",
            "copy_",
            "unread add_",
            "norm then relu_",
        )
    }

    def __init__(self, signal: Signal, form: str) -> None:
        super().__init__(signal)
        self.form = form
        self.fresh = project(signal, signal.channels)
        self.norm = BATCH_NORM[signal.kind](signal.channels) if signal.kind != "sequence" else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fresh(x)
        if self.form == "ReLU":
            return self.relu(y)
        if self.form == "norm then relu_":
            return self.relu(self.norm(y)) + x
        return INPLACE[self.form](y, x)


def _augmented(y: Tensor, x: Tensor) -> Tensor:
    y += x * 0.5
    return y


def _scaled(y: Tensor, x: Tensor) -> Tensor:
    y *= 1.5
    y /= 2
    y -= x
    return y


def _setitem(y: Tensor, x: Tensor) -> Tensor:
    y[:, 0] = x[:, 1]
    y[:, -1] = 0.25
    return y


def _setitem_mask(y: Tensor, x: Tensor) -> Tensor:
    y[x > 0.5] = 0.75
    return y


def _augmented_slice(y: Tensor, x: Tensor) -> Tensor:
    y[:, 1:] += 1
    y[:, 0].mul_(2)
    return y


def _view_then_add(y: Tensor, x: Tensor) -> Tensor:
    y.view(y.shape[0], -1).add_(0.5)
    return y * 2


def _unread_add(y: Tensor, x: Tensor) -> Tensor:
    y.add_(1)
    z = y + x
    y.zero_()
    return z + y


def _copy(y: Tensor, x: Tensor) -> Tensor:
    out = torch.empty_like(y)
    out.copy_(y)
    return out.sub_(x)


INPLACE: dict[str, Any] = {
    "relu_": lambda y, x: y.relu_(),
    "F.relu": lambda y, x: F.relu(y, inplace=True),
    "add_": lambda y, x: y.add_(x, alpha=0.5),
    "+=": _augmented,
    "*=": _scaled,
    "setitem": _setitem,
    "setitem mask": _setitem_mask,
    "augmented slice": _augmented_slice,
    "masked_fill_": lambda y, x: y.masked_fill_(x < -0.5, -0.1),
    "view then add_": _view_then_add,
    "clamp_": lambda y, x: torch.add(y, x).clamp_(-3, 3),
    "copy_": _copy,
    "unread add_": _unread_add,
}
