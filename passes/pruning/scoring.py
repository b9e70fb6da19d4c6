"""What all importances have in common: where they get their data, and how slices of parameters become one score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fxcompress.analysis.channels import ChannelGroups, Group, Member
from fxcompress.analysis.moments import as_double
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.pass_base import PassContext

__all__ = ["Coupled", "Importance", "Scorer", "per_channel", "per_index", "producers", "weights"]

Scorer: TypeAlias = Callable[[Group], Tensor]
"""From a group to one number for each of its channels, larger for what matters more; of shape ``(channels,)``."""

_REDUCTIONS = ("mean", "max", "sum")


class Importance:
    """Scores channels. Derive with ``@dataclasses.dataclass(frozen=True)``; fields are the options.

    One that looks at weights only implements :meth:`scores`. One that looks at more (the graph, calibration data)
    implements :meth:`prepare`. Who wants scores calls :meth:`scorer`.

    Attributes:
        name: what messages call it.
        needs_data: whether it reads ``context.batches``.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False

    def requires(self, context: PassContext) -> None:
        """Refuse before any work is done.

        Raises:
            PreconditionError: it needs calibration data and there is none.
        """
        if self.needs_data and context.batches is None:
            raise PreconditionError(
                f"importance {self.name!r} is worked out from data; pass `calibration`, a few batches of inputs"
            )

    def scorer(self, context: PassContext, groups: ChannelGroups) -> Scorer:
        """What scores any of ``groups.groups``; the calibration data is read once, here. Everything is left as it was.

        Args:
            context: its graph and its calibration data are read.
            groups: of that graph.

        Returns:
            A function of a group. It gives float64 on the CPU, and raises PreconditionError where a score is not
            finite or the importance has nothing to go by.

        Raises:
            PreconditionError: there is no data and it takes some; or the data cannot be used.
            UsageError: a batch does not fit the graph.
        """
        self.requires(context)
        score = self.prepare(context, groups) if groups.groups else self.scores

        def checked(group: Group) -> Tensor:
            found = score(group).detach().cpu().double()
            if found.shape != (group.channels,):
                raise UsageError(
                    f"importance {self.name!r} gave scores of shape {tuple(found.shape)} for group {group.name!r}, "
                    f"which has {group.channels} channels"
                )
            if not bool(torch.isfinite(found).all()):
                raise PreconditionError(
                    f"importance {self.name!r} gave scores of group {group.name!r} (made by "
                    f"{', '.join(group.producers)}) that are not finite: its weights, or what they give on the "
                    "calibration data, are NaN or too large. Repair them, or exclude these layers"
                )
            return found

        return checked

    def prepare(self, context: PassContext, groups: ChannelGroups) -> Scorer:
        """Work out what the scores of ``groups.groups`` are made of, with one sweep over the data. Read-only."""
        return self.scores

    def scores(self, group: Group) -> Tensor:
        """The scores of one group, from its weights alone."""
        raise NotImplementedError(f"{type(self).__qualname__} must implement scores() or prepare()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coupled(Importance):
    """An importance that scores the slices that go with a channel one by one.

    Args:
        reduce: ``"mean"``, ``"max"`` or ``"sum"`` over the slices of a channel.
        normalize: divide by the mean over the channels of the group, so that groups can be compared (as in DepGraph,
            Fang et al. 2023, arXiv 2301.12900).
    """

    reduce: Literal["mean", "max", "sum"] = "mean"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.reduce not in _REDUCTIONS:
            raise UsageError(f"reduce is one of {', '.join(_REDUCTIONS)}, got {self.reduce!r}")

    def combine(self, slices: Sequence[Tensor]) -> Tensor:
        """One score a channel from ``slices``, each of shape ``(channels,)``."""
        stacked = torch.stack(list(slices))
        total = {"mean": stacked.mean(0), "max": stacked.amax(0), "sum": stacked.sum(0)}[self.reduce]
        return total / total.mean().clamp_min(torch.finfo(total.dtype).tiny) if self.normalize else total


def weights(group: Group) -> tuple[Member, ...]:
    """The members of ``group`` that are parameters; all of them where none is (weights that are buffers)."""
    found = tuple(m for m in group.members if isinstance(m.binding.tensor, nn.Parameter))
    return found or group.members


def producers(group: Group) -> tuple[Member, ...]:
    """The weights of the layers that make the channels of ``group``; where no layer is known, what it is named for."""
    return tuple(m for m in group.members if m.produces) or group.members[:1]


def per_index(values: Tensor, dim: int, of: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
    """Sums of ``of(values)`` over all dimensions but ``dim``; float64, of shape ``(size of dim,)``.

    Added up in float32 where the values are no wider than that (PyTorch's sums are pairwise, so the rounding does not
    grow with their number), which is several times as fast; in float64 where such a sum is too large.
    """
    values = values.detach()
    total = _summed(of(values.to(torch.promote_types(values.dtype, torch.float32))), dim)
    return as_double(total if bool(torch.isfinite(total).all()) else _summed(of(as_double(values)), dim))


def _summed(values: Tensor, dim: int) -> Tensor:
    """Sums over all dimensions but ``dim``, over what lies apart in memory first."""
    if dim:
        values = values.sum(tuple(range(dim)))
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def per_channel(member: Member, values: Tensor, channels: int) -> Tensor:
    """Sums of ``values``, one for each index along the member's dimension, over the indices of each channel."""
    units = torch.from_numpy(member.units)
    inside = units >= 0
    total = torch.zeros(channels, dtype=torch.float64)
    return total.index_add_(0, units[inside], values.cpu().double()[inside])
