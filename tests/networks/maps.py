"""Blocks over feature maps of one to three dimensions: convolutions of every sort, alone and beside batch norm."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.base import BATCH_NORM, CONV, MAPS, TRANSPOSED, WIDEST, Block, Options, Signal, project

FUNCTIONAL_CONV = {"1d": F.conv1d, "2d": F.conv2d, "3d": F.conv3d}


def conv(signal: Signal, out: int, *, kernel: Any = 3, dilation: int = 1, padding: str = "zeros", groups: str = "one",
         bias: bool = True) -> nn.Module:  # fmt: skip
    """A convolution that keeps the sizes; ``out`` gives way to what a depthwise convolution can emit."""
    rank = len(signal.sizes)
    kernels = (3, 1, 3)[:rank] if kernel == "mixed" else (kernel,) * rank
    if min(signal.sizes) < 3:
        dilation = 1  # reflection needs a padding smaller than the size
    if groups == "depthwise":
        out = signal.channels * (2 if out >= 2 * signal.channels else 1)
    count = {"one": 1, "some": 2, "depthwise": signal.channels}[groups]
    amount: Any = "same" if padding == "same" else tuple(dilation * (k - 1) // 2 for k in kernels)
    mode = "zeros" if padding == "same" else padding
    return CONV[signal.kind](
        signal.channels, out, kernels, padding=amount, dilation=dilation, groups=count, bias=bias, padding_mode=mode
    )


def mixer(signal: Signal) -> nn.Module:
    """The plainest layer that mixes channels: a 3x3 convolution, or a linear layer."""
    return conv(signal, signal.channels) if signal.kind in MAPS else project(signal, signal.channels)


class Conv(Block):
    """One convolution that keeps the sizes."""

    KINDS = MAPS
    OPTIONS: ClassVar[Options] = {
        "out": (4, 8, 6),
        "kernel": (3, 1, "mixed"),
        "padding": ("zeros", "same", "reflect", "circular", "replicate"),
        "dilation": (1, 2),
        "groups": ("one", "some", "depthwise"),
        "bias": (True, False),
    }

    def __init__(self, signal: Signal, out: int, **options: Any) -> None:
        layer = conv(signal, out, **options)
        super().__init__(signal.widened(layer.out_channels))
        self.conv = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DownConv(Block):
    """A strided or unpadded convolution: the map shrinks."""

    KINDS = MAPS
    KEEPS = False
    OPTIONS: ClassVar[Options] = {"out": (4, 8), "stride": (2, 1), "padding": (1, 0), "bias": (True, False)}

    def __init__(self, signal: Signal, out: int, stride: int, padding: int, bias: bool) -> None:
        sizes = tuple((size + 2 * padding - 3) // stride + 1 for size in signal.sizes)
        super().__init__(signal.widened(out).resized(sizes))
        self.conv = CONV[signal.kind](signal.channels, out, 3, stride, padding, bias=bias)

    @classmethod
    def accepts(cls, signal: Signal) -> bool:
        return super().accepts(signal) and min(signal.sizes) >= 5

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class TransposedConv(Block):
    """A transposed convolution, with or without stride, groups and output padding."""

    KINDS = MAPS
    KEEPS = False
    OPTIONS: ClassVar[Options] = {
        "out": (4, 8),
        "form": ("double", "keep", "output_padding", "dilated"),
        "groups": (1, 2),
        "norm": (False, True),
        "bias": (True, False),
    }
    FORMS: ClassVar[dict[str, Any]] = {
        "double": {"kernel_size": 2, "stride": 2},
        "keep": {"kernel_size": 3, "padding": 1},
        "output_padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    }

    def __init__(self, signal: Signal, out: int, form: str, groups: int, norm: bool, bias: bool) -> None:
        factor = 2 if form in ("double", "output_padding") else 1
        super().__init__(signal.widened(out).resized(tuple(factor * size for size in signal.sizes)))
        self.conv = TRANSPOSED[signal.kind](signal.channels, out, groups=groups, bias=bias, **self.FORMS[form])
        self.norm = BATCH_NORM[signal.kind](out) if norm else nn.Identity()

    @classmethod
    def accepts(cls, signal: Signal) -> bool:
        return super().accepts(signal) and max(signal.sizes) <= 4

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ConvNorm(Block):
    """A convolution and batch norm in the orders that are met in practice; not all of them may be folded."""

    KINDS = MAPS
    OPTIONS: ClassVar[Options] = {
        "order": ("conv norm", "conv norm relu", "norm conv", "norm relu conv", "conv norm norm", "norm conv norm"),
        "sort": ("3", "1", "depthwise", "grouped", "reflect", "same", "transposed"),
        "bias": (False, True),
        "affine": (True, False),
        "eps": (1e-5, 1e-2),
    }
    SORTS: ClassVar[dict[str, Any]] = {
        "3": {},
        "1": {"kernel": 1},
        "depthwise": {"groups": "depthwise"},
        "grouped": {"groups": "some"},
        "reflect": {"padding": "reflect"},
        "same": {"padding": "same"},
    }

    def __init__(self, signal: Signal, order: str, sort: str, bias: bool, affine: bool, eps: float) -> None:
        super().__init__(signal)
        channels = signal.channels
        layers: list[nn.Module] = []
        for step in order.split():
            if step == "norm":
                layers.append(BATCH_NORM[signal.kind](channels, eps=eps, affine=affine))
            elif step == "relu":
                layers.append(nn.ReLU())
            elif sort == "transposed":
                layers.append(TRANSPOSED[signal.kind](channels, channels, 3, padding=1, bias=bias))
            else:
                layers.append(conv(signal, channels, bias=bias, **self.SORTS[sort]))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class FunctionalConvNorm(Block):
    """``F.conv*d`` and ``F.batch_norm`` on parameters and buffers of the block's own."""

    KINDS = MAPS
    OPTIONS: ClassVar[Options] = {"bias": (True, False), "affine": (True, False), "groups": (1, 2)}

    def __init__(self, signal: Signal, bias: bool, affine: bool, groups: int) -> None:
        super().__init__(signal)
        channels = signal.channels
        self.weight = nn.Parameter(torch.empty(channels, channels // groups, *(3 for _ in signal.sizes)))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.norm_weight = nn.Parameter(torch.empty(channels)) if affine else None
        self.norm_bias = nn.Parameter(torch.empty(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.kind, self.groups = signal.kind, groups

    def forward(self, x: Tensor) -> Tensor:
        x = FUNCTIONAL_CONV[self.kind](x, self.weight, self.bias, padding=1, groups=self.groups)
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.norm_weight, self.norm_bias, training=self.training, eps=1e-4)


class SecondReader(Block):
    """A layer whose output is read by a batch norm and by something else: the norm must not be folded into it."""

    KINDS = (*MAPS, "vector")
    OPTIONS: ClassVar[Options] = {"form": ("sum", "after", "product", "two norms")}

    def __init__(self, signal: Signal, form: str) -> None:
        super().__init__(signal)
        self.form = form
        self.conv = mixer(signal)
        self.norm = BATCH_NORM[signal.kind](signal.channels)
        self.other = BATCH_NORM[signal.kind](signal.channels) if form == "two norms" else nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.form == "after":
            return y + self.norm(y)
        if self.form == "product":
            return self.norm(y) * torch.sigmoid(y)
        return self.norm(y) + self.other(y)


class Shared(Block):
    """One module called twice: the layer, the batch norm, or both as a pair."""

    KINDS = (*MAPS, "vector")
    OPTIONS: ClassVar[Options] = {"what": ("conv", "norm", "pair", "conv, two norms", "norm before conv")}

    def __init__(self, signal: Signal, what: str) -> None:
        super().__init__(signal)
        self.what = what
        self.conv = mixer(signal)
        self.conv2 = mixer(signal) if what == "norm" else self.conv
        self.norm = BATCH_NORM[signal.kind](signal.channels)
        self.norm2 = BATCH_NORM[signal.kind](signal.channels) if what == "conv, two norms" else self.norm

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "conv":
            return self.norm(self.conv(torch.relu(self.conv(x))))
        if self.what == "norm before conv":
            return self.conv(self.norm(x)) + self.conv(self.norm(torch.tanh(x)))
        x = torch.relu(self.norm(self.conv(x)))
        return self.norm2(self.conv2(x))


class SqueezeExcite(Block):
    """A gate per channel, computed from the pooled map."""

    KINDS = MAPS
    OPTIONS: ClassVar[Options] = {"form": ("mean", "pool", "linear"), "gate": ("sigmoid", "hardsigmoid")}

    def __init__(self, signal: Signal, form: str, gate: str) -> None:
        super().__init__(signal)
        self.form = form
        channels = signal.channels
        pooled = Signal("vector", channels) if form == "linear" else signal
        self.pool = getattr(nn, f"AdaptiveAvgPool{signal.kind}")(1)
        self.reduce = project(pooled, 2)
        self.expand = project(pooled.widened(2), channels)
        self.gate = nn.Sigmoid() if gate == "sigmoid" else nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        spatial = tuple(range(2, x.dim()))
        if self.form == "linear":
            gate = self.gate(self.expand(F.silu(self.reduce(x.mean(spatial)))))
            return x * gate[(..., *(None for _ in spatial))]
        pooled = self.pool(x) if self.form == "pool" else x.mean(spatial, keepdim=True)
        return x * self.gate(self.expand(F.silu(self.reduce(pooled))))


class ChannelShuffle(Block):
    """Interleaves two groups of channels."""

    KINDS = MAPS
    OPTIONS: ClassVar[Options] = {"form": ("view", "function", "module", "permutation")}

    def __init__(self, signal: Signal, form: str) -> None:
        super().__init__(signal)
        self.form = form
        self.shuffle = nn.ChannelShuffle(2) if form == "module" else nn.Identity()
        order = torch.arange(signal.channels).view(2, -1).t().flatten()
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "view":
            batch, channels, *sizes = x.shape
            return x.view(batch, 2, channels // 2, *sizes).transpose(1, 2).contiguous().view(batch, channels, *sizes)
        if self.form == "function":
            return F.channel_shuffle(x, 2)
        return self.shuffle(x) if self.form == "module" else x[:, self.order]


class Pool(Block):
    """Halves the sizes, or doubles them."""

    KINDS = MAPS
    KEEPS = False
    OPTIONS: ClassVar[Options] = {"form": ("max", "avg", "F.max", "F.avg", "interpolate", "upsample")}

    def __init__(self, signal: Signal, form: str) -> None:
        grows = form in ("interpolate", "upsample")
        super().__init__(signal.resized(tuple(size * 2 if grows else size // 2 for size in signal.sizes)))
        self.form, self.kind = form, signal.kind
        layer = {"max": getattr(nn, f"MaxPool{signal.kind}"), "avg": getattr(nn, f"AvgPool{signal.kind}")}
        self.layer = layer[form](2) if form in layer else nn.Identity()
        self.upsample = nn.Upsample(scale_factor=2) if form == "upsample" else nn.Identity()

    @classmethod
    def accepts(cls, signal: Signal) -> bool:
        return super().accepts(signal) and min(signal.sizes) >= 4 and max(signal.sizes) <= WIDEST // 2

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "interpolate":
            return F.interpolate(x, size=[2 * size for size in x.shape[2:]])
        if self.form in ("F.max", "F.avg"):
            return getattr(F, f"{self.form[2:]}_pool{self.kind}")(x, 2)
        return self.upsample(self.layer(x))


MAP_BLOCKS: tuple[type[Block], ...] = (
    Conv,
    ConvNorm,
    DownConv,
    TransposedConv,
    FunctionalConvNorm,
    SecondReader,
    Shared,
    SqueezeExcite,
    ChannelShuffle,
    Pool,
)
