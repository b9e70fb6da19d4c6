"""Move outliers of activations into the weights that read them (EXACT).

A few channels of what a transformer's norms give are many times larger than the others, and one scale for all of them
leaves the others few integers. Channel j is divided by ``s_j`` where it is made and multiplied by it in the weights
that read it (Xiao et al. 2023, SmoothQuant, arXiv 2211.10438, equation 4)::

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

``X_j`` is all that channel was on calibration data, ``W_j`` all weights that read it. Dividing costs nothing: what
makes the channel has a weight (and a bias) for it, as a norm has, or a row, as a layer has. All that reads the channel
is linear in it, and shares ``s_j``; between the two are only operations that are positively homogeneous in each
channel; see ``streams.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fxcompress.errors import PreconditionError, UsageError
from fxcompress.layers import LAYERS, CalledLayer, called_layers, paths_of
from fxcompress.matching import check_patterns, check_patterns_match
from fxcompress.pass_base import Guarantee, Need, Observation, Pass, PassContext, Refusal, Site, Stage
from fxcompress.passes.quantization.balancing import Balance, Reals
from fxcompress.passes.quantization.scaling import rescale, stream_sites
from fxcompress.passes.quantization.streams import NORMS, Part, Streams, find_streams

__all__ = ["LargestObserver", "SmoothQuant"]

_ITERATIONS = 100


class LargestObserver:
    """An observer of the largest absolute value of each channel.

    Args:
        axis: the dimension of the channels.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._largest: Tensor | None = None

    def update(self, value: Tensor) -> None:
        """Take in one value; an empty one tells nothing."""
        if not value.numel():
            return
        others = [d for d in range(value.dim()) if d != self._axis]
        found = value.detach().abs().amax(others).cpu().double() if others else value.detach().abs().cpu().double()
        self._largest = found if self._largest is None else torch.maximum(self._largest, found)

    def merge(self, other: LargestObserver) -> None:
        """Take in what ``other`` saw."""
        if self._largest is None or other._largest is None:
            self._largest = other._largest if self._largest is None else self._largest
        else:
            self._largest = torch.maximum(self._largest, other._largest)

    def result(self) -> Tensor | None:
        """``(channels,)``, float64; ``None`` if nothing was seen."""
        return self._largest


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide channels that are large on calibration data, and multiply what reads them; see the module.

    It pays where some channels are far larger than others. Where none are, it makes weights harder to round in vain.

    Args:
        alpha: how much of the difficulty goes into the weights: 0 equalises the weights, 1 the activations.
        layers: scale channels that convolutions and linear layers make as well, and not only those of norms.
        powers_of_two: let all scales be powers of two, which leaves every output as it was to the bit (unless numbers
            come near the limits of their dtype), at a factor of at most sqrt(2) to the scale of the equation.
        exclude: glob patterns of paths of layers and norms, or of modules that contain them, that stay as they are.
        only: glob patterns of paths of layers and norms; others stay as they are.

    There is a site for each stream: what is made together and read together. Detail: ``writers`` and ``readers``
    (paths), ``channels``, how many of them are ``scaled``, and the ``least`` and ``greatest`` scale.
    """

    name: ClassVar[str] = "smooth-quant"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS, Need.CALIBRATION})
    before: ClassVar[frozenset[str]] = frozenset({"fake-quantize", "quantize", "lower-int8"})
    stage: ClassVar[Stage] = Stage.SCALE

    alpha: float = 0.5
    layers: bool = True
    powers_of_two: bool = True
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_patterns(exclude=self.exclude, only=self.only)
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"{self.name}: alpha is from 0 to 1, got {self.alpha!r}")

    def observes(self, context: PassContext) -> Iterable[Observation]:
        """See :meth:`Pass.observes`."""
        for part in self._streams(context).parts:
            if part.columns.any():
                for source, axis in part.reads:
                    yield Observation(source, _key(axis), lambda axis=axis: LargestObserver(axis))  # type: ignore[misc]

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`."""
        check_patterns_match((*self.exclude, *self.only), paths_of(*called_layers(context, (*LAYERS, *NORMS))))
        streams = self._streams(context)
        balance = Balance(streams, _seen(context, streams), self.alpha, self.powers_of_two)
        balance.run(_ITERATIONS)
        yield from stream_sites(context.gm, streams, balance.exponents)

    def rewrite(self, site: Site) -> None:
        """See :meth:`Pass.rewrite`."""
        rescale(site)

    def _streams(self, context: PassContext) -> Streams:
        def wanted(called: CalledLayer[Any]) -> bool:
            return called.is_wanted(self.exclude, self.only)

        return find_streams(context, wanted, norms=True, layers=self.layers)


def _key(axis: int) -> str:
    return f"largest along {axis}"


def _seen(context: PassContext, streams: Streams) -> Reals:
    """For each class the largest absolute value that any of its readers saw."""
    found = np.zeros(streams.count)
    for part in streams.parts:
        for source, axis in part.reads:
            largest = context.statistics.get((source, _key(axis)))
            if largest is not None:
                _check(part, largest)
                np.maximum.at(found, part.columns, largest.numpy())
    return found


def _check(part: Part, largest: Tensor) -> None:
    if not bool(torch.isfinite(largest).all()):
        raise PreconditionError(
            f"{SmoothQuant.name}: what {part.path!r} reads on the calibration data is not finite; repair the data or "
            "the weights before it, or exclude it"
        )
