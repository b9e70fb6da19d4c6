"""The layers of a graph whose weights a pass may replace, each with every call of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, fx, nn

from fxcompress import matching
from fxcompress.analysis.memory import Memory
from fxcompress.pass_base import PassContext, Refusal

__all__ = ["LAYERS", "CalledLayer", "Layer", "as_stored", "by_group", "called_layers", "channel_counts", "paths_of"]

Layer: TypeAlias = (
    nn.Linear
    | nn.Conv1d
    | nn.Conv2d
    | nn.Conv3d
    | nn.ConvTranspose1d
    | nn.ConvTranspose2d
    | nn.ConvTranspose3d
)  # fmt: skip
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)

L = TypeVar("L", bound=nn.Module)

_FUNCTIONS = ("linear", *(f"conv{t}{i}d" for t in ("", "_transpose") for i in (1, 2, 3)))


@dataclasses.dataclass(frozen=True, eq=False)
class CalledLayer(Generic[L]):
    """A layer, its path (of the first call), all of its paths, and every node that calls it."""

    path: str
    paths: tuple[str, ...]
    layer: L
    calls: tuple[fx.Node, ...]

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """What each call reads."""
        found = tuple(matching.tensor_input(call) for call in self.calls)
        return tuple(source for source in found if source is not None)

    def matches(self, pattern: str) -> bool:
        """Whether a glob pattern matches any of its paths."""
        return any(matching.matches_path(path, pattern) for path in self.paths)

    def is_wanted(self, exclude: Sequence[str], only: Sequence[str]) -> bool:
        """Whether patterns to exclude, and those to take alone if there are any, let it be replaced."""
        if any(self.matches(pattern) for pattern in exclude):
            return False
        return not only or any(self.matches(pattern) for pattern in only)

    def unwritten_sources(self, memory: Memory) -> list[fx.Node]:
        """What calls read and nothing writes to in place before they do: they read what it was when it was made."""
        pairs = zip(self.sources, self.calls, strict=True)
        return [source for source, call in pairs if memory.writer_between(source, call) is None]


def called_layers(
    context: PassContext, types: tuple[type[L], ...]
) -> tuple[list[CalledLayer[L]], list[tuple[Refusal, tuple[str, ...]]]]:
    """The layers of exactly one of ``types`` that could be replaced, in graph order; and what looks like one and could
    not, with its paths: subclasses, layers with hooks or with weights that are tied, read elsewhere or not plain real
    numbers, calls with other than one tensor, and calls of functions."""
    found: list[CalledLayer[L]] = []
    refusals: list[tuple[Refusal, tuple[str, ...]]] = []
    seen: set[int] = set()
    for node in context.gm.graph.nodes:
        if matching.is_call(node, _FUNCTIONS):
            reason = "called as a function; tracing with example inputs makes it a module"
            refusals.append((Refusal(node, reason), ()))
        module = context.module(node)
        if not isinstance(module, types) or id(module) in seen:
            continue
        seen.add(id(module))
        calls, paths = context.aliasing.calls(module), context.aliasing.paths(module)
        if obstacle := _obstacle(context, module, calls, types):
            refusals.append((Refusal(node, obstacle), paths))
        else:
            found.append(CalledLayer(str(node.target), paths, module, calls))
    return found, refusals


def paths_of(found: Iterable[CalledLayer[Any]], refusals: Iterable[tuple[Refusal, tuple[str, ...]]]) -> set[str]:
    """The paths of everything that :func:`called_layers` gave."""
    return {path for called in found for path in called.paths} | {path for _, paths in refusals for path in paths}


def _obstacle(
    context: PassContext, layer: nn.Module, calls: tuple[fx.Node, ...], types: tuple[type[nn.Module], ...]
) -> str | None:
    """Why ``layer`` cannot be replaced."""
    if reason := matching.override_of(layer):
        return reason
    if type(layer) not in types:
        return f"a {type(layer).__name__} is a subclass that may compute something else"
    weight = layer.weight
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided or not weight.is_floating_point():
        kind = f"dtype {weight.dtype}, layout {weight.layout}" if isinstance(weight, torch.Tensor) else "no tensor"
        return f"has a weight of type {type(weight).__name__}, {kind}"
    for name, parameter in layer.named_parameters():
        own = {f"{path}.{name}" for path in context.aliasing.paths(layer)}
        elsewhere = [other for other in context.aliasing.names(parameter) if other not in own]
        elsewhere += [f"node {n}" for n in context.aliasing.readers(parameter) if n not in calls]
        if elsewhere:
            return f"has a {name} that is tied or read elsewhere ({', '.join(elsewhere)})"
    if any(len(call.args) + len(call.kwargs) != 1 or matching.tensor_input(call) is None for call in calls):
        return "is called with other than one tensor"
    return None


def channel_counts(layer: Layer) -> tuple[int, int, int]:
    """Groups, output channels, input channels."""
    if isinstance(layer, nn.Linear):
        return 1, layer.out_features, layer.in_features
    return layer.groups, layer.out_channels, layer.in_channels


def by_group(layer: Layer, weight: Tensor) -> Tensor:
    """The weight of any kind of layer as ``(groups, outputs of a group, inputs of a group, kernel taps)``."""
    groups, outputs, inputs = channel_counts(layer)
    if isinstance(layer, _TRANSPOSED):  # stored as (inputs, outputs of a group, *kernel)
        return weight.reshape(groups, inputs // groups, outputs // groups, -1).transpose(1, 2)
    return weight.reshape(groups, outputs // groups, inputs // groups, -1)


def as_stored(layer: Layer, weight: Tensor) -> Tensor:
    """The inverse of :func:`by_group`."""
    return (weight.transpose(1, 2) if isinstance(layer, _TRANSPOSED) else weight).reshape(layer.weight.shape)
