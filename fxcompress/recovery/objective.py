"""What is minimised, as one module that gives a loss: the graph, its distillation losses, the caller's loss."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

import fxcompress.pipeline as pipeline
from fxcompress.apply import apply_pass
from fxcompress.editing import private_copy
from fxcompress.errors import UsageError
from fxcompress.pass_base import Example
from fxcompress.recovery.norms import freeze
from fxcompress.registry import resolve
from fxcompress.report import detach

__all__ = ["Objective", "attach_distillation", "detach_distillation", "is_fused"]

_DISTILLATION = "distillation"


def is_fused(gm: fx.GraphModule) -> bool:
    """Whether ``gm`` carries a teacher and distillation losses."""
    return isinstance(getattr(gm, _DISTILLATION, None), nn.Module)


def attach_distillation(gm: fx.GraphModule, example: Example, fields: Mapping[str, Any]) -> fx.GraphModule:
    """``gm`` fused with a teacher and losses (``fields`` of the pass)."""
    given = {key: value for key, value in fields.items() if value is not None}
    pass_ = dataclasses.replace(resolve(f"attach-{_DISTILLATION}"), **given)  # type: ignore[type-var]
    # Without verification: that the student stays as it is costs ten runs of both networks, each time.
    return pipeline.compile(gm, [pass_], example.args, example_kwargs=dict(example.kwargs), verify=False)


def detach_distillation(gm: fx.GraphModule) -> fx.GraphModule:
    """The student of the fused ``gm`` by itself, as a copy without a report."""
    student = private_copy(gm)
    detach(student)
    apply_pass(resolve(f"detach-{_DISTILLATION}"), student, None, None, lambda event: None)
    return student


class Objective(nn.Module):
    """Loss of a batch.

    Args:
        gm: the graph, fused or not.
        loss_fn: a function of (output, labels) that gives a scalar; a module is copied.

    Attributes:
        distils_labels: whether a distillation loss of the graph wants labels.
    """

    def __init__(self, gm: fx.GraphModule, loss_fn: Callable[[Any, Any], torch.Tensor] | None) -> None:
        super().__init__()
        self.gm = gm
        self._fused = is_fused(gm)
        takes_labels = any(n.op == "placeholder" and n.target == "labels" for n in gm.graph.nodes)
        self.distils_labels = self._fused and takes_labels
        self.criterion = copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
        self._term = getattr(loss_fn, "__name__", type(loss_fn).__name__)

    def ready(self, *, batch_norm: bool) -> None:
        """Into training mode, in which a teacher stays as it is; batch norm of the student only on request."""
        self.train()
        if not batch_norm:
            for name, child in self.gm.named_children():
                if name != _DISTILLATION:
                    freeze(child)

    def forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss and, without gradients, each term of it by name."""
        total: Any = None
        terms: dict[str, Any] = {}
        if self._fused:
            extra = {"labels": labels} if self.distils_labels else {}
            output, terms, total = self.gm(*args, **{**kwargs, **extra})
            terms = {name: term.detach() for name, term in terms.items()}
        else:
            output = self.gm(*args, **kwargs)
        if self.criterion is not None:
            loss = self.criterion(output, labels)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                found = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise UsageError(f"`loss_fn` must give one number, the mean over the batch; it gave {found}")
            loss = loss.reshape(())
            terms[self._term if self._term not in terms else "loss_fn"] = loss.detach()
            total = loss if total is None else total + loss
        return total, terms
