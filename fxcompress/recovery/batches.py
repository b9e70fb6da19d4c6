"""What a batch is: inputs, labels, and which part of both belongs to which process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.inputs import bind_inputs
from fxcompress.analysis.outputs import tensor_leaves
from fxcompress.errors import UsageError
from fxcompress.examples import map_tensors
from fxcompress.pass_base import Example

__all__ = ["Batch", "Reader", "Share", "bounds", "share_of"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of the graph and, unless ``None``, labels."""

    inputs: Example
    labels: Any = None

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """A copy with ``change(tensor)`` in place of each tensor."""
        both = map_tensors(Example((self.inputs.args, self.labels), self.inputs.kwargs), change)
        args, labels = both.args
        return Batch(Example(args, both.kwargs), labels)

    def size(self) -> int | None:
        """How long the first dimension of the first input tensor is; ``None`` if no tensor has dimensions."""
        leaves = tensor_leaves((self.inputs.args, self.inputs.kwargs))
        return next((tensor.shape[0] for _, tensor in leaves if tensor.dim()), None)


@dataclasses.dataclass(frozen=True)
class Share:
    """One process's part of a batch.

    Attributes:
        batch: the part. A process for which nothing is left gets one sample all the same, which keeps it in step.
        weight: how much of the whole batch it is, 0 for such a sample.
    """

    batch: Batch
    weight: float


class Reader:
    """Tells inputs from labels.

    Args:
        gm: the graph that is trained. An input ``labels`` of its own counts as an input and as labels.
        fused: ``gm`` carries its own distillation losses, and an input ``labels`` of it is for these.
        wanted: who wants labels, in words; empty if nobody does.

    Attributes:
        wanted: as above; may be set later.
    """

    def __init__(self, gm: fx.GraphModule, fused: bool, wanted: str) -> None:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self._names = [str(node.target) for node in placeholders if not (fused and str(node.target) == "labels")]
        self._starred = any(name.startswith("*") for name in self._names)
        self._labels_are_input = "labels" in self._names
        self._gm, self.wanted = gm, wanted

    def read(self, batch: Any, index: int) -> Batch:
        """The batch in one form.

        Raises:
            UsageError: it is no batch, does not fit the graph, is empty, or has no labels where they are wanted.
        """
        inputs, labels = self._split(batch, index)
        try:
            bind_inputs(self._gm, inputs.args, inputs.kwargs)
        except UsageError as error:
            raise UsageError(f"batch {index}: {error}") from error
        if labels is None and self.wanted:
            raise UsageError(
                f"batch {index} has no labels, which {self.wanted} wants. A batch with labels is a pair (inputs, "
                "labels), where inputs is a tuple or a mapping if the model takes several, the model's positional "
                f"inputs ({', '.join(self._names)}) and the labels after them, or a mapping with 'labels' in it"
            )
        read = Batch(inputs, labels)
        if read.size() == 0:
            raise UsageError(f"batch {index} is empty: its first tensor has no entries in dimension 0")
        return read

    def _split(self, batch: Any, index: int) -> tuple[Example, Any]:
        if not isinstance(batch, (tuple, list)):
            return self._inputs(batch, index)
        if batch and isinstance(batch[0], (tuple, list, Mapping, Example)):
            if len(batch) != 2:
                raise UsageError(
                    f"batch {index} starts with a {type(batch[0]).__name__}, so it is read as (inputs, labels), but it "
                    f"has {len(batch)} entries; if these are all inputs, pass an fxcompress.Example"
                )
            return self._inputs(batch[0], index)[0], batch[1]
        if len(batch) == len(self._names) + 1 and not self._starred:
            return Example(tuple(batch[:-1])), batch[-1]
        return Example(tuple(batch)), None

    def _inputs(self, batch: Any, index: int) -> tuple[Example, Any]:
        if isinstance(batch, torch.Tensor):
            return Example((batch,)), None
        if isinstance(batch, (tuple, list)):
            return Example(tuple(batch)), None
        if isinstance(batch, Mapping):
            batch = Example((), batch)
        if not isinstance(batch, Example):
            raise UsageError(
                f"batch {index} is a {type(batch).__name__}; expected a tensor, a tuple or list of positional inputs, "
                "a mapping of keyword inputs, an fxcompress.Example, or a pair of one of these and labels"
            )
        kwargs = dict(batch.kwargs)
        labels = kwargs.get("labels") if self._labels_are_input else kwargs.pop("labels", None)
        return Example(tuple(batch.args), kwargs), labels


def bounds(size: int, rank: int, world: int) -> tuple[int, int, float]:
    """Where the share of process ``rank`` of ``world`` begins and ends in ``size`` samples, and its weight."""
    low, high = rank * size // world, (rank + 1) * size // world
    return (low, high, (high - low) / size) if high > low else (low, low + 1, 0.0)


def share_of(batch: Batch, rank: int, world: int, index: int) -> Share:
    """The contiguous share of process ``rank`` of ``world``, along dimension 0 of every tensor that is as long there as
    the first input tensor is; other tensors stay whole.

    Raises:
        UsageError: there is nothing to divide.
    """
    if world == 1:
        return Share(batch, 1.0)
    size = batch.size()
    if size is None:
        raise UsageError(f"batch {index} cannot be divided among {world} processes: no input tensor has a dimension 0")
    low, high, weight = bounds(size, rank, world)
    labels = batch.labels
    if labels is not None and not any(t.dim() and t.shape[0] == size for _, t in tensor_leaves(labels)):
        if not (isinstance(labels, (tuple, list)) and len(labels) == size):
            raise UsageError(
                f"batch {index} cannot be divided among {world} processes: it has {size} samples, but neither is its "
                "labels a list of that many nor has a tensor in them as many entries in dimension 0"
            )
        batch = dataclasses.replace(batch, labels=labels[low:high])
        return Share(Batch(batch.mapped(lambda t: _cut(t, size, low, high)).inputs, batch.labels), weight)
    return Share(batch.mapped(lambda t: _cut(t, size, low, high)), weight)


def _cut(tensor: torch.Tensor, size: int, low: int, high: int) -> torch.Tensor:
    return tensor[low:high] if tensor.dim() and tensor.shape[0] == size else tensor
