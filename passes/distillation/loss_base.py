"""What all losses of knowledge distillation have in common: their options, shapes, and a little arithmetic."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import ClassVar, Literal, Self, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.errors import UsageError

__all__ = ["Common", "DistillationLoss", "distance", "mean_square", "real", "unit"]

_TINY = 1e-12


class Common(TypedDict, total=False):
    """Options of all losses."""

    weight: float
    name: str | None
    channel_dim: int | None


class DistillationLoss(nn.Module):
    """What all have in common.

    Args:
        weight: of its term in the sum; finite, at least 0. The value itself is without it.
        name: of its term, in snake case; by default one for each class.
        channel_dim: the dimension of channels or classes; ``None`` as the module says.
    """

    reads: ClassVar[Literal["outputs", "features"]] = "features"
    name: str = "distillation"
    _options: ClassVar[tuple[str, ...]] = ()
    _place_by_place: ClassVar[bool] = True

    def __init__(self, *, weight: float = 1.0, name: str | None = None, channel_dim: int | None = None) -> None:
        super().__init__()
        self.weight = self._number("weight", weight)
        self.name = type(self).name if name is None else name
        self.channel_dim = channel_dim
        if not re.fullmatch("[a-z][a-z0-9_]*", self.name):
            raise UsageError(f"name is that of a term, in snake case such as {type(self).name!r}; got {self.name!r}")
        if channel_dim == 0:
            raise UsageError("channel_dim is the dimension of channels or classes; 0 is that of samples")

    @property
    def needs_labels(self) -> bool:
        """Whether it reads labels."""
        return False

    def prepared(self, student: torch.Size, teacher: torch.Size) -> Self:
        """A copy with what it learns for tensors of these shapes; sizes of places may yet differ.

        Raises:
            UsageError: tensors of these shapes cannot be compared.
        """
        of_student, of_teacher = self._comparable(student, teacher)
        made = copy.deepcopy(self)
        made._learn(of_student, of_teacher)
        return made

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """How far the student is from the teacher.

        Args:
            student: what the student gives.
            teacher: what the teacher gives, of the same sizes of places.
            labels: of the samples, where :attr:`needs_labels`; otherwise not read.

        Returns:
            A scalar without its weight, in at least float32.

        Raises:
            UsageError: these cannot be compared, or labels are missing.
        """
        of_student, of_teacher = self._comparable(student.shape, teacher.shape)
        if of_student[0] != of_teacher[0]:
            raise self._wrong(student.shape, teacher.shape, "these are not the same samples")
        if self._place_by_place and of_student[2:] != of_teacher[2:]:
            raise self._wrong(student.shape, teacher.shape, "sizes besides channels differ: resize one of them")
        return self._compare(self._channels_second(student), self._channels_second(teacher.detach()), labels)

    def _learn(self, student: list[int], teacher: list[int]) -> None:
        """Make what is learned. Sizes have channels second."""

    def _refusal(self, student: list[int], teacher: list[int]) -> str | None:
        """Why tensors of these sizes, channels second, cannot be compared, whatever sizes of places become."""
        return None

    def _compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """The value; channels are the second dimension."""
        raise NotImplementedError

    def _comparable(self, student: Sequence[int], teacher: Sequence[int]) -> tuple[list[int], list[int]]:
        """Both sizes with channels second."""
        if self._place_by_place and len(student) != len(teacher):
            raise self._wrong(student, teacher, "dimensions differ in number: tap other values, or reshape them")
        sizes = []
        for shape in (student, teacher):
            size = list(shape)
            size.insert(1, size.pop(self.channel_axis(len(shape))))
            sizes.append(size)
        reason = self._refusal(*sizes)
        if reason is not None:
            raise self._wrong(student, teacher, reason)
        return sizes[0], sizes[1]

    def channel_axis(self, rank: int) -> int:
        """The dimension of channels among ``rank``, not negative."""
        if rank < 2:
            raise UsageError(f"{self.name} compares channels or classes of samples; a value has {rank} dimension(s)")
        if self.channel_dim is not None:
            dim = self.channel_dim + rank if self.channel_dim < 0 else self.channel_dim
            if not 0 < dim < rank:
                raise UsageError(f"{self.name}: channel_dim={self.channel_dim} is no dimension of channels of {rank}")
            return dim
        if rank == 3 and self.reads == "outputs":
            raise UsageError(f"{self.name}: say which of three dimensions holds classes: channel_dim=1 or 2")
        return 2 if rank == 3 else 1

    def _channels_second(self, x: Tensor) -> Tensor:
        return x.movedim(self.channel_axis(x.dim()), 1)

    def _wrong(self, student: Sequence[int], teacher: Sequence[int], reason: str) -> UsageError:
        return UsageError(f"{self.name} cannot compare {tuple(student)} with the teacher's {tuple(teacher)}: {reason}")

    def _number(self, option: str, value: float, least: float = 0.0, *, above: bool = False) -> float:
        if not isinstance(value, int | float) or not least <= value < math.inf or (above and value == least):
            bound = f"above {least:g}" if above else f"at least {least:g}"
            raise UsageError(f"{option} of {type(self).__name__} is a finite number {bound}; got {value!r}")
        return value

    def extra_repr(self) -> str:
        said = () if self.channel_dim is None else ("channel_dim",)
        return ", ".join(f"{option}={getattr(self, option)!r}" for option in ("name", "weight", *self._options, *said))


def real(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(rows: Tensor) -> Tensor:
    """Rows over their L2 norms; rows of zeros stay, and pass gradients on as they come."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norm.where(norm > _TINY, 1.0)


def distance(student: Tensor, teacher: Tensor, p: float) -> Tensor:
    """The mean over rows of the p-norm of the difference; equal rows get no gradient."""
    norms: Tensor = torch.linalg.vector_norm(student - teacher, p, dim=1)
    return norms.mean()


def mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of squared differences over all elements."""
    return F.mse_loss(real(student), real(teacher))
