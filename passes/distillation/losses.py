"""Losses of knowledge distillation: how far a student is from a teacher.

With N samples, C channels or classes and any sizes of places (``H, W``, tokens), a loss reads either

- *outputs*: logits ``(N, C)`` or ``(N, C, H, W)``. Of three dimensions it must be said which holds classes; or
- *features*: activations ``(N, C)``, ``(N, T, C)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``. Of three dimensions the
  last holds channels, as in transformers; for ``(N, C, L)`` of one-dimensional convolutions say ``channel_dim=1``.

Every value is a mean over the samples of a batch, so that of a batch is the mean of those of equal parts of it, but for
:class:`SimilarityPreserving`, which compares samples of a batch with each other, :class:`FactorTransfer` in training,
which normalises by batches, and labels that say to leave something out. Values are computed in at least float32; layers
that are learned run in the precision of what they read. The teacher gets no gradient.

Contrastive representation distillation (Tian et al. 2020, arXiv 1910.10699) is left out: its memory bank of the
features of all samples does not fit a step without state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.passes.distillation.factor_transfer import FactorTransfer
from fxcompress.passes.distillation.loss_base import Common, DistillationLoss, distance, mean_square, real, unit
from fxcompress.storable import storable

__all__ = [
    "AttentionTransfer",
    "DecoupledKD",
    "DistillationLoss",
    "FactorTransfer",
    "FeatureMatching",
    "Hint",
    "SimilarityPreserving",
    "SoftTargets",
]

_IGNORED = -100


class _Logits(DistillationLoss):
    """Compares distributions over classes."""

    reads = "outputs"

    def _refusal(self, student: list[int], teacher: list[int]) -> str | None:
        if student[1] != teacher[1]:
            return "numbers of classes differ: compare features, or only classes that both have"
        return "a distribution over one class says nothing: compare features" if student[1] < 2 else None

    def _classes(self, labels: Tensor | None, logits: Tensor) -> Tensor:
        """Labels as class indices, int64."""
        if labels is None:
            raise UsageError(f"{type(self).__name__} {self.name!r} wants labels: pass them as `labels=`")
        wanted = logits.shape[:1] + logits.shape[2:]
        if labels.is_floating_point() or labels.shape != wanted:
            raise UsageError(
                f"labels of {self.name} are class indices of shape {tuple(wanted)}; got {labels.dtype} of shape "
                f"{tuple(labels.shape)}"
            )
        return labels.long()


@storable
class SoftTargets(_Logits):
    """The teacher's softened distribution, and labels if wanted (Hinton, Vinyals and Dean 2015, arXiv 1503.02531).

    With p the softmax of logits over the temperature T (equation 1), and T² so that gradients keep their size
    (section 2): ``alpha * T² * KL(p_teacher || p_student) + (1 - alpha) * cross_entropy(student, labels)``,
    where labels of -100 are left out as they are by :func:`torch.nn.functional.cross_entropy`.

    Args:
        temperature: T, above 0.
        alpha: the part of soft targets, from 0 to 1; below 1 it needs labels, class indices.
        common: options of :class:`DistillationLoss`.
    """

    name = "soft_targets"
    _options = ("temperature", "alpha")

    def __init__(self, temperature: float = 4.0, alpha: float = 1.0, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.temperature = self._number("temperature", temperature, above=True)
        self.alpha = self._number("alpha", alpha)
        if alpha > 1:
            raise UsageError(f"alpha of SoftTargets is the part of soft targets, from 0 to 1; got {alpha!r}")

    @property
    def needs_labels(self) -> bool:
        """Whether labels have a part."""
        return self.alpha < 1

    def _compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        student, teacher = real(student), real(teacher)
        of_student, of_teacher = (F.log_softmax(x / self.temperature, 1) for x in (student, teacher))
        soft = self.alpha * self.temperature**2 * _divergence(of_student, of_teacher).mean()
        if not self.needs_labels:
            return soft
        return soft + (1 - self.alpha) * F.cross_entropy(student, self._classes(labels, student))


@storable
class DecoupledKD(_Logits):
    """Soft targets in two parts (Zhao et al. 2022, arXiv 2203.08679, section 3).

    With p the softmax of logits over the temperature T, t the label, b = ``(p_t, 1 - p_t)`` and q the distribution p
    among classes but t: ``T² * (alpha * KL(b_teacher || b_student) + beta * KL(q_teacher || q_student))``. Soft
    targets are that with ``alpha = 1`` and, for each sample, ``beta = 1 - p_t`` of the teacher. T² is from the
    authors' code.

    Args:
        alpha: of the part about the labelled class, at least 0.
        beta: of the part about the others, at least 0.
        temperature: T, above 0.
        common: options of :class:`DistillationLoss`. Labels are class indices; where they are -100 is left out of the
            mean.
    """

    name = "decoupled_kd"
    _options = ("alpha", "beta", "temperature")

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, **common: Unpack[Common]
    ) -> None:
        super().__init__(**common)
        self.alpha, self.beta = self._number("alpha", alpha), self._number("beta", beta)
        self.temperature = self._number("temperature", temperature, above=True)

    @property
    def needs_labels(self) -> bool:
        """Always."""
        return True

    def _compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        classes = self._classes(labels, student).unsqueeze(1)
        known = classes != _IGNORED
        target = classes.where(known, 0)
        (b, q), (b_teacher, q_teacher) = (self._parts(real(x), target) for x in (student, teacher))
        each = self.alpha * _divergence(b, b_teacher) + self.beta * _divergence(q, q_teacher)
        known = known.squeeze(1)
        return self.temperature**2 * each.where(known, 0.0).sum() / known.sum().clamp_min(1)

    def _parts(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of b, ``(N, 2, ...)``, and of q, ``(N, C, ...)`` with 0 at the target."""
        logits = logits / self.temperature
        is_target = torch.zeros_like(logits, dtype=torch.bool).scatter(1, target, True)
        others = logits.masked_fill(is_target, -math.inf)
        of_all = logits.logsumexp(1, keepdim=True)
        b = torch.cat([logits.gather(1, target), others.logsumexp(1, keepdim=True)], 1) - of_all
        return b, F.log_softmax(others, 1).masked_fill(is_target, 0.0)


