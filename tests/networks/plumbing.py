"""Blocks for every kind of signal that compute little but are easily rewritten wrongly: norms, activations, no-ops,
values that depend on the batch size, buffers, and changes of layout."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.base import BATCH_NORM, INSTANCE_NORM, MAPS, Block, Options, Signal


class Norm(Block):
    """One normalisation layer, with statistics and parameters that are far from trivial."""

    OPTIONS: ClassVar[Options] = {
        "form": (
            "batch",
            "batch, plain",
            "batch, no statistics",
            "layer",
            "group",
            "instance",
            "instance, tracked",
            "rms",
            "local response",
            "F.layer_norm",
            "F.group_norm",
        )
    }

    def __init__(self, signal: Signal, form: str) -> None:
        super().__init__(signal)
        # A statistic over fewer than four numbers is close to a step function; those forms fall back to batch norm.
        if signal.kind in MAPS and signal.positions < 4 and form.startswith(("instance", "batch, no")):
            form = "batch"
        if signal.kind not in MAPS and form.startswith(("instance", "batch, no", "local")):
            form = "layer"
        if signal.channels < 4 and signal.kind not in MAPS and not form.startswith("batch"):
            form = "batch"
        self.form, self.kind = form, signal.kind
        self.norm = self.layer(signal, form)

    @staticmethod
    def layer(signal: Signal, form: str) -> nn.Module:
        channels, shape = signal.channels, list(signal.shape)
        if signal.kind == "sequence":
            shape = [channels]
        if form.startswith("batch"):
            plain, forgets = form == "batch, plain", form == "batch, no statistics"
            return BATCH_NORM[signal.kind](channels, affine=not plain, track_running_stats=not forgets)
        if form.startswith("instance"):
            return INSTANCE_NORM[signal.kind](channels, affine=True, track_running_stats=form == "instance, tracked")
        if form.endswith("group") or form == "F.group_norm":
            return nn.GroupNorm(2 if signal.kind in MAPS else 1, channels, eps=1e-3)
        if form == "local response":
            return nn.LocalResponseNorm(3)
        return nn.RMSNorm(shape, eps=1e-3) if form == "rms" else nn.LayerNorm(shape, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm
        if self.form == "F.layer_norm":
            return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        transposes = self.kind == "sequence" and isinstance(norm, nn.BatchNorm1d | nn.GroupNorm)
        x = x.transpose(1, 2) if transposes else x
        if self.form == "F.group_norm":
            x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        else:
            x = norm(x)
        return x.transpose(1, 2) if transposes else x


ACTIVATIONS = {
    "ReLU": nn.ReLU, "GELU": nn.GELU, "SiLU": nn.SiLU, "Hardswish": nn.Hardswish, "ReLU6": nn.ReLU6, "PReLU": nn.PReLU,
    "Softmax": lambda: nn.Softmax(dim=1),
    "F.relu": lambda: F.relu, "F.gelu": lambda: F.gelu, "F.leaky_relu": lambda: F.leaky_relu,
    "torch.sigmoid": lambda: torch.sigmoid, "Tensor.relu": lambda: Tensor.relu, "Tensor.clamp": lambda: _clamp,
}  # fmt: skip


def _clamp(x: Tensor) -> Tensor:
    return x.clamp(min=-1.5, max=2.0)


class Activation(Block):
    """A pointwise nonlinearity as module, function or method."""

    OPTIONS: ClassVar[Options] = {"form": tuple(ACTIVATIONS)}

    def __init__(self, signal: Signal, form: str) -> None:
        super().__init__(signal)
        self.act = ACTIVATIONS[form]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Noop(Block):
    """Something that changes nothing in eval mode, once as a module and once as an expression."""

    MODULES: ClassVar[dict[str, Any]] = {
        "Identity": nn.Identity, "Dropout": lambda: nn.Dropout(0.3), "AlphaDropout": lambda: nn.AlphaDropout(0.1),
        "Sequential": nn.Sequential, "Flatten": lambda: nn.Flatten(1, 1), "Dropout(0)": lambda: nn.Dropout(0.0),
    }  # fmt: skip
    OPTIONS: ClassVar[Options] = {
        "module": tuple(MODULES),
        "form": ("none", "view", "reshape", "F.dropout", "to dtype", "type_as", "contiguous", "times one", "plus zero",
                 "transpose twice", "squeeze", "slice", "cat of one", "clone", "expand", "reshape inferred",
                 "flatten", "permute", "pad by none", "mean of one", "float mask of ones"),
    }  # fmt: skip

    def __init__(self, signal: Signal, module: str, form: str) -> None:
        super().__init__(signal)
        self.form = form
        self.layer = self.MODULES[module]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.form == "F.dropout":
            return F.dropout(x, 0.2, training=self.training)
        return NOOPS[self.form](x)


NOOPS: dict[str, Any] = {
    "none": lambda x: x,
    "view": lambda x: x.contiguous().view(x.shape),
    "reshape": lambda x: x.reshape(x.size(0), *x.shape[1:]),
    "reshape inferred": lambda x: x.reshape(-1, *x.shape[1:]),
    "to dtype": lambda x: x.to(x.dtype),
    "type_as": lambda x: x.type_as(x),
    "contiguous": lambda x: x.contiguous(),
    "times one": lambda x: x * 1,
    "plus zero": lambda x: x + 0.0,
    "transpose twice": lambda x: x.transpose(0, 1).transpose(0, 1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "slice": lambda x: x[:, 0:],
    "cat of one": lambda x: torch.cat([x], dim=1),
    "clone": lambda x: x.clone(),
    "expand": lambda x: x.expand_as(x),
    "flatten": lambda x: x.flatten(0, 1).view(x.shape),
    "permute": lambda x: x.permute(*range(x.dim())),
    "pad by none": lambda x: F.pad(x, (0, 0)),
    "mean of one": lambda x: x.unsqueeze(-1).mean(-1),
    "float mask of ones": lambda x: x * torch.ones_like(x),
}


class BatchSized(Block):
    """Uses numbers and tensors made inside forward that depend on the batch size."""

    OPTIONS: ClassVar[Options] = {
        "form": (
            "arange",
            "new_zeros",
            "new_full",
            "mask",
            "zeros setitem",
            "linspace",
            "divide",
            "view",
            "len",
            "triangular",
            "full_like",
            "unflatten",
        )
    }

    def __init__(self, signal: Signal, form: str) -> None:
        super().__init__(signal)
        self.form = form
        self.shape = signal.shape

    def forward(self, x: Tensor) -> Tensor:
        return BATCH_SIZED[self.form](x, (-1,) + (1,) * len(self.shape))


def _mask(x: Tensor, column: tuple[int, ...]) -> Tensor:
    keep = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    keep[0] = False
    return torch.where(keep.view(column), x, 0.5 * x)


def _zeros_setitem(x: Tensor, column: tuple[int, ...]) -> Tensor:
    out = torch.zeros(x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)
    out[:, 1:] = x[:, 1:]
    return out + 0.5 * x


def _triangular(x: Tensor, column: tuple[int, ...]) -> Tensor:
    mix = torch.ones(x.shape[0], x.shape[0], dtype=x.dtype).tril()
    return (mix @ x.reshape(x.shape[0], -1)).view(x.shape)


BATCH_SIZED: dict[str, Any] = {
    "arange": lambda x, column: x + 0.1 * torch.arange(x.shape[0], device=x.device).to(x.dtype).view(column),
    "new_zeros": lambda x, column: torch.cat([x, x.new_zeros(x.shape[0], *x.shape[1:])], dim=1)[:, : x.shape[1]],
    "new_full": lambda x, column: x * x.new_full((x.size(0), 1), 0.7).view(column),
    "full_like": lambda x, column: x + torch.full_like(x, 0.2),
    "mask": _mask,
    "zeros setitem": _zeros_setitem,
    "linspace": lambda x, column: x * torch.linspace(1, 2, x.shape[0], dtype=x.dtype).view(column),
    "divide": lambda x, column: x / x.shape[0],
    "view": lambda x, column: x.reshape(x.shape[0], -1).view(x.size()),
    "len": lambda x, column: x * torch.arange(1, len(x) + 1, dtype=x.dtype).view(column),
    "triangular": _triangular,
    "unflatten": lambda x, column: x.flatten(0, 1).unflatten(0, (x.shape[0], x.shape[1])),
}


class Constants(Block):
    """Buffers, bare parameters and plain tensor attributes that forward uses directly."""

    OPTIONS: ClassVar[Options] = {
        "form": ("buffer", "not persistent", "parameter", "attribute", "index", "frozen", "made inside")
    }

    def __init__(self, signal: Signal, form: str) -> None:
        super().__init__(signal)
        self.form, self.columns = form, signal.along_channels()
        ramp = torch.linspace(0.5, 1.5, signal.channels)
        self.register_buffer("ramp", ramp, persistent=form != "not persistent")
        self.register_buffer("order", torch.arange(signal.channels).flip(0))
        self.scale = nn.Parameter(ramp.clone()) if form == "parameter" else None
        self.frozen = nn.Parameter(ramp.clone(), requires_grad=False) if form == "frozen" else None
        self.attribute = ramp.clone() if form == "attribute" else None
        self.axis = signal.axis

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "index":
            return x.index_select(self.axis, self.order)
        if self.form == "made inside":
            return x * torch.tensor([0.5, 2.0], dtype=x.dtype).repeat(x.shape[self.axis] // 2).view(self.columns)
        factor = {"parameter": self.scale, "attribute": self.attribute, "frozen": self.frozen}.get(self.form, self.ramp)
        return x * factor.to(x.dtype).view(self.columns)


class ToVector(Block):
    """Ends in one vector per example: pooled, or flattened and projected."""

    KINDS = (*MAPS, "sequence")
    KEEPS = False
    OPTIONS: ClassVar[Options] = {"form": ("mean", "view", "flatten", "amax", "pool", "first")}

    def __init__(self, signal: Signal, form: str) -> None:
        super().__init__(Signal("vector", signal.channels))
        self.form, self.over = form, tuple(d for d in range(1, 2 + len(signal.sizes)) if d != signal.axis)
        reads_all = form in ("view", "flatten")
        count = signal.channels * signal.positions
        self.linear = nn.Linear(count, signal.channels) if reads_all else nn.Identity()
        self.pool = getattr(nn, f"AdaptiveAvgPool{signal.kind}")(1) if signal.kind in MAPS else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "view":
            return self.linear(x.contiguous().view(x.shape[0], -1))
        if self.form == "flatten":
            return self.linear(torch.flatten(x, 1))
        if self.form == "amax":
            return x.amax(self.over)
        if self.form == "pool" and not isinstance(self.pool, nn.Identity):
            return self.pool(x).flatten(1)
        if self.form == "first":
            return x[:, 0] if self.over == (1,) else x.flatten(2)[:, :, 0]
        return x.mean(self.over)


class ToSequence(Block):
    """A map as a sequence of its positions, a vector as a sequence of two."""

    KINDS = (*MAPS, "vector")
    KEEPS = False
    OPTIONS: ClassVar[Options] = {"form": ("flatten", "view")}

    def __init__(self, signal: Signal, form: str) -> None:
        vector = signal.kind == "vector"
        super().__init__(Signal("sequence", signal.channels, (2 if vector else signal.positions,)))
        self.form = "stack" if vector else form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "stack":
            return torch.stack([x, x.flip(-1)], dim=1)
        if self.form == "flatten":
            return x.flatten(2).transpose(1, 2)
        return x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)


class ToMap(Block):
    """A sequence as a one-dimensional map."""

    KINDS = ("sequence",)
    KEEPS = False

    def __init__(self, signal: Signal) -> None:
        super().__init__(Signal("1d", signal.channels, signal.sizes))

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


PLUMBING_BLOCKS: tuple[type[Block], ...] = (
    Norm,
    Activation,
    Noop,
    BatchSized,
    Constants,
    ToVector,
    ToSequence,
    ToMap,
)
