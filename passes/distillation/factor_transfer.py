"""Factor transfer: the one loss of distillation that trains a network of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Self, Unpack

from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.passes.distillation.loss_base import Common, DistillationLoss, distance, mean_square, real, unit
from fxcompress.storable import storable

__all__ = ["FactorTransfer"]


@storable
class FactorTransfer(DistillationLoss):
    """The teacher's features in other words (Kim, Park and Kwak 2018, arXiv 1802.04977, section 3).

    A paraphraser, an autoencoder of the teacher's features, gives the factor F; a translator, of the form of its
    encoder, gives the student's: ``|| F_student / ||F_student||_2 - F_teacher / ||F_teacher||_2 ||_p``, with the norms
    of a sample's whole factor. Each has three 3x3 convolutions (transposed ones in the decoder) with batch
    normalisation and leaky ReLU of slope 0.1; on tokens ``(N, T, C)`` they read three in a row.

    The paraphraser learns from its :meth:`reconstruction` error alone, which is added until it is frozen; the paper
    trains it first. The authors' code takes the mean over a factor's elements where the equation has their sum: its
    weights are larger by their number. In training, batches are normalised: a value depends on its whole batch.

    Args:
        rate: factors have ``rate`` times as many channels as the teacher, above 0.
        p: of the norm of the difference, at least 1.
        common: options of :class:`DistillationLoss`.

    Attributes:
        frozen: whether the paraphraser stays as it is; set by :meth:`freeze`.
    """

    name = "factor_transfer"
    _options = ("rate", "p")

    def __init__(self, rate: float = 0.5, p: float = 1, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.rate, self.p = self._number("rate", rate, above=True), self._number("p", p, 1)
        self.frozen = False
        self.paraphraser: nn.ModuleDict | None = None
        self.translator: nn.Sequential | None = None

    def freeze(self, frozen: bool = True) -> Self:
        """Let the paraphraser stay as it is, in evaluation mode and without its error in the value; or learn again."""
        self.frozen = frozen
        self._autoencoder().requires_grad_(not frozen)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As of any module; a frozen paraphraser stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self._autoencoder().eval()
        return self

    def reconstruction(self, teacher: Tensor) -> Tensor:
        """The mean over elements of ``(paraphraser(teacher) - teacher)²`` (equation 1); a scalar."""
        teacher = self._channels_second(teacher.detach())
        return self._error(self._autoencoder()["encoder"](teacher), teacher)

    def _refusal(self, student: list[int], teacher: list[int]) -> str | None:
        return None if 3 <= len(teacher) <= 5 else "it convolves over one to three dimensions of places: use Hint"

    def _learn(self, student: list[int], teacher: list[int]) -> None:
        width, factors, places = teacher[1], max(1, round(self.rate * teacher[1])), len(teacher) - 2
        coders = {
            "encoder": _convolutions((width, width, factors, factors), f"{places}d"),
            "decoder": _convolutions((factors, factors, width, width), f"Transpose{places}d"),
        }
        self.paraphraser = nn.ModuleDict(coders)
        self.frozen = False
        self.translator = _convolutions((student[1], student[1], factors, factors), f"{places}d")

    def _compare(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        factor = self._autoencoder()["encoder"](teacher)
        assert self.translator is not None
        of_student, of_teacher = (unit(real(x).flatten(1)) for x in (self.translator(student), factor.detach()))
        transfer = distance(of_student, of_teacher, self.p)
        return transfer if self.frozen else transfer + self._error(factor, teacher)

    def _error(self, factor: Tensor, teacher: Tensor) -> Tensor:
        return mean_square(self._autoencoder()["decoder"](factor), teacher)

    def _autoencoder(self) -> nn.ModuleDict:
        if self.paraphraser is None:
            raise UsageError(f"{self.name} has no paraphraser yet: call `prepared` with the shapes it is to compare")
        return self.paraphraser

    def extra_repr(self) -> str:
        return super().extra_repr() + (", frozen" if self.frozen else "")


def _convolutions(widths: Sequence[int], kind: str) -> nn.Sequential:
    """3x3 convolutions from each width to the next, of a kind such as ``Transpose2d``, as factor transfer has them."""
    convolution, norm = getattr(nn, f"Conv{kind}"), getattr(nn, f"BatchNorm{kind[-2:]}")
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [convolution(before, after, 3, padding=1, bias=False), norm(after), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)
