"""Importances from gradients: what the loss would change by, to first order or from its curvature."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompress.analysis.channels import ChannelGroups, Group, Member
from fxcompress.analysis.outputs import tensor_leaves
from fxcompress.analysis.running import GraphRunner, undisturbed
from fxcompress.calibration import check_batch
from fxcompress.errors import FxCompressError, PreconditionError, UsageError
from fxcompress.examples import map_tensors
from fxcompress.pass_base import Example, PassContext
from fxcompress.passes.pruning.scoring import Coupled, Scorer, per_channel, per_index, weights

__all__ = ["Hessian", "Taylor", "label_free_loss"]


def label_free_loss(output: Any) -> Tensor:
    """A loss for each sample, of shape ``(samples,)``, from what a model gives and no labels.

    A single floating-point tensor of shape ``(samples, classes)`` with two classes or more is taken for logits: the
    loss is the cross entropy of each row against its own largest element. Of anything else it is the mean of the
    squares, a sum over the floating-point tensors in ``output``; for each index of their first dimension if they agree
    on its size, else one for all.

    Raises:
        PreconditionError: there is no floating-point tensor in ``output``.
    """
    found = [t for _, t in tensor_leaves(output) if t.is_floating_point() and t.numel()]
    if not found:
        raise PreconditionError("the model's output has no floating-point tensor to make a loss of; give a `loss`")
    first = found[0]
    if len(found) == 1 and first.dim() == 2 and first.shape[1] > 1:
        return F.cross_entropy(first, first.detach().argmax(1), reduction="none")
    sizes = {t.shape[0] if t.dim() else None for t in found}
    if len(sizes) == 1 and None not in sizes:
        return torch.stack([t.square().reshape(len(t), -1).mean(1) for t in found]).sum(0)
    return torch.stack([t.square().mean() for t in found]).sum().reshape(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FromGradients(Coupled):
    """Sweeps over the data and adds up what :meth:`_elements` makes of each batch.

    Args:
        loss: from the model's output to a loss for each sample, of shape ``(samples,)``, or for all together, of shape
            ``()``. By default :func:`label_free_loss`.
        reduce, normalize: see :class:`~fxcompress.passes.pruning.scoring.Coupled`.
    """

    needs_data: ClassVar[bool] = True
    reduce: Literal["mean", "max", "sum"] = "sum"
    normalize: bool = False
    loss: Callable[[Any], Tensor] | None = None

    def _elements(self, losses: Tensor, tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        """For each element of each of ``tensors`` what it adds to the slices that it is in, and what that weighs."""
        raise NotImplementedError

    def prepare(self, context: PassContext, groups: ChannelGroups) -> Scorer:
        """See :meth:`Importance.prepare`.

        Raises:
            PreconditionError: the graph cannot go backward.
            UsageError: a batch does not fit, or the model or the loss fails on it.
        """
        assert context.batches is not None, "asked for in requires()"
        slices = {id(m): (m, g.channels) for g in groups.groups for m in _floating(g)}
        tensors = list({id(m.binding.tensor): m.binding.tensor for m, _ in slices.values()}.values())
        totals = {key: torch.zeros(channels, dtype=torch.float64) for key, (_, channels) in slices.items()}
        weight = 0
        if tensors:
            for index, batch in enumerate(context.batches):
                with _graded(tensors), _forward(context.gm, batch, index) as output:
                    elements, count = self._read(output, tensors, index)
                self._add(totals, slices, dict(zip(map(id, tensors), elements, strict=True)))
                weight += count
        return lambda group: self.combine([totals[id(m)] / max(weight, 1) for m in _floating(group)])

    def _read(self, output: Any, tensors: Sequence[Tensor], index: int) -> tuple[list[Tensor], int]:
        losses = (self.loss or label_free_loss)(output)
        if not isinstance(losses, Tensor):
            raise UsageError(f"the `loss` of importance {self.name!r} gave a {type(losses).__name__} and no tensor")
        if not losses.requires_grad:
            raise PreconditionError(
                f"importance {self.name!r} needs gradients and the loss on batch {index} does not depend on any "
                "weight that may be pruned: the output is detached, or computed under torch.no_grad or inference_mode"
            )
        try:
            return self._elements(losses.reshape(-1), tensors)
        except RuntimeError as error:
            raise PreconditionError(
                f"importance {self.name!r} needs gradients and the graph cannot go backward: {error}"
            ) from error

    @staticmethod
    def _add(
        totals: dict[int, Tensor], slices: Mapping[int, tuple[Member, int]], elements: Mapping[int, Tensor]
    ) -> None:
        for key, (member, channels) in slices.items():
            found = per_index(elements[id(member.binding.tensor)], member.binding.dim)
            totals[key] += per_channel(member, found, channels).abs()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taylor(_FromGradients):
    """To first order, what the loss changes by without a slice (Molchanov et al. 2019, arXiv 1906.10771).

    With g the gradient of a batch's mean loss, ``|sum of w g|`` over the slice, or the sum of ``(w g)^2``; the mean
    over the batches (so it depends on how the data is batched), the sum over the slices of a channel. The loss is
    ``loss``, by default :func:`label_free_loss`. The graph runs in the mode (training or evaluation) that it is in.

    Args:
        squared: sum ``(w g)^2`` over the elements, rather than take ``|sum of w g|``.
        loss: from the model's output to a loss for each sample, of shape ``(samples,)``, or for all, of shape ``()``.
        reduce, normalize: see :class:`~fxcompress.passes.pruning.scoring.Coupled`.
    """

    name: ClassVar[str] = "taylor"
    squared: bool = False

    def _elements(self, losses: Tensor, tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        products = [_wide(t) * g for t, g in zip(tensors, _gradients(losses.mean(), tensors), strict=True)]
        return [p.square() for p in products] if self.squared else products, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hessian(_FromGradients):
    """What the loss changes by without a slice if its curvature is the diagonal of the empirical Fisher matrix: the sum
    of ``h w^2 / 2`` (Optimal Brain Damage; over channels as C-OBD in EigenDamage, Wang et al. 2019, arXiv 1905.05934).

    h is the mean over the samples of the squared gradient of the sample's loss, ``loss`` or by default
    :func:`label_free_loss`. One backward pass a sample is taken up to ``draws`` samples a batch. Of more, ``draws``
    sums with random signs s_i are taken: the mean of ``(sum of s_i g_i)^2`` over the signs is the sum of ``g_i^2``, so
    these are estimates without bias at ``draws`` backward passes a batch.

    Args:
        draws: backward passes a batch, at least 1.
        seed: of the signs.
        loss: from the model's output to a loss for each sample, of shape ``(samples,)``. One for all, of shape ``()``,
            counts as that of a single sample.
        reduce, normalize: see :class:`~fxcompress.passes.pruning.scoring.Coupled`.
    """

    name: ClassVar[str] = "hessian"
    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1:
            raise UsageError(f"draws is at least 1, got {self.draws}")

    def _elements(self, losses: Tensor, tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        samples = len(losses)
        if samples <= self.draws:
            directions, each = torch.eye(samples), 1.0
        else:
            generator = torch.Generator().manual_seed(self.seed)
            directions = torch.randint(2, (self.draws, samples), generator=generator) * 2.0 - 1
            each = 1 / self.draws
        squares = [torch.zeros_like(_wide(t)) for t in tensors]
        for i, direction in enumerate(directions.to(losses)):
            found = _gradients(losses, tensors, direction, keep=i + 1 < len(directions))
            for square, gradient in zip(squares, found, strict=True):
                square.addcmul_(gradient, gradient, value=each)
        return [s * _wide(t).square() / 2 for s, t in zip(squares, tensors, strict=True)], samples


def _floating(group: Group) -> tuple[Member, ...]:
    return tuple(m for m in weights(group) if m.binding.tensor.is_floating_point())


def _gradients(
    losses: Tensor, tensors: Sequence[Tensor], direction: Tensor | None = None, keep: bool = False
) -> list[Tensor]:
    """Gradients of ``losses``, weighted by ``direction``; zero where none flows. ``.grad`` is not touched."""
    found = torch.autograd.grad(losses, list(tensors), direction, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(_wide(t)) if g is None else _wide(g) for t, g in zip(tensors, found, strict=True)]


def _wide(values: Tensor) -> Tensor:
    """``values`` in a dtype in which their squares do not vanish."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


@contextlib.contextmanager
def _graded(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients be taken with respect to ``tensors``, those that are frozen for training too."""
    frozen = [t for t in tensors if not t.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


@contextlib.contextmanager
def _forward(gm: fx.GraphModule, batch: Example, index: int) -> Iterator[Any]:
    """What ``gm`` gives on ``batch``, to go backward from; buffers and random state are put back on leaving."""
    check_batch(gm, batch, index)
    own = map_tensors(batch, lambda t: t.detach().clone())
    runner = GraphRunner(gm)
    runner.extra_traceback = False
    with torch.enable_grad(), undisturbed(gm, (own.args, dict(own.kwargs))):
        try:
            output = runner.call(own.args, own.kwargs)
        except FxCompressError:
            raise
        except Exception as error:
            raise UsageError(
                f"the model failed on batch {index} of the calibration data: {type(error).__name__}: {error}"
            ) from error
        yield output
