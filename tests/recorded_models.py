"""Models for the tests of tracing, each with one habit that a recorder has to get right. At module scope, so that what
is made of them can be pickled."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class DropoutByFlag(nn.Module):
    """One dropout that follows the mode, and one that is off for good."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.linear(x), 0.5, self.training)
        return F.dropout(x, 0.3, False) + x


class AttentionByFlag(nn.Module):
    """The probability of dropping is a number that Python picks by the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 if self.training else 0.0)


class StochasticDepth(nn.Module):
    """No parameters, acts by the mode; as timm's DropPath."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], 1).bernoulli_(0.5)


class WithStochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop_path = StochasticDepth()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.linear(x))


class FunctionalConvNorm(nn.Module):
    """Calls the functions with the parameters of modules that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.bn.running_mean.normal_()
        self.bn.num_batches_tracked += 7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.conv.weight, self.conv.bias, 1, 1)
        return F.batch_norm(
            x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, self.training, 0.1, 1e-5
        )


class InPlace(nn.Module):
    """Changes tensors that it reads again through other names and views."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        z = y
        self.relu(y)
        y += 1
        y[:, 0] = 2
        w = y[:, 1]
        w.mul_(3)
        out = torch.zeros(x.shape[0], 4)
        out[:] = z.mean((2, 3))
        return out, y


class SameTensorBack(nn.Module):
    """In eval mode dropout hands back the very tensor that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(x)
        return x + 2 * y


@dataclasses.dataclass
class Result:
    a: torch.Tensor
    b: object = None


Pair = collections.namedtuple("Pair", "p q")


class Containers(nn.Module):
    """Structured inputs, keyword-only arguments, and every kind of container in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, extra: Any = None, flag: bool = True
    ) -> dict[str, Any]:
        y = self.linear(x)
        if mask is not None:
            y = y * mask
        if extra is not None:
            y = y + extra["a"][0]
        if not flag:
            y = -y
        return {
            "dataclass": Result(y, [y + 1, (y,)]),
            "namedtuple": Pair(y, 2),
            "ordered": collections.OrderedDict(k=y),
            "none": None,
            "number": 3,
            "batch": x.shape[0],
        }


class LooksAtData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


class AroundLooksAtData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = LooksAtData()
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))


class Swallows(nn.Module):
    """Hides what goes wrong inside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return x * float(x.sum())
        except Exception:
            return x


class ThroughNumpy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_numpy(np.asarray(x.detach()) * 2)


class NumpyTable(nn.Module):
    """A constant that is made anew in each run, out of torch's sight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_numpy(np.arange(x.shape[1], dtype=np.float32))


class Counts(nn.Module):
    """Keeps state in a Python attribute: no graph can be equal to it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.body(self.body(self.embedding(tokens)))
        return self.head(x), F.linear(x, self.embedding.weight)


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(x.shape[0], 1) + torch.randn_like(x)


class Positions(nn.Module):
    """Makes positions, a causal mask and a divisor out of the sizes of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(16, 8)
        self.position = nn.Embedding(16, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        b, t = tokens.shape
        positions = torch.arange(t, device=tokens.device)[None].expand(b, t)
        mask = torch.full((t, t), -1e9).triu(1)
        x = self.token(tokens) + self.position(positions)
        return (x @ x.transpose(1, 2) + mask).softmax(-1) @ x / b


class ConstantWrittenInPlace(nn.Module):
    """A constant built by in-place operations, and another that an input is written into."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(4, 4)
        mask[:2] = 1
        mask[1].add_(2)
        accumulator = torch.zeros(4)
        accumulator += x.sum(0)
        return x @ mask + accumulator


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.encoder(x, src_key_padding_mask=padding)
        attended, weights = self.attention(y, x, x)
        return attended, weights


class NoGradBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Linear(4, 4)
        self.online = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self.target(x)
        return self.online(x) * target


class Sign(torch.autograd.Function):
    """Sign with the gradient of the identity (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sign.apply(self.linear(x))


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


class CallsScripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scripted(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, (h, _) = self.lstm(x)
        return self.head(h[-1]), self.head(out[:, -1])


class LoopsOverBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[i] * 2 for i in range(x.shape[0])])


class FixedBatch(nn.Module):
    """Runs at one batch size only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(2.0)[:, None]


class Resizes(nn.Module):
    """Bakes a size into the graph that no error would ever show."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.conv(x), size=x.shape[2:])


class FlattensByHand(nn.Module):
    """Reads sizes, but only in ways that hold for every resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).mean((2, 3), keepdim=True)
        return y.view(y.shape[0], -1)


class TransposedLinear(nn.Module):
    """As the Conv1D of GPT-2: the weight is (in, out), here square, and applied by addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, 4), self.weight).view(x.shape)


class WithTransposedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = TransposedLinear()
        self.out = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) @ self.out


class HiddenBuffers(nn.Module):
    """A buffer outside the state_dict, one inside, and a plain tensor attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.randn(4), persistent=False)
        self.register_buffer("shown", torch.randn(4))
        self.plain = torch.randn(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.hidden + self.shown - self.plain


class ReadsBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * int(self.steps)


class StarArguments(nn.Module):
    def forward(self, x: torch.Tensor, *others: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        return x + sum(others) + named["bias"]


class SizeFromData(nn.Module):
    """Python sees how many elements are positive, without looking at one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x[x > 0]
        return kept.sum() / kept.shape[0]


class LoopFromData(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.sum(1)
        for index in (x[:, 0] > 0).nonzero():
            total = total + index
        return total


class SizeStaysWithTorch(nn.Module):
    """The same number, known to torch only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x[x > 0]
        return x * kept.mean() + torch.ones_like(kept).sum()


class LooksInMethod(nn.Module):
    """As a detector: the model itself looks at data, in a method that is not forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.threshold = 0.1

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.select(self.linear(x))

    def select(self, y: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = y[y > self.threshold]
        return {"kept": kept if kept.shape[0] > 2 else y.flatten()}


class AspectRatio(nn.Module):
    """A number that stays the same as long as both sizes change together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * (x.shape[2] / x.shape[3])


class PadsToEven(nn.Module):
    """Padding by the parity of the size, as TensorFlow's "same": no multiple of the size shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))).mean((2, 3))


class DropsByHand(nn.Module):
    """Stochastic depth written into the layer itself: what training adds is in no flag that a graph could keep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.training:
            y = y * torch.rand(y.shape[0], 1)
        return x + y
