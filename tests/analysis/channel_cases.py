"""Small networks and their channel groups, told by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.modules import GroupedLinear

__all__ = ["CASES", "Case", "Net", "conv", "image", "parameter", "sequence"]


class Net(nn.Module):
    """A forward and the parts that it uses; tensors become buffers."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.run = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and its groups, a line each as ``test_channels.told`` has it; layers named ``out`` make the output.

    Attributes:
        make: makes it.
        inputs: for it.
        groups: with ``attention="heads"``.
        head_dim: with ``attention="head_dim"``, where these are others.
        frozen: channels that may not go, besides the output's own.
        batches: whether it runs at other batch sizes.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    groups: tuple[str, ...]
    head_dim: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()
    batches: bool = True


# --- the parts of the networks ---


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def image(channels: int = 3, size: int = 8) -> tuple[Tensor]:
    return (torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def sequence(length: int = 5, width: int = 8) -> tuple[Tensor]:
    return (torch.randn(2, length, width, generator=torch.Generator().manual_seed(0)),)


IDS = (torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]),)


# --- channels ---


def residual(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.out(x + m.c(m.b(x).relu()))


def dense(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    y = m.b(x)
    z = m.c(torch.cat([x, y], 1))
    return m.out(torch.cat([x, y, z], 1))


def split(m: Any, x: Tensor) -> Tensor:
    past, through = m.a(x).split([3, 5], 1)
    return m.out(torch.cat([past, m.b(through)], 1))


def uneven_chunks(m: Any, x: Tensor) -> Tensor:
    first, second, third = m.a(x).chunk(3, 1)
    return m.out(first * second) + m.out2(third)


def slices(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.out(x[:, :5]) + m.out2(x[:, 3:-1]) + m.out3(x[:, -1:])


def squeeze_excite(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.out(x * m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


def shuffle(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    batch, channels, *sizes = x.shape
    return m.out(x.view(batch, 2, channels // 2, *sizes).transpose(1, 2).reshape(batch, channels, *sizes))


def two_callers(m: Any, x: Tensor) -> Tensor:
    return m.out(m.b(m.a(x))) + m.out2(m.b(m.c(x)))


def spatial_gate(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.out(x * m.gate(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid())


def folded_blur(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    batch, channels, *sizes = x.shape
    return m.out(F.conv2d(x.reshape(batch * channels, 1, *sizes), m.kernel, padding=1).view(x.shape))


def selective_kernel(m: Any, x: Tensor) -> Tensor:
    x = torch.stack([m.a(x), m.b(x)], 1)
    gate = m.up(x.sum(1).mean((2, 3))).view(x.shape[0], 2, -1, 1, 1).softmax(1)
    return m.out((x * gate).sum(1))


CONVOLUTIONS = {
    "chain": Case(
        lambda: Net(lambda m, x: m.out(m.b(m.a(x)).relu()), a=conv(3, 8), b=nn.BatchNorm2d(8), out=conv(8, 4)),
        image(),
        ("8 of a: a.bias[i], b.running_mean[i], b.running_var[i], b.weight[i], b.bias[i], out.weight[:, i]",),
    ),
    "residual": Case(
        lambda: Net(residual, a=conv(3, 8), b=conv(8, 6), c=conv(6, 8), out=conv(8, 4)),
        image(),
        ("8 of a, c: a.bias[i], b.weight[:, i], c.bias[i], out.weight[:, i]", "6 of b: b.bias[i], c.weight[:, i]"),
    ),
    "residual around the input": Case(
        lambda: Net(lambda m, x: m.out(x + m.b(m.a(x))), a=conv(3, 8), b=conv(8, 3), out=conv(3, 4)),
        image(),
        ("8 of a: a.bias[i], b.weight[:, i]",),
        frozen=("3 of b: combined by add (node 'add') with the model's input 'inputs_0'",),
    ),
    "dense": Case(
        lambda: Net(dense, a=conv(3, 4), b=conv(4, 4), c=conv(8, 4), out=conv(12, 2)),
        image(),
        (
            "4 of a: a.bias[i], b.weight[:, i], c.weight[:, i], out.weight[:, i]",
            "4 of b: b.bias[i], c.weight[:, i], out.weight[:, i]",
            "4 of c: c.bias[i], out.weight[:, i]",
        ),
    ),
    "concatenated with the input": Case(
        lambda: Net(lambda m, x: m.out(torch.cat([m.a(x), x], 1)), a=conv(3, 8), out=conv(11, 4)),
        image(),
        ("8 of a: a.bias[i], out.weight[:, i]",),
    ),
    "split": Case(
        lambda: Net(split, a=conv(3, 8), b=conv(5, 4), out=conv(7, 2)),
        image(),
        (
            "5 of a: a.bias[i], b.weight[:, i]",
            "3 of a: a.bias[i], out.weight[:, i]",
            "4 of b: b.bias[i], out.weight[:, i]",
        ),
    ),
    "uneven chunks": Case(
        lambda: Net(uneven_chunks, a=conv(3, 8), out=conv(3, 2), out2=conv(2, 2)),
        image(),
        ("3 of a: a.bias[i], out.weight[:, i]", "2 of a: a.bias[i], out2.weight[:, i]"),
    ),
    "slices that overlap": Case(
        lambda: Net(slices, a=conv(3, 8), out=conv(5, 2), out2=conv(4, 2), out3=conv(1, 2)),
        image(),
        (
            "3 of a: a.bias[i], out.weight[:, i]",
            "2 of a: a.bias[i], out.weight[:, i], out2.weight[:, i]",
            "2 of a: a.bias[i], out2.weight[:, i]",
        ),
        frozen=("1 of a: a single element of it is picked by getitem (node 'getitem_2')",),
    ),
    "grouped, two wide groups": Case(  # the same part of both
        lambda: Net(lambda m, x: m.out(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 12, groups=2), out=conv(12, 2)),
        image(),
        ("4 of a: a.bias[i], b.weight[:, i]", "6 of b: b.bias[i], out.weight[:, i]"),
    ),
    "grouped, four narrow groups": Case(  # whole ones
        lambda: Net(lambda m, x: m.out(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 12, groups=4), out=conv(12, 2)),
        image(),
        ("4 of a, b: a.bias[i], b.bias[i], out.weight[:, i]",),
    ),
    "depthwise": Case(
        lambda: Net(lambda m, x: m.out(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 16, groups=8), out=conv(16, 2)),
        image(),
        ("8 of a, b: a.bias[i], b.bias[i], out.weight[:, i]",),
    ),
    "transposed": Case(
        lambda: Net(lambda m, x: m.out(m.b(m.a(x))), a=conv(3, 8), b=nn.ConvTranspose2d(8, 6, 2, 2), out=conv(6, 2)),
        image(),
        ("8 of a: a.bias[i], b.weight[i]", "6 of b: b.bias[i], out.weight[:, i]"),
    ),
    "transposed, two wide groups": Case(
        lambda: Net(
            lambda m, x: m.out(m.b(m.a(x))),
            a=conv(3, 8), b=nn.ConvTranspose2d(8, 12, 2, 2, groups=2, bias=False), out=conv(12, 2),
        ),
        image(),
        ("4 of a: a.bias[i], b.weight[i]", "6 of b: out.weight[:, i]"),
    ),
    "transposed, four narrow groups": Case(
        lambda: Net(
            lambda m, x: m.out(m.b(m.a(x))),
            a=conv(3, 8), b=nn.ConvTranspose2d(8, 12, 2, 2, groups=4, bias=False), out=conv(12, 2),
        ),
        image(),
        ("4 of a, b: a.bias[i], out.weight[:, i]",),
    ),
    "squeeze and excite": Case(
        lambda: Net(squeeze_excite, a=conv(3, 8), down=conv(8, 2, 1), up=conv(2, 8, 1), out=conv(8, 2)),
        image(),
        (
            "8 of a, up: a.bias[i], down.weight[:, i], up.bias[i], out.weight[:, i]",
            "2 of down: down.bias[i], up.weight[:, i]",
        ),
    ),
    "spatial gate": Case(
        lambda: Net(spatial_gate, a=conv(3, 8), gate=conv(2, 1), out=conv(8, 2)),
        image(),
        ("~8 of a: a.bias[i], out.weight[:, i]",),
        frozen=("1 of gate: made without a parameter",),
    ),
    "selective kernel": Case(
        lambda: Net(selective_kernel, a=conv(3, 8), b=conv(3, 8), up=nn.Linear(8, 16), out=conv(8, 2)),
        image(),
        ("~8 of a, b, up: a.bias[i], b.bias[i], up.weight[:, i], up.bias[i], out.weight[:, i]",),
    ),
    "channel shuffle": Case(
        lambda: Net(shuffle, a=conv(3, 8), out=conv(8, 2)), image(), ("4 of a: a.bias[i], out.weight[:, i]",)
    ),
    "channel shuffle as a module": Case(
        lambda: Net(lambda m, x: m.out(m.s(m.a(x))), a=conv(3, 8), s=nn.ChannelShuffle(2), out=conv(8, 2)),
        image(),
        ("4 of a: a.bias[i], out.weight[:, i]",),
    ),
    "pixel shuffle": Case(
        lambda: Net(lambda m, x: m.out(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 16), out=conv(4, 2)),
        image(),
        ("4 of a: a.bias[i], out.weight[:, i]",),
    ),
    "pixel unshuffle": Case(
        lambda: Net(lambda m, x: m.out(F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 4), out=conv(16, 2)),
        image(),
        ("4 of a: a.bias[i], out.weight[:, i]",),
    ),
    "flatten to a linear layer": Case(
        lambda: Net(lambda m, x: m.out(m.a(x).flatten(1)), a=conv(3, 8), out=nn.Linear(512, 4)),
        image(),
        ("8 of a: a.bias[i], out.weight[:, i]",),
    ),
    "flatten with channels last": Case(
        lambda: Net(lambda m, x: m.out(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 8), out=nn.Linear(512, 4)),
        image(),
        ("8 of a: a.bias[i], out.weight[:, i]",),
    ),
    "one module called twice": Case(
        lambda: Net(lambda m, x: m.out(m.b(m.b(m.a(x)).relu())), a=conv(3, 8), b=conv(8, 8), out=conv(8, 2)),
        image(),
        ("8 of a, b: a.bias[i], b.weight[:, i], b.bias[i], out.weight[:, i]",),
    ),
    "one module, two callers": Case(
        lambda: Net(two_callers, a=conv(3, 8), c=conv(3, 8), b=conv(8, 6), out=conv(6, 2), out2=conv(6, 2)),
        image(),
        (
            "8 of a, c: a.bias[i], b.weight[:, i], c.bias[i]",
            "6 of b: b.bias[i], out.weight[:, i], out2.weight[:, i]",
        ),
    ),
    "channels in the batch": Case(
        lambda: Net(folded_blur, a=conv(3, 8), kernel=torch.randn(1, 1, 3, 3), out=conv(8, 2)),
        image(),
        ("8 of a: a.bias[i], out.weight[:, i]",),
        frozen=("1 of conv2d: made without a parameter",),
    ),
}  # fmt: skip


# --- norms, activations, parameters ---


def gated(m: Any, x: Tensor) -> Tensor:
    return m.out(F.silu(m.gate(x)) * m.up(x))


def layer_scale(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.out(x + m.scale * m.b(x))


def standardised(m: Any, x: Tensor) -> Tensor:
    weight = (m.weight - m.weight.mean((1, 2, 3), keepdim=True)) / m.weight.std((1, 2, 3), keepdim=True)
    return m.out(F.conv2d(m.a(x), weight, m.bias, padding=1))


def vision_stem(m: Any, x: Tensor) -> Tensor:
    x = m.a(x).flatten(2).transpose(1, 2)
    x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
    return m.out(x[:, 0])


def response_norm(m: Any, x: Tensor) -> Tensor:
    """ConvNeXt V2's: the norm over positions, divided by its mean over channels."""
    x = m.a(x)
    norm = x.norm(p=2, dim=1, keepdim=True)
    return m.out(x + m.gain * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + m.shift)


class StochasticDepth(nn.Module):
    """A leaf, as tracing keeps whatever reads ``self.training``."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1, 1, 1) < 0.5) if self.training else x


class NotElementwise(nn.Module):
    """A leaf that mixes channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.training else x.cumsum(1)


LAYERS = {
    "group norm, two wide groups": Case(
        lambda: Net(lambda m, x: m.out(m.n(m.a(x))), a=conv(3, 12), n=nn.GroupNorm(2, 12), out=conv(12, 2)),
        image(),
        ("~6 of a: a.bias[i], n.weight[i], n.bias[i], out.weight[:, i]",),
    ),
    "group norm, four narrow groups": Case(
        lambda: Net(lambda m, x: m.out(m.n(m.a(x))), a=conv(3, 12), n=nn.GroupNorm(4, 12), out=conv(12, 2)),
        image(),
        ("4 of a: a.bias[i], n.weight[i], n.bias[i], out.weight[:, i]",),
    ),
    "instance norm": Case(
        lambda: Net(
            lambda m, x: m.out(m.n(m.a(x))), a=conv(3, 8), n=nn.InstanceNorm2d(8, affine=True), out=conv(8, 2)
        ),
        image(),
        ("8 of a: a.bias[i], n.weight[i], n.bias[i], out.weight[:, i]",),
    ),
    "batch norm without parameters": Case(
        lambda: Net(
            lambda m, x: m.out(m.n(m.a(x))), a=conv(3, 8), n=nn.BatchNorm2d(8, affine=False), out=conv(8, 2)
        ),
        image(),
        ("8 of a: a.bias[i], n.running_mean[i], n.running_var[i], out.weight[:, i]",),
    ),
    "layer norm": Case(
        lambda: Net(lambda m, x: m.out(m.n(m.a(x))), a=nn.Linear(8, 6), n=nn.LayerNorm(6), out=nn.Linear(6, 3)),
        sequence(),
        ("~6 of a: a.bias[i], n.weight[i], n.bias[i], out.weight[:, i]",),
    ),
    "RMS norm": Case(
        lambda: Net(lambda m, x: m.out(m.n(m.a(x))), a=nn.Linear(8, 6), n=nn.RMSNorm(6), out=nn.Linear(6, 3)),
        sequence(),
        ("~6 of a: a.bias[i], n.weight[i], out.weight[:, i]",),
    ),
    "softmax over channels": Case(
        lambda: Net(lambda m, x: m.out(m.a(x).softmax(1)), a=conv(3, 8), out=conv(8, 2)),
        image(),
        ("~8 of a: a.bias[i], out.weight[:, i]",),
    ),
    "PReLU": Case(
        lambda: Net(lambda m, x: m.out(m.n(m.a(x))), a=conv(3, 8), n=nn.PReLU(8), out=conv(8, 2)),
        image(),
        ("8 of a: a.bias[i], n.weight[i], out.weight[:, i]",),
    ),
    "PReLU with one parameter": Case(
        lambda: Net(lambda m, x: m.out(m.n(m.a(x))), a=conv(3, 8), n=nn.PReLU(), out=conv(8, 2)),
        image(),
        ("8 of a: a.bias[i], out.weight[:, i]",),
    ),
    "GLU": Case(
        lambda: Net(lambda m, x: m.out(F.glu(m.a(x))), a=nn.Linear(8, 12), out=nn.Linear(6, 3)),
        sequence(),
        ("6 of a: a.bias[i], out.weight[:, i]",),
    ),
    "gate and up": Case(
        lambda: Net(gated, gate=nn.Linear(8, 6), up=nn.Linear(8, 6), out=nn.Linear(6, 3)),
        sequence(),
        ("6 of gate, up: gate.bias[i], up.bias[i], out.weight[:, i]",),
    ),
    "layer scale": Case(
        lambda: Net(layer_scale, a=nn.Linear(8, 6), b=nn.Linear(6, 6), scale=parameter(6), out=nn.Linear(6, 3)),
        sequence(),
        ("6 of a, b: a.bias[i], b.weight[:, i], b.bias[i], scale[i], out.weight[:, i]",),
    ),
    "positions and class token": Case(
        lambda: Net(
            vision_stem,
            a=nn.Conv2d(3, 8, 4, 4), token=parameter(1, 1, 8), position=parameter(1, 5, 8), out=nn.Linear(8, 3),
        ),
        image(),
        ("8 of a: a.bias[i], token[:, :, i], position[:, :, i], out.weight[:, i]",),
    ),
    "global response norm": Case(
        lambda: Net(
            response_norm,
            a=nn.Linear(8, 6), gain=parameter(1, 1, 6), shift=parameter(1, 1, 6), out=nn.Linear(6, 3),
        ),
        sequence(),
        ("~6 of a: a.bias[i], gain[:, :, i], shift[:, :, i], out.weight[:, i]",),
    ),
    "weight standardisation": Case(
        lambda: Net(standardised, a=conv(3, 8), weight=parameter(6, 8, 3, 3), bias=parameter(6), out=conv(6, 2)),
        image(),
        ("6 of weight: bias[i], out.weight[:, i]", "~8 of a: weight[:, i], a.bias[i]"),
    ),
    "stochastic depth": Case(
        lambda: Net(
            lambda m, x: (lambda y: m.out(y + m.d(m.b(y))))(m.a(x)),
            a=conv(3, 8), b=conv(8, 8), d=StochasticDepth(), out=conv(8, 2),
        ),
        image(),
        ("8 of a, b: a.bias[i], b.weight[:, i], b.bias[i], out.weight[:, i]",),
    ),
    "a leaf that is not elementwise": Case(
        lambda: Net(lambda m, x: m.out(m.d(m.a(x))), a=conv(3, 8), d=NotElementwise(), out=conv(8, 2)),
        image(),
        (),
        frozen=("8 of a: read by NotElementwise 'd'",),
    ),
    "embedding": Case(
        lambda: Net(lambda m, ids: m.out(m.a(ids)), a=nn.Embedding(11, 8), out=nn.Linear(8, 3)),
        IDS,
        ("8 of a: out.weight[:, i]",),
    ),
}  # fmt: skip


# --- attention ---


def heads(x: Tensor, count: int) -> Tensor:
    batch, length, width = x.shape
    return x.view(batch, length, count, width // count).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    batch, count, length, width = x.shape
    return x.transpose(1, 2).reshape(batch, length, count * width)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1) @ value


def by_hand(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.out(m.o(merged(attend(heads(m.q(x), 2), heads(m.k(x), 2), heads(m.v(x), 2)))))


def fused(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    y = F.scaled_dot_product_attention(heads(m.q(x), 2), heads(m.k(x), 2), heads(m.v(x), 2))
    return m.out(m.o(merged(y)))


def packed(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    batch, length, _ = x.shape
    query, key, value = m.qkv(x).reshape(batch, length, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(m.o(merged(F.scaled_dot_product_attention(query, key, value))))


def module(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.out(m.attention(x, x, x)[0])


def packed_chunks(m: Any, x: Tensor) -> Tensor:
    query, key, value = (heads(part, 2) for part in m.qkv(m.a(x)).chunk(3, -1))
    return m.out(m.o(merged(F.scaled_dot_product_attention(query, key, value))))


def query_groups(m: Any, x: Tensor, repeat: Callable[[Tensor], Tensor]) -> Tensor:
    x = m.a(x)
    query, key, value = heads(m.q(x), 4), repeat(heads(m.k(x), 2)), repeat(heads(m.v(x), 2))
    return m.out(m.o(merged(F.scaled_dot_product_attention(query, key, value))))


def expanded(x: Tensor) -> Tensor:
    batch, count, length, width = x.shape
    return x[:, :, None].expand(batch, count, 2, length, width).reshape(batch, 2 * count, length, width)


def query_groups_by_flag(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    query, key, value = heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2)
    return m.out(m.o(merged(F.scaled_dot_product_attention(query, key, value, enable_gqa=True))))


def by_einsum(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    query, key, value = (layer(x).view(*x.shape[:2], 2, -1) for layer in (m.q, m.k, m.v))
    weights = torch.einsum("blhe,bshe->bhls", query, key).softmax(-1)
    return m.out(m.o(torch.einsum("bhls,bshe->blhe", weights, value).reshape(*x.shape[:2], -1)))


def by_bmm(m: Any, x: Tensor) -> Tensor:
    """Heads in the batch: (B H, L, E)."""
    x = m.a(x)
    batch, length, _ = x.shape
    query, key, value = (heads(f(x), 2).reshape(batch * 2, length, 4) for f in (m.q, m.k, m.v))
    y = torch.bmm(torch.bmm(query, key.transpose(1, 2)).softmax(-1), value)
    return m.out(m.o(merged(y.view(batch, 2, length, 4))))


def rotated(m: Any, x: Tensor) -> Tensor:
    """Rotary positions: each half of a head turns into the other."""
    x = m.a(x)
    query, key, value = (heads(f(x), 2) for f in (m.q, m.k, m.v))

    def turn(t: Tensor) -> Tensor:
        half = t.shape[-1] // 2
        return t * m.cos + torch.cat([-t[..., half:], t[..., :half]], -1) * m.sin

    return m.out(m.o(merged(F.scaled_dot_product_attention(turn(query), turn(key), value))))


def with_position_bias(m: Any, x: Tensor) -> Tensor:
    """Swin's: a table with a column for each head."""
    x = m.a(x)
    query, key, value = (heads(f(x), 2) for f in (m.q, m.k, m.v))
    bias = m.table[m.index].permute(2, 0, 1)[None]
    return m.out(m.o(merged((query @ key.mT + bias).softmax(-1) @ value)))


def windows(m: Any, x: Tensor) -> Tensor:
    x = torch.roll(m.a(x).permute(0, 2, 3, 1), (-2, -2), (1, 2))
    batch, height, width, channels = x.shape
    x = x.view(batch, height // 4, 4, width // 4, 4, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, channels)
    x = m.b(x).view(batch, height // 4, width // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5)
    return m.out(torch.roll(x.reshape(batch, height, width, -1), (2, 2), (1, 2)))


def projections(width: int = 8, **more: Any) -> dict[str, Any]:
    sizes = {"a": (8, 6), "q": (6, width), "k": (6, width), "v": (6, width), "o": (width, 6), "out": (6, 3)}
    return {name: nn.Linear(*size) for name, size in sizes.items()} | more


def few_keys() -> dict[str, Any]:
    return projections() | {"k": nn.Linear(6, 4), "v": nn.Linear(6, 4)}


A = "6 of a: a.bias[i], q.weight[:, i], k.weight[:, i], v.weight[:, i]"
O = "6 of o: o.bias[i], out.weight[:, i]"  # noqa: E741
HEADS = (A, "2 of q, k, v: q.bias[i], k.bias[i], v.bias[i], o.weight[:, i]", O)
HEAD_DIM = (A, "4 of q, k: q.bias[i], k.bias[i]", "4 of v: v.bias[i], o.weight[:, i]", O)
NARROW = (A, "2 of q, k: q.bias[i], k.bias[i]", "2 of v: v.bias[i], o.weight[:, i]", O)
PACKED = ("6 of a: a.bias[i], qkv.weight[:, i]", "{} of qkv: qkv.bias[i], o.weight[:, i]", O)


def packed_parts() -> dict[str, Any]:
    return {"a": nn.Linear(8, 6), "qkv": nn.Linear(6, 24), "o": nn.Linear(8, 6), "out": nn.Linear(6, 3)}


ATTENTIONS = {
    "matmul": Case(lambda: Net(by_hand, **projections()), sequence(), HEADS, HEAD_DIM),
    "matmul, wide values": Case(
        lambda: Net(by_hand, **projections() | {"v": nn.Linear(6, 12), "o": nn.Linear(12, 6)}),
        sequence(),
        HEADS,
        (A, "4 of q, k: q.bias[i], k.bias[i]", "6 of v: v.bias[i], o.weight[:, i]", O),
    ),
    "sdpa": Case(lambda: Net(fused, **projections()), sequence(), HEADS, HEAD_DIM),
    "qkv in one layer": Case(
        lambda: Net(packed, **packed_parts()),
        sequence(),
        tuple(line.format(2) for line in PACKED),
        tuple(line.format(4) for line in PACKED),
    ),
    "qkv in one layer, chunks": Case(
        lambda: Net(packed_chunks, **packed_parts()),
        sequence(),
        tuple(line.format(2) for line in PACKED),
        (PACKED[0], "4 of qkv: qkv.bias[i]", PACKED[1].format(4), O),
    ),
    "nn.MultiheadAttention": Case(
        lambda: Net(
            module, a=nn.Linear(8, 6), attention=nn.MultiheadAttention(6, 2, batch_first=True), out=nn.Linear(6, 3)
        ),
        sequence(),
        (
            "6 of a: a.bias[i], attention.in_proj.weight[:, i]",
            "2 of attention.in_proj: attention.in_proj.bias[i], attention.out_proj.weight[:, i]",
            "6 of attention.out_proj: attention.out_proj.bias[i], out.weight[:, i]",
        ),
        (
            "6 of a: a.bias[i], attention.in_proj.weight[:, i]",
            "3 of attention.in_proj: attention.in_proj.bias[i]",
            "3 of attention.in_proj: attention.in_proj.bias[i], attention.out_proj.weight[:, i]",
            "6 of attention.out_proj: attention.out_proj.bias[i], out.weight[:, i]",
        ),
    ),
    "grouped queries, expand": Case(
        lambda: Net(lambda m, x: query_groups(m, x, expanded), **few_keys()), sequence(), HEADS, NARROW
    ),
    "grouped queries, repeat_interleave": Case(
        lambda: Net(lambda m, x: query_groups(m, x, lambda t: t.repeat_interleave(2, 1)), **few_keys()),
        sequence(),
        HEADS,
        NARROW,
    ),
    "grouped queries, repeat": Case(
        lambda: Net(lambda m, x: query_groups(m, x, lambda t: t.repeat(1, 2, 1, 1)), **few_keys()),
        sequence(),
        HEADS,
        NARROW,
    ),
    "grouped queries, enable_gqa": Case(lambda: Net(query_groups_by_flag, **few_keys()), sequence(), HEADS, NARROW),
    "einsum": Case(lambda: Net(by_einsum, **projections()), sequence(), HEADS, HEAD_DIM),
    "bmm": Case(lambda: Net(by_bmm, **projections()), sequence(), HEADS, HEAD_DIM),
    "rotary positions": Case(
        lambda: Net(rotated, **projections(cos=torch.randn(5, 4), sin=torch.randn(5, 4))),
        sequence(),
        HEADS,
        (A, "2 of q, k: q.bias[i], k.bias[i], cos[:, i], sin[:, i]", "4 of v: v.bias[i], o.weight[:, i]", O),
    ),
    "relative position bias": Case(
        lambda: Net(with_position_bias, **projections(table=parameter(9, 2), index=torch.arange(25).view(5, 5) % 9)),
        sequence(),
        (A, "2 of q, k, v: q.bias[i], k.bias[i], v.bias[i], table[:, i], o.weight[:, i]", O),
        HEAD_DIM,
    ),
    "windows that are rolled": Case(
        lambda: Net(windows, a=conv(3, 8), b=nn.Linear(8, 6), out=nn.Linear(6, 3)),
        image(),
        ("8 of a: a.bias[i], b.weight[:, i]", "6 of b: b.bias[i], out.weight[:, i]"),
    ),
    "einsum with a parameter": Case(
        lambda: Net(
            lambda m, x: m.out(torch.einsum("bld,de->ble", m.a(x), m.w)),
            a=nn.Linear(8, 6), w=parameter(6, 8), out=nn.Linear(8, 3),
        ),
        sequence(),
        ("6 of a: a.bias[i], w[i]",),
    ),
}  # fmt: skip

# --- channels that may not go ---


class TiedEmbedding(nn.Module):
    """A language model's ends: the embedding is the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.out(x + self.down(self.up(x).relu()))


def masked_assignment(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[m.b(x) > 0] = 0.5
    return m.out(y)


def assignments(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 0] = m.b(x)[:, 1]
    y[:, -1] = 0.25
    return m.out(y)


def padded_shortcut(m: Any, x: Tensor) -> Tensor:
    """ResNet's option A."""
    x = m.a(x)
    return m.out(m.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


def mixed_positions(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.out(x + m.t2(m.t1(x.transpose(1, 2)).relu()).transpose(1, 2))


def looked_at(m: Any, x: Tensor) -> Tensor:
    return m.out(F.grid_sample(m.a(x), m.b(x).permute(0, 2, 3, 1).tanh(), align_corners=False))


def outer(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.out((x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(2))


def made_weight(m: Any, x: Tensor) -> Tensor:
    """The weight is what another layer makes."""
    return m.out(F.conv2d(m.a(x), m.b(m.seed).view(6, 8, 3, 3), padding=1))


def two_linears(forward: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Net(forward, **({"a": nn.Linear(8, 6), "out": nn.Linear(6, 3)} | parts))


def two_convs(forward: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Net(forward, **({"a": conv(3, 8), "out": conv(8, 2)} | parts))


FROZEN = {
    "LSTM": Case(
        two_linears(lambda m, x: m.out(m.b(m.a(x))[0]), b=nn.LSTM(6, 6, batch_first=True)),
        sequence(),
        (),
        frozen=("6 of a: read by LSTM 'b'",),
    ),
    "bilinear layer": Case(
        two_linears(lambda m, x: m.out(m.b(m.a(x), x)), b=nn.Bilinear(6, 8, 6)),
        sequence(),
        (),
        frozen=("6 of a: read by Bilinear 'b'",),
    ),
    "function that is not known": Case(
        two_linears(lambda m, x: m.out(torch.cdist(m.a(x), m.b(x))), b=nn.Linear(8, 6), out=nn.Linear(5, 3)),
        sequence(),
        (),
        frozen=(
            "6 of a: read by cdist (node 'cdist'), which is not known",
            "6 of b: read by cdist (node 'cdist'), which is not known",
        ),
    ),
    "output on the way": Case(
        two_convs(lambda m, x: (m.out(y := m.a(x)), y)), image(), (), frozen=("8 of a: the model's output",)
    ),
    "channels rolled": Case(
        two_convs(lambda m, x: m.out(m.a(x).roll(1, 1))),
        image(),
        (),
        frozen=("8 of a: reordered by roll (node 'roll')",),
    ),
    "every other channel": Case(
        two_convs(lambda m, x: m.out(m.a(x)[:, ::2]), out=conv(4, 2)),
        image(),
        (),
        frozen=("8 of a: reordered by getitem (node 'getitem')",),
    ),
    "channels sorted": Case(
        two_linears(lambda m, x: m.out(m.a(x).sort(-1)[0])),
        sequence(),
        (),
        frozen=("6 of a: in the order of sort (node 'sort')",),
    ),
    "channels summed up": Case(
        two_linears(lambda m, x: m.out(m.a(x).cumsum(-1))),
        sequence(),
        (),
        frozen=("6 of a: in the order of cumsum (node 'cumsum')",),
    ),
    "channels padded": Case(
        two_convs(padded_shortcut, a=conv(3, 4), b=nn.Conv2d(4, 8, 3, 2, 1)),
        image(),
        (),
        frozen=(
            "4 of a: taken apart by pad (node 'pad')",
            "8 of b: combined by add (node 'add') with what is taken apart by pad (node 'pad')",
        ),
    ),
    "patches": Case(
        two_convs(lambda m, x: m.out(F.unfold(m.a(x), 2, stride=2)), a=conv(3, 4), out=nn.Conv1d(16, 2, 1)),
        image(),
        (),
        frozen=("4 of a: cut into patches by unfold (node 'unfold')",),
    ),
    "diagonal": Case(
        two_linears(lambda m, x: m.out(torch.einsum("bld,dd->bld", m.a(x), m.w)), w=parameter(6, 6)),
        sequence(),
        (),
        frozen=("6 of a: a diagonal is taken by einsum (node 'einsum')",),
    ),
    "outer product": Case(
        two_linears(outer, out=nn.Linear(36, 3)),
        sequence(),
        (),
        frozen=("6 of a: merged with another dimension by flatten (node 'flatten')",),
    ),
    "weight that a layer makes": Case(
        two_convs(made_weight, b=nn.Linear(4, 432), seed=parameter(4), out=conv(6, 2)),
        image(),
        (),
        frozen=tuple(
            f"{count} of {name}: all of dimension 0 of a.weight goes together"
            for count, name in ((8, "a"), (432, "b"), (6, "conv2d"))
        ),
    ),
    "places to look at": Case(
        two_convs(looked_at, b=conv(3, 2)),
        image(),
        ("8 of a: a.bias[i], out.weight[:, i]",),
        frozen=("2 of b: a place in space for grid_sample (node 'grid_sample')",),
    ),
    "positions as channels": Case(
        two_linears(mixed_positions, t1=nn.Linear(5, 7), t2=nn.Linear(7, 5)),
        sequence(),
        ("6 of a: a.bias[i], out.weight[:, i]", "7 of t1: t1.bias[i], t2.weight[:, i]"),
        frozen=("5 of t2: combined by add (node 'add') with the model's input 'inputs_0'",),
    ),
    "a linear layer in groups": Case(
        two_linears(lambda m, x: m.out(m.g(m.a(x))), g=GroupedLinear(6, 4, 2), out=nn.Linear(4, 3)),
        sequence(),
        ("3 of a: a.bias[i], g.weight[:, i]", "2 of g: out.weight[:, i]"),
    ),
    "the dtype of another tensor": Case(  # whose shape does not matter
        two_linears(lambda m, x: m.out(m.a(x).to(m.b(x)[0, 0, :2]).type_as(m.b(x))), b=nn.Linear(8, 4)),
        sequence(),
        ("6 of a: a.bias[i], out.weight[:, i]", "4 of b: b.bias[i]"),
    ),
    "maximum over positions": Case(  # max returns a named tuple
        two_linears(lambda m, x: m.out(torch.max(m.a(x), 1)[0])), sequence(), ("6 of a: a.bias[i], out.weight[:, i]",)
    ),
    "tied embedding": Case(
        TiedEmbedding,
        IDS,
        ("8 of embed, down: up.weight[:, i], down.bias[i]", "6 of up: up.bias[i], down.weight[:, i]"),
    ),
    "assignment": Case(
        two_convs(assignments, b=conv(3, 4)),
        image(),
        ("6 of a: a.bias[i], out.weight[:, i]", "3 of b: b.bias[i]"),
        frozen=(
            "1 of a: a single element of it is picked by setitem (node 'setitem')",
            "1 of a: a single element of it is picked by setitem (node 'setitem_1')",
            "1 of b: a single element of it is picked by getitem (node 'getitem')",
        ),
    ),
    "assignment under a mask": Case(
        two_convs(masked_assignment, b=conv(3, 8)), image(), ("8 of a, b: a.bias[i], b.bias[i], out.weight[:, i]",)
    ),
}

CASES = {
    **CONVOLUTIONS,
    **LAYERS,
    **{f"attention, {name}": case for name, case in ATTENTIONS.items()},
    **{f"frozen, {name}": case for name, case in FROZEN.items()},
}
