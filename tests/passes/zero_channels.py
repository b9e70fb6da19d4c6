"""Nets whose channels make no difference, and the pass on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.apply import Applied
from fxcompress.passes.pruning import PruneZeroChannels
from tests.passes.driver import apply, error, randomise, reasons

EXACT = 1e-12
IMAGE = (2, 3, 6, 6)


class Net(nn.Module):
    """Named layers, and what to do with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)
        randomise(self)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def seq(*layers: nn.Module) -> Any:
    return randomise(nn.Sequential(*layers))


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def put(value: float, *places: Tensor) -> None:
    """Make slices of parameters this number."""
    with torch.no_grad():
        for place in places:
            place.fill_(value)


def prune(model: nn.Module, *shape: int) -> tuple[fx.GraphModule, Applied]:
    """The pruned graph, in float64 and held against the model on the example and on other values and batch sizes."""
    model = model.double()
    x = torch.randn(*shape, dtype=torch.float64)
    gm = model if isinstance(model, fx.GraphModule) else fxcompress.trace(model, x)
    result, applied = apply(PruneZeroChannels(), gm, x)
    assert error(gm, result, x) < EXACT
    assert error(gm, result, torch.randn(shape[0] + 1, *shape[1:], dtype=torch.float64)) < EXACT
    again, second = apply(PruneZeroChannels(), result, x)
    assert not second.sites
    assert again.code == result.code
    return result, applied


def shapes(gm: nn.Module, *paths: str) -> list[tuple[int, ...]]:
    """Of weights, without kernels."""
    return [tuple(gm.get_parameter(f"{path}.weight").shape[:2]) for path in paths]


def untouched(model: nn.Module, *shape: int) -> str:
    """The refusals of the pass, which must do nothing."""
    _, applied = prune(model, *shape)
    assert not applied.sites
    return reasons(applied)


def kinds(applied: Applied) -> dict[str, int]:
    """How many channels went for each reason, and how many inputs were taken in."""
    found: dict[str, int] = {}
    for site in applied.sites:
        for kind in ("unread", "zero", "constant", "taken_in"):
            if kind in site.detail:
                found[kind] = found.get(kind, 0) + site.detail[kind]
    return found


def punch_holes(module: nn.Module, seed: int) -> None:
    """Make random rows and columns of parameters zero, often the same ones in all parameters of a layer."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensor:
        return torch.rand(count, generator=generator) < 0.4

    for layer in module.modules():
        own = [p for p in layer.parameters(recurse=False) if p.dim()]
        rows = some(own[0].shape[0]) if own else torch.zeros(0)
        for parameter in own:
            way = int(torch.randint(4, (1,), generator=generator))
            if way < 2 and len(parameter) == len(rows):
                parameter.data[rows] = 0
            if 0 < way < 3 and parameter.dim() > 1:
                parameter.data[:, some(parameter.shape[1])] = 0


def residual() -> Any:
    """stem -> x + body2(relu(body1(x))) -> head, with eight channels in the stream."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.body2(torch.relu(m.body1(x))))

    return Net(forward, stem=conv(3, 8), body1=conv(8, 6), body2=conv(6, 8), head=conv(8, 4))


def squeeze_excite() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.norm(m.first(x)))
        return m.last(x * torch.sigmoid(m.expand(torch.relu(m.reduce(x.mean((2, 3), keepdim=True))))))

    layers = {"norm": nn.BatchNorm2d(8), "reduce": conv(8, 4), "expand": conv(4, 8), "last": conv(8, 3)}
    return Net(forward, first=conv(3, 8), **layers)
