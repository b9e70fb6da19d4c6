"""How large a channel is on calibration data."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.analysis.channels import ChannelGroups, Group, Labelled
from fxcompress.analysis.moments import as_double
from fxcompress.calibration import collect
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.pass_base import Observation, PassContext
from fxcompress.passes.pruning.scoring import Coupled, Scorer, producers

__all__ = ["Activation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation(Coupled):
    """The root mean square of what the layers that make a channel give on the calibration data, before anything that
    follows them: the L2 norm, made independent of how much data there is and in how many places a channel lives.

    The graph runs in the mode (training or evaluation) that it is in.

    Args:
        reduce: over the layers that make the channels (and over all calls of a layer that is called several times).
        normalize: see :class:`~fxcompress.passes.pruning.scoring.Coupled`.
    """

    name: ClassVar[str] = "activation"
    needs_data: ClassVar[bool] = True

    def prepare(self, context: PassContext, groups: ChannelGroups) -> Scorer:
        """See :meth:`Importance.prepare`. The scorer raises PreconditionError for a group that no layer makes."""
        assert context.batches is not None, "asked for in requires()"
        made = {id(m.binding.tensor) for g in groups.groups for m in producers(g)}
        wanted = np.zeros(groups.classes, dtype=np.bool_)
        for group in groups.groups:
            wanted[group.classes] = True
        wishes = []
        for node in context.gm.graph.nodes:
            module = context.module(node)
            if isinstance(found := groups.found.get(node), Labelled) and _reads_any(module, made):
                maps = (groups.classes_of(m.ids) for m in found.maps)
                classes = [ids for ids in maps if wanted[ids].any()]  # others may lie along the batch
                wishes.append(Observation(node, self.name, partial(_Squares, classes, groups.classes)))
        means = collect(context.gm, context.batches, wishes)
        by_module = [(context.module(node), mean) for (node, _), mean in means.items()]

        def score(group: Group) -> Tensor:
            tensors = {id(m.binding.tensor) for m in producers(group)}
            rows = [mean[group.classes] for module, mean in by_module if _reads_any(module, tensors)]
            if not rows:
                raise PreconditionError(
                    f"importance {self.name!r} found no layer that makes group {group.name!r}; exclude it, or take "
                    "another importance"
                )
            return self.combine([torch.from_numpy(row).sqrt() for row in rows])

        return score


def _reads_any(module: nn.Module | None, tensors: Container[int]) -> bool:
    return module is not None and id(getattr(module, "weight", None)) in tensors


class _Squares:
    """Mean squares of a stream of tensors, by class.

    Args:
        maps: the classes of its elements along some of its dimensions, of size 1 along the others; one for each set of
            dimensions.
        classes: one more than the largest class.
    """

    def __init__(self, maps: Sequence[np.ndarray], classes: int) -> None:
        self._maps, self._classes = maps, classes
        self._sums, self._counts = np.zeros(classes), np.zeros(classes)

    def update(self, value: Tensor) -> None:
        """Take in one tensor, of the rank and with the labelled sizes of the example."""
        squares = as_double(value).square()
        for ids in self._maps:
            others = [d for d, size in enumerate(ids.shape) if size == 1]
            sums = squares.sum(others, keepdim=True) if others else squares
            if tuple(sums.shape) != ids.shape:
                raise UsageError(
                    f"it is of shape {tuple(value.shape)} on the calibration data, which does not go with the channels "
                    f"of shape {ids.shape} that it has on the example inputs"
                )
            flat = ids.ravel()
            self._sums += np.bincount(flat, sums.cpu().numpy().ravel(), self._classes)
            self._counts += np.bincount(flat, minlength=self._classes) * (value.numel() / flat.size)

    def merge(self, other: _Squares) -> None:
        """Take in what ``other`` saw."""
        self._sums += other._sums
        self._counts += other._counts

    def result(self) -> np.ndarray:
        """The mean square of each class, of shape ``(classes,)``; 0 for those that are not here."""
        found: np.ndarray = self._sums / np.maximum(self._counts, 1)
        return found
