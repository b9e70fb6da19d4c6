"""What is put into a student's graph: the teacher, frozen, and a term for each loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import UsageError
from fxcompress.passes.distillation.losses import DistillationLoss
from fxcompress.storable import storable

__all__ = ["ADDED", "GIVEN", "HOLDER", "LABELS", "Distillation", "Teacher", "Term", "holder_of", "own_dtype"]

HOLDER = "distillation"
"""Where it lies in the student's graph."""
LABELS, GIVEN = ADDED = ("labels", "teacher_output")
"""Inputs that may be added to it."""


@storable
class Distillation(nn.Module):
    """Holds the teacher and the terms.

    Args:
        inputs: the names of the placeholders that were added.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        self.terms = nn.Module()


def holder_of(gm: nn.Module) -> Distillation | None:
    """What distillation put into ``gm``, if it did."""
    found = getattr(gm, HOLDER, None)
    return found if isinstance(found, Distillation) else None


def own_dtype(network: nn.Module) -> torch.dtype | None:
    """The dtype that ``network`` computes in: of its parameters, or of its buffers if it has none."""
    tensors = (*network.parameters(), *network.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), None)


@storable
class Teacher(nn.Module):
    """One network, or several whose outputs are averaged, that are never trained.

    Each gives a tuple of tensors: the output that losses read, and the taps. The mean of logits is, up to a constant,
    the geometric mean of the distributions (Hinton et al. 2015, section 1).

    Args:
        networks: graphs that give tuples of tensors.
        copies: whether they write to what they read, so that they get copies.
    """

    def __init__(self, networks: Sequence[fx.GraphModule], copies: bool) -> None:
        super().__init__()
        self.networks, self.copies = nn.ModuleList(networks), copies
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """It stays in evaluation mode."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The outputs, the mean over the networks."""
        with torch.no_grad():
            dtype = own_dtype(self)

            def own(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                x = x.to(dtype) if dtype is not None and x.is_floating_point() else x
                return x.clone() if self.copies else x

            args, kwargs = pytree.tree_map(own, (args, kwargs))
            found = [network(*args, **kwargs) for network in self.networks]
            return tuple(sum(parts[1:], parts[0]) / len(parts) for parts in zip(*found, strict=True))


@storable
class Term(nn.Module):
    """A loss at one pair of values.

    Args:
        loss: what compares them.
        resize: bring the teacher's to the positions of the student's, where these differ.
    """

    def __init__(self, loss: DistillationLoss, resize: bool) -> None:
        super().__init__()
        self.loss, self.resize = loss, resize

    def forward(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """A scalar."""
        if teacher is None:
            raise ValueError(f"{self.loss.name} wants the teacher's outputs; call the graph with `teacher_output=`")
        teacher = teacher.detach().to(student.dtype)
        if self.resize:
            teacher = _resized(teacher, student)
        result: Tensor = self.loss(student, teacher, labels)
        return result


def _resized(x: Tensor, like: Tensor) -> Tensor:
    if x.dim() == 4:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
    if x.dim() == 3:
        return F.interpolate(x.mT, like.shape[1:2], mode="linear", align_corners=False).mT
    raise UsageError(f"values of shape {tuple(x.shape)} have no positions to resize")
