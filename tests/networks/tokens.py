"""Blocks over vectors and sequences: linear layers in all their forms, tied weights, attention, recurrence."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.base import BATCH_NORM, Block, Options, Signal

TOKENS = ("vector", "sequence")


class Linear(Block):
    """One linear layer."""

    KINDS = TOKENS
    OPTIONS: ClassVar[Options] = {"out": (4, 8, 6), "bias": (True, False)}

    def __init__(self, signal: Signal, out: int, bias: bool) -> None:
        super().__init__(signal.widened(out))
        self.linear = nn.Linear(signal.channels, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class FunctionalLinear(Block):
    """A linear layer on parameters of the block's own; ``addmm`` is GPT-2's ``Conv1D``."""

    KINDS = TOKENS
    OPTIONS: ClassVar[Options] = {"out": (4, 8), "form": ("F.linear", "addmm", "matmul", "einsum", "F.linear, no bias")}

    def __init__(self, signal: Signal, out: int, form: str) -> None:
        super().__init__(signal.widened(out))
        self.form = form
        shape = (signal.channels, out) if form in ("addmm", "einsum") else (out, signal.channels)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = None if form == "F.linear, no bias" else nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "addmm":
            flat = torch.addmm(self.bias, x.contiguous().view(-1, x.size(-1)), self.weight)
            return flat.view((*x.size()[:-1], self.weight.shape[1]))
        if self.form == "matmul":
            return x @ self.weight.t() + self.bias
        if self.form == "einsum":
            return torch.einsum("...i,io->...o", x, self.weight) + self.bias
        return F.linear(x, self.weight, self.bias)


class LinearNorm(Block):
    """A linear layer beside a batch norm, in either order; over a sequence the norm sees transposed maps."""

    KINDS = TOKENS
    OPTIONS: ClassVar[Options] = {
        "order": ("linear norm", "linear norm relu", "norm linear", "linear norm norm"),
        "bias": (True, False),
        "affine": (True, False),
    }

    def __init__(self, signal: Signal, order: str, bias: bool, affine: bool) -> None:
        super().__init__(signal)
        self.order = order.split()
        self.linear = nn.Linear(signal.channels, signal.channels, bias=bias)
        self.norms = nn.ModuleList(BATCH_NORM[signal.kind](signal.channels, affine=affine) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        norms = iter(self.norms)
        for step in self.order:
            if step == "linear":
                x = self.linear(x)
            elif step == "relu":
                x = F.relu(x)
            else:
                norm = next(norms)
                x = norm(x.transpose(1, 2)).transpose(1, 2) if x.dim() == 3 else norm(x)
        return x


class TiedLinears(Block):
    """Two layers over one Parameter: two modules, or a weight and its transpose, or one module called twice."""

    KINDS = TOKENS
    OPTIONS: ClassVar[Options] = {"form": ("two modules", "transpose", "one module twice", "with norms")}

    def __init__(self, signal: Signal, form: str) -> None:
        super().__init__(signal)
        self.form = form
        channels = signal.channels
        self.first = nn.Linear(channels, channels)
        self.second = self.first if form == "one module twice" else nn.Linear(channels, channels)
        self.second.weight = self.first.weight
        tied_norm = form == "with norms" and signal.kind == "vector"
        self.norm = nn.BatchNorm1d(channels) if tied_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        return F.linear(x, self.first.weight.t()) if self.form == "transpose" else self.second(x)


class Attention(Block):
    """Self-attention with two heads, written in the ways it is met: by hand, fused, and as modules."""

    KINDS = ("sequence",)
    OPTIONS: ClassVar[Options] = {
        "form": ("softmax", "sdpa", "module", "module, weights", "sequence first", "fused qkv", "encoder layer"),
        "mask": ("none", "causal", "is_causal"),
    }

    def __init__(self, signal: Signal, form: str, mask: str) -> None:
        super().__init__(signal)
        self.form, self.mask = form, mask
        width = signal.channels
        if form.startswith(("module", "sequence")):
            self.attention = nn.MultiheadAttention(width, 2, batch_first=form != "sequence first")
        elif form == "encoder layer":
            self.attention = nn.TransformerEncoderLayer(width, 2, 8, dropout=0.0, batch_first=True)
        elif form == "fused qkv":
            self.qkv = nn.Linear(width, 3 * width)
            self.proj = nn.Linear(width, width)
        else:
            self.query, self.key, self.value = (nn.Linear(width, width, bias=b) for b in (True, False, True))
            self.proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 2, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        causal = None if self.mask == "none" else torch.ones(length, length, dtype=torch.bool).triu(1)
        if self.form == "encoder layer":
            return self.attention(x, src_mask=causal)
        if self.form == "sequence first":
            y = x.transpose(0, 1)
            return self.attention(y, y, y, attn_mask=causal, need_weights=False)[0].transpose(0, 1)
        if self.form.startswith("module"):
            return self.attention(x, x, x, attn_mask=causal, need_weights=self.form != "module")[0]
        if self.form == "fused qkv":
            query, key, value = (self.heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        else:
            query, key, value = (self.heads(layer(x)) for layer in (self.query, self.key, self.value))
        return self.proj(self.attend(query, key, value, causal).transpose(1, 2).reshape(x.shape))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, causal: Tensor | None) -> Tensor:
        if self.form == "softmax":
            scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
            if causal is not None:
                scores = scores.masked_fill(causal, float("-inf"))
            return scores.softmax(dim=-1) @ value
        if self.mask == "is_causal":
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        keep = None if causal is None else ~causal
        return F.scaled_dot_product_attention(query, key, value, attn_mask=keep)


class ClassToken(Block):
    """A learned token in front and learned positions: the sequence grows by one."""

    KINDS = ("sequence",)
    KEEPS = False
    OPTIONS: ClassVar[Options] = {"form": ("expand", "repeat"), "positions": ("parameter", "embedding")}

    def __init__(self, signal: Signal, form: str, positions: str) -> None:
        length = signal.sizes[0] + 1
        super().__init__(signal.resized((length,)))
        self.form = form
        self.token = nn.Parameter(torch.empty(1, 1, signal.channels))
        self.position = nn.Parameter(torch.empty(1, length, signal.channels)) if positions == "parameter" else None
        self.embedding = nn.Embedding(length, signal.channels) if positions == "embedding" else None

    @classmethod
    def accepts(cls, signal: Signal) -> bool:
        return super().accepts(signal) and signal.sizes[0] <= 8

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        token = self.token.expand(batch, -1, -1) if self.form == "expand" else self.token.repeat(batch, 1, 1)
        x = torch.cat([token, x], dim=1)
        if self.embedding is not None:
            return x + self.embedding(torch.arange(x.shape[1], device=x.device))
        return x + self.position


class Recurrent(Block):
    """An LSTM, GRU or RNN over the sequence."""

    KINDS = ("sequence",)
    OPTIONS: ClassVar[Options] = {"form": ("LSTM", "GRU", "RNN"), "both": (False, True)}

    def __init__(self, signal: Signal, form: str, both: bool) -> None:
        width = signal.channels // 2 if both else signal.channels
        super().__init__(signal.widened(width * 2 if both else width))
        self.layer = getattr(nn, form)(signal.channels, width, batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


TOKEN_BLOCKS: tuple[type[Block], ...] = (
    Linear,
    FunctionalLinear,
    LinearNorm,
    TiedLinears,
    Attention,
    ClassToken,
    Recurrent,
)
