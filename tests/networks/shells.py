"""Whole models: how inputs come in (positional, keyword-only, dict, tuple, optional, tokens) and outputs go out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.base import KINDS, MAPS, Inputs, Network, Signal, Stack, project
from tests.networks.plumbing import ToVector

VOCABULARY = 11


class Pair(NamedTuple):
    """A named-tuple output."""

    out: Tensor
    middle: Tensor


@dataclasses.dataclass
class Output:
    """A dataclass output, with a field that is not set."""

    out: Tensor
    middle: Tensor
    loss: Tensor | None = None


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda middle, y: y,
    "tuple": lambda middle, y: (y, middle),
    "list": lambda middle, y: [middle, y],
    "dict": lambda middle, y: {"out": y, "middle": middle},
    "namedtuple": lambda middle, y: Pair(y, middle),
    "dataclass": lambda middle, y: Output(out=y, middle=middle),
    "nested": lambda middle, y: {"out": y, "rest": (middle, {"mean": y.mean(dim=-1)}, None)},
    "one-tuple": lambda middle, y: (y,),
}


class Shell(nn.Module):
    """Two stacks; the value between them can be an output of its own. Subclasses say how inputs come in."""

    KINDS: ClassVar[tuple[str, ...]] = KINDS

    def __init__(self, signal: Signal, first: Stack, second: Stack, outputs: str) -> None:
        super().__init__()
        self.first, self.second, self.outputs = first, second, outputs

    def finish(self, x: Tensor) -> Any:
        middle = self.first(x)
        return OUTPUTS[self.outputs](middle, self.second(middle))

    @staticmethod
    def sample(signal: Signal, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
        """Inputs for ``forward``; each subclass has its own."""
        raise NotImplementedError


def draw(shape: tuple[int, ...], generator: torch.Generator, batch: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, drawn in float64 so that every dtype sees the same input."""
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)


class SingleInput(Shell):
    """One positional tensor."""

    def forward(self, x: Tensor) -> Any:
        return self.finish(x)

    @staticmethod
    def sample(signal: Signal, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
        return (draw(signal.shape, generator, batch, dtype),), {}


class TwoInputs(Shell):
    """Two positional tensors, one of them behind a layer of its own."""

    def __init__(self, signal: Signal, first: Stack, second: Stack, outputs: str) -> None:
        super().__init__(signal, first, second, outputs)
        self.mix = project(signal, signal.channels)

    def forward(self, x: Tensor, other: Tensor) -> Any:
        return self.finish(x + self.mix(other))

    @staticmethod
    def sample(signal: Signal, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
        return tuple(draw(signal.shape, generator, batch, dtype) for _ in range(2)), {}


class KeywordInput(Shell):
    """A keyword-only tensor, and a keyword that keeps its default."""

    def __init__(self, signal: Signal, first: Stack, second: Stack, outputs: str) -> None:
        super().__init__(signal, first, second, outputs)
        self.columns = signal.along_channels()

    def forward(self, x: Tensor, *, gain: Tensor, flip: bool = False) -> Any:
        x = x.flip(1) if flip else x
        return self.finish(x * gain.view(x.shape[0], *self.columns))

    @staticmethod
    def sample(signal: Signal, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
        x, gain = (draw(shape, generator, batch, dtype) for shape in (signal.shape, (signal.channels,)))
        return (x,), {"gain": gain}


class DictInput(Shell):
    """One dict of tensors."""

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return self.finish(inputs["x"] - inputs["y"])

    @staticmethod
    def sample(signal: Signal, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
        return ({name: draw(signal.shape, generator, batch, dtype) for name in "xy"},), {}


class TupleInput(Shell):
    """One tuple of tensors."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Any:
        left, right = pair
        return self.finish(left * right)

    @staticmethod
    def sample(signal: Signal, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
        return (tuple(draw(signal.shape, generator, batch, dtype) for _ in range(2)),), {}


class MaskInput(Shell):
    """An optional boolean mask, given by keyword."""

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Any:
        if mask is not None:
            x = x.masked_fill(mask, 0.1)
        return self.finish(x * scale)

    @staticmethod
    def sample(signal: Signal, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
        x, mask = (draw(signal.shape, generator, batch, dtype) for _ in range(2))
        return (x,), {"mask": mask > 0.4}


class AbsentMask(MaskInput):
    """The same model, called without its optional mask."""

    @staticmethod
    def sample(signal: Signal, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
        return (draw(signal.shape, generator, batch, dtype),), {}


class TokenInput(Shell):
    """Token ids through an embedding whose weight is also the head's; the head stands between the stacks."""

    KINDS = ("sequence",)

    def __init__(self, signal: Signal, first: Stack, second: Stack, outputs: str) -> None:
        super().__init__(signal, first, second, outputs)
        self.embedding = nn.Embedding(VOCABULARY, signal.channels)
        maps = first.out.kind in MAPS
        self.pool = ToVector(first.out, "mean") if maps else nn.Identity()
        self.fit = nn.Linear(first.out.channels, signal.channels)
        self.head = nn.Linear(signal.channels, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Any:
        middle = self.first(self.embedding(ids))
        features = self.fit(self.pool(middle))
        logits = self.head(features) if features.dim() == 3 else F.linear(features, self.embedding.weight)
        return OUTPUTS[self.outputs](self.second(middle), logits)

    @staticmethod
    def sample(signal: Signal, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
        return (torch.randint(VOCABULARY, (batch, *signal.sizes), generator=generator),), {}


SHELLS: tuple[type[Shell], ...] = (
    SingleInput,
    TwoInputs,
    KeywordInput,
    DictInput,
    TupleInput,
    MaskInput,
    AbsentMask,
    TokenInput,
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The sampler of one shell for one signal."""

    shell: type[Shell]
    signal: Signal

    def __call__(self, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
        return self.shell.sample(self.signal, generator, batch, dtype)


def assemble(
    shell: type[Shell], signal: Signal, first: Stack, second: Stack, outputs: str, batch: int, dtype: torch.dtype
) -> Network:
    """A network from its parts; its parameters are still to be filled."""
    with torch.random.fork_rng(devices=[]):
        module = shell(signal, first, second, outputs)
    description = f"{shell.__name__} {signal}: {first.label} > {second.label} -> {outputs}"
    return Network(module, Sample(shell, signal), description, batch, dtype)