@storable
class AttentionTransfer(DistillationLoss):
    """Where a network looks (Zagoruyko and Komodakis 2017, arXiv 1612.03928, equation 2).

    With the map ``Q = sum_c |A_c|^p`` over channels, as a vector over places: ``|| Q_student / ||Q_student||_2 -
    Q_teacher / ||Q_teacher||_2 ||_2``. The paper's factor is ``weight = beta / 2``. Widths may differ. A map of zeros
    stays zeros and gives no gradient.

    Args:
        p: at least 1.
        common: options of :class:`DistillationLoss`.
    """

    name = "attention"
    _options = ("p",)

    def __init__(self, p: float = 2, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.p = self._number("p", p, 1)

    def _refusal(self, student: list[int], teacher: list[int]) -> str | None:
        if min(math.prod(student[2:]), math.prod(teacher[2:])) < 2:
            return "a map of one place is always 1: tap a value with places, or use Hint"
        return None

    def _compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        of_student, of_teacher = (unit(real(x).abs().pow(self.p).sum(1).flatten(1)) for x in (student, teacher))
        return distance(of_student, of_teacher, 2)


@storable
class Hint(DistillationLoss):
    """The teacher's features (FitNets, Romero et al. 2015, arXiv 1412.6550, equation 3).

    The mean over all elements of ``(r(student) - teacher)²``: the paper's sum without its half, over the number of
    elements. r is a learned linear map of channels with a bias, the same at all places (a 1x1 convolution), where
    widths differ; where they agree it is none.
    """

    name = "hint"

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.regressor: nn.Linear | None = None

    def _learn(self, student: list[int], teacher: list[int]) -> None:
        self.regressor = None if student[1] == teacher[1] else nn.Linear(student[1], teacher[1])

    def _compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        if self.regressor is not None:
            student = self.regressor(student.movedim(1, -1)).movedim(-1, 1)
        if student.shape != teacher.shape:
            raise self._wrong(student.shape, teacher.shape, "widths differ: call `prepared` with these shapes first")
        return mean_square(student, teacher)


@storable
class FeatureMatching(DistillationLoss):
    """The teacher's features where the student kept some of its channels, as after pruning.

    The mean over all elements of ``(student - teacher[channels])²``. Nothing is learned.

    Args:
        channels: for each of the student's channels its index among the teacher's; ``None`` if both have the same.
        common: options of :class:`DistillationLoss`.
    """

    name = "feature_matching"
    channels: Tensor | None

    def __init__(self, channels: Sequence[int] | Tensor | None = None, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        indices = None if channels is None else _indices(channels)
        self._last = -1 if indices is None else int(indices.max())
        self.register_buffer("channels", indices)

    def _refusal(self, student: list[int], teacher: list[int]) -> str | None:
        if self._last >= teacher[1]:
            return f"the teacher has no channel {self._last}"
        if self.channels is not None and len(self.channels) != student[1]:
            return f"{len(self.channels)} channels are said to be kept"
        if self.channels is None and student[1] != teacher[1]:
            return "widths differ: say in `channels` which the student kept, or use Hint"
        return None

    def _compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return mean_square(student, teacher if self.channels is None else teacher.index_select(1, self.channels))

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.channels is None else f", channels={len(self.channels)} indices")


@storable
class SimilarityPreserving(DistillationLoss):
    """Which samples are alike (Tung and Mori 2019, arXiv 1907.09682, equations 2 to 4).

    With Q a batch's features as rows, ``(N, C * H * W)``, and G = ``Q Q^T`` with rows divided by their L2 norms:
    ``|| G_student - G_teacher ||_F² / N²``. Shapes may differ in all but N. It compares samples with each other: the
    value of a batch is not the mean of those of its parts, and that of one sample is 0.
    """

    name = "similarity"
    _place_by_place = False

    def _compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            of_student, of_teacher = (real(x).flatten(1) for x in (student, teacher))
            return mean_square(unit(of_student @ of_student.T), unit(of_teacher @ of_teacher.T))


def _indices(channels: Sequence[int] | Tensor) -> Tensor:
    """Checked, int64."""
    found = torch.as_tensor(channels)
    whole = not found.is_floating_point() and found.dtype != torch.bool and found.dim() == 1
    if not whole or not len(found) or found.min() < 0 or len(set(found.tolist())) < len(found):
        raise UsageError("channels is a list of indices, not negative and each once; of a mask, mask.nonzero()[:, 0]")
    return found.to(torch.int64, copy=True)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the teacher's distributions to the student's, given as logarithms over dimension 1, which goes."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
