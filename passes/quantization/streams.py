"""Streams: channels of values that can be divided by numbers in what writes them and multiplied in what reads them.

A *class* is all that must be scaled by one number: a row of the weight of each layer that writes a channel, a column of
each that reads it. Classes follow from the numbers of ``carriers.py``; the classes of one value make a *stream*. What
a norm or a parameter of one dimension multiplies its channels by writes them too, if asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress import editing, matching
from fxcompress.analysis.channels.atoms import FIXED, Atoms, Ids
from fxcompress.layers import LAYERS, CalledLayer, as_stored, by_group, called_layers, channel_counts
from fxcompress.pass_base import PassContext, Refusal
from fxcompress.passes.quantization.carriers import Carriers, Numbers, along

__all__ = ["NORMS", "LayerPart", "NormPart", "ParameterPart", "Part", "Streams", "find_streams"]

_TRAILING: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm)
_SECOND: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
NORMS: tuple[type[nn.Module], ...] = (*_TRAILING, *_SECOND)
"""Norms with a weight for each channel."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NONE: Ids = np.zeros(0, dtype=np.int64)


def _exact(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What writes or reads channels.

    Attributes:
        path: its name.
        node: the first that calls or reads it.
        rows: for each channel that it writes the class.
        columns: for each channel that it reads the class; 0 where nothing may be scaled.
        reads: the values that it reads, each with the dimension of the channels.
    """

    path: str
    node: fx.Node
    rows: Ids
    columns: Ids = dataclasses.field(default_factory=lambda: _NONE)
    reads: tuple[tuple[fx.Node, int], ...] = ()

    def magnitudes(self) -> Tensor | None:
        """``(groups, rows of a group, columns of a group)``: how large the weight is at most; of layers only."""
        return None

    def scaled(self, rows: Tensor, columns: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Path, parameter and what it becomes, in float64, when what is written is divided by ``rows`` and what is
        read multiplied by ``columns``."""
        raise NotImplementedError(f"{type(self).__name__} must say how it is scaled")

    def overflows(self, rows: Tensor, columns: Tensor) -> bool:
        """Whether a scaled parameter would be too large for its dtype."""
        return any(not bool(torch.isfinite(new.to(old.dtype)).all()) for _, old, new in self.scaled(rows, columns))

    def scale(self, gm: fx.GraphModule, rows: Tensor, columns: Tensor) -> None:
        """Put scaled parameters in place of the old ones, which stay as they are."""
        for path, old, new in list(self.scaled(rows, columns)):
            # empty_like keeps the memory format, such as channels_last
            parameter = nn.Parameter(torch.empty_like(old.detach()).copy_(new), requires_grad=old.requires_grad)
            editing.set_attribute(gm, path, parameter)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerPart(Part):
    """A convolution or linear layer."""

    layer: Any = dataclasses.field(kw_only=True)

    def magnitudes(self) -> Tensor | None:
        return by_group(self.layer, _exact(self.layer.weight)).abs().amax(-1)

    def scaled(self, rows: Tensor, columns: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        layer, groups = self.layer, channel_counts(self.layer)[0]
        weight = by_group(layer, _exact(layer.weight))
        weight = weight / rows.view(groups, -1, 1, 1) * columns.view(groups, 1, -1, 1)
        yield f"{self.path}.weight", layer.weight, as_stored(layer, weight)
        if layer.bias is not None:
            yield f"{self.path}.bias", layer.bias, _exact(layer.bias) / rows


@dataclasses.dataclass(frozen=True, eq=False)
class NormPart(Part):
    """A norm with a weight, and maybe a bias, for each channel."""

    norm: nn.Module = dataclasses.field(kw_only=True)

    def scaled(self, rows: Tensor, columns: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        for name, parameter in self.norm.named_parameters(recurse=False):
            yield f"{self.path}.{name}", parameter, _exact(parameter) / rows.view_as(parameter)


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterPart(Part):
    """A parameter that is one number a channel."""

    parameter: nn.Parameter = dataclasses.field(kw_only=True)

    def scaled(self, rows: Tensor, columns: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        yield self.path, self.parameter, _exact(self.parameter) / rows.view_as(self.parameter)


@dataclasses.dataclass(frozen=True, eq=False)
class Streams:
    """All there is to scale.

    Attributes:
        parts: in graph order.
        count: of classes; class 0 is what may not be scaled.
        stream: for each class the number of its stream; 0 for class 0.
        refusals: what writes channels none of which can be scaled, with the reason; and layers that cannot be touched.
    """

    parts: tuple[Part, ...]
    count: int
    stream: Ids
    refusals: tuple[Refusal, ...]

    def members(self, number: int) -> list[Part]:
        """What writes or reads the stream of that number."""
        return [p for p in self.parts if (self.stream[np.concatenate([p.rows, p.columns])] == number).any()]


def find_streams(
    context: PassContext, wanted: Callable[[CalledLayer[Any]], bool], *, norms: bool, layers: bool = True
) -> Streams:
    """Look through the whole graph.

    Args:
        context: of the graph.
        wanted: whether a layer or norm may be scaled.
        norms: whether norms, and parameters that multiply or are added, write channels that can be scaled.
        layers: whether convolutions and linear layers do.
    """
    return _Search(context, wanted, norms, layers).run()


@dataclasses.dataclass(eq=False)
class _Open:
    """A part while the search is on: atoms in place of classes."""

    path: str
    node: fx.Node
    rows: Ids
    columns: Ids
    called: CalledLayer[Any] | None
    reads: list[tuple[fx.Node, int]] = dataclasses.field(default_factory=list)


def _obstacle(layer: nn.Module) -> str | None:
    """Why the parameters of ``layer`` cannot be scaled."""
    for name, parameter in layer.named_parameters():
        if parameter.dtype not in _DTYPES or not parameter.numel():
            return f"has a {name} of dtype {parameter.dtype} and shape {tuple(parameter.shape)}"
        if not bool(torch.isfinite(parameter).all()):
            return f"has a {name} that is not finite"
    return None


def _shape_of(layer: Any) -> tuple[int, ...]:
    return tuple(layer.weight.shape)


class _Search:
    def __init__(
        self, context: PassContext, wanted: Callable[[CalledLayer[Any]], bool], norms: bool, layers: bool
    ) -> None:
        self._context = context
        self._atoms = Atoms()
        self._carriers = Carriers(context, self._atoms)
        self._parts: list[_Open] = []
        self._by_call: dict[fx.Node, _Open] = {}
        self._by_name: dict[str, _Open] = {}
        self._norms, self._layers = norms, layers
        found, refused = called_layers(context, (*LAYERS, *NORMS) if norms else LAYERS)
        found = [called for called in found if wanted(called)]
        obstacles = {called.path: _obstacle(called.layer) for called in found}
        self._refusals = [refusal for refusal, _ in refused]
        self._refusals += [Refusal(c.calls[0], why) for c in found if (why := obstacles[c.path]) is not None]
        self._found = {call: c for c in found if obstacles[c.path] is None for call in c.calls}

    def run(self) -> Streams:
        for node in self._context.gm.graph.nodes:
            called = self._found.get(node)
            if node.op == "output":
                self._carriers.freeze(self._carriers.read(node), "the model gives it out")
            elif called is not None:
                self._pass_layer(node, called)
            elif node.op == "get_attr":
                self._read_parameter(node)
            else:
                self._carriers.carry(node)
        return self._finish()

    # ------------------------------------------------------------------------------------------------- what writes
    def _pass_layer(self, node: fx.Node, called: CalledLayer[Any]) -> None:
        """A call of a layer or norm: it reads its columns and writes its rows, the same ones in each call."""
        part = self._part_of(node, called)
        source, rank = matching.tensor_input(node), len(self._context.shapes.shape(node))
        shape = _shape_of(called.layer)
        assert source is not None, "a layer is called with one tensor"
        read = self._carriers.value(source)
        if isinstance(called.layer, NORMS):
            self._carriers.freeze(read, f"it goes into {matching.describe(self._context.gm, node)}, which normalises")
            second = isinstance(called.layer, _SECOND)
            ids = along(part.rows, 1, rank) if second else part.rows.reshape((1,) * (rank - len(shape)) + shape)
        else:
            axis = rank - len(shape) + 1
            part.reads.append((source, axis))
            self._read_columns(part, read, axis)
            ids = along(part.rows, axis, rank)
            if not self._layers:
                self._atoms.freeze(part.rows, "a layer makes it, and layers=False")
        self._carriers.set(node, Numbers(ids, self._context.shapes.shape(node)))

    def _part_of(self, node: fx.Node, called: CalledLayer[Any]) -> _Open:
        if called.calls[0] not in self._by_call:
            if isinstance(called.layer, NORMS):
                rows, columns = math.prod(_shape_of(called.layer)), 0
            else:
                _, rows, columns = channel_counts(called.layer)
            part = _Open(called.path, node, self._atoms.new(rows), self._atoms.new(columns), called)
            self._parts.append(part)
            self._by_call[called.calls[0]] = part
        return self._by_call[called.calls[0]]

    def _read_columns(self, part: _Open, read: Any, axis: int) -> None:
        if not isinstance(read, Numbers):
            self._atoms.freeze(part.columns, "what it reads cannot be scaled")
            return
        others = [d for d in range(len(read.shape)) if d != axis]
        ids = self._carriers.tied(read, others).ravel()
        self._atoms.unite(part.columns, ids, "it is read together with something that cannot be scaled")

    def _read_parameter(self, node: fx.Node) -> None:
        path = str(node.target)
        value = editing.get_attribute(self._context.gm, path)
        if not self._norms or not self._is_vector(path, value):
            return
        if path not in self._by_name:
            self._by_name[path] = _Open(path, node, self._atoms.new(value.numel()), _NONE, None)
            self._parts.append(self._by_name[path])
        self._carriers.set(
            node, Numbers(self._by_name[path].rows.reshape(value.shape), tuple(value.shape), is_parameter=True)
        )

    def _is_vector(self, path: str, value: Any) -> bool:
        """Whether the parameter has one dimension, of more than one number, and nothing else knows it."""
        if type(value) is not nn.Parameter or value.dtype not in _DTYPES or value.layout is not torch.strided:
            return False
        aliasing = self._context.aliasing
        alone = aliasing.names(value) == (path,) and all(n.op == "get_attr" for n in aliasing.readers(value))
        return alone and value.numel() > 1 and max(value.shape) == value.numel() and bool(torch.isfinite(value).all())

    # ------------------------------------------------------------------------------------------------- the result
    def _finish(self) -> Streams:
        root, reason, _ = self._atoms.summary()
        live = np.where(reason < 0, root, FIXED)
        kept = np.unique(np.concatenate([[FIXED], *(live[i] for p in self._parts for i in (p.rows, p.columns))]))

        def classes(atoms: Ids) -> Ids:
            return np.searchsorted(kept, live[atoms])

        parts = tuple(self._close(p, classes(p.rows), classes(p.columns)) for p in self._parts)
        refusals = list(self._refusals)
        for part in self._parts:
            if part.called is not None and len(part.rows) and not live[part.rows].any():
                why = self._atoms.reasons[int(reason[part.rows].min())]
                refusals.append(Refusal(part.node, f"what it gives cannot be scaled: {why}"))
        return Streams(parts, len(kept), _streams_of(parts, len(kept)), tuple(refusals))

    def _close(self, part: _Open, rows: Ids, columns: Ids) -> Part:
        given = (part.path, part.node, rows, columns, tuple(part.reads))
        if part.called is None:
            return ParameterPart(*given, parameter=editing.get_attribute(self._context.gm, part.path))
        if isinstance(part.called.layer, NORMS):
            return NormPart(*given, norm=part.called.layer)
        return LayerPart(*given, layer=part.called.layer)


def _streams_of(parts: Sequence[Part], count: int) -> Ids:
    """Classes that one part writes, or one part reads, are of one stream; numbered from 1."""
    joined = Atoms()
    numbers = np.concatenate([[FIXED], joined.new(count - 1)])
    for part in parts:
        for side in (part.rows, part.columns):
            some = side[side != FIXED]
            if len(some):
                joined.tie(numbers[some], 0)
    return np.unique(np.concatenate([[FIXED], joined.find(numbers)]), return_inverse=True)[1][1:]
