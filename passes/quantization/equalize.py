"""Equalise the ranges of channels across layers, so that one scale fits all weights of a layer (EXACT).

Between two layers with nothing but a positively homogeneous function between them, ``f(x / s) = f(x) / s``, channel i
can be divided by ``s_i > 0`` in what writes it and multiplied by it in what reads it (Nagel et al. 2019, arXiv
1906.04721, section 4.1). With ``r1_i`` and ``r2_i`` the largest weights that write and read it, all channels use their
tensors' ranges best for

    s_i = sqrt(r1_i r2_i) / r2_i = sqrt(r1_i / r2_i)    (equation 11)

after which both are ``sqrt(r1_i r2_i)``. Here not only pairs are balanced but whole streams, which several layers write
and read because of residual sums, concatenations and branches; ``r1_i`` is then the largest of all weights that write
channel i, and ``r2_i`` of all that read it. See ``streams.py`` for what is found and ``balancing.py`` for the order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from fxcompress.errors import UsageError
from fxcompress.layers import LAYERS, called_layers, paths_of
from fxcompress.matching import check_patterns, check_patterns_match
from fxcompress.pass_base import Guarantee, Need, Pass, PassContext, Refusal, Site, Stage
from fxcompress.passes.quantization.balancing import Balance
from fxcompress.passes.quantization.scaling import rescale, stream_sites
from fxcompress.passes.quantization.streams import find_streams

__all__ = ["EqualizeLayers"]


@dataclasses.dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Scale channels between layers so that what writes each and what reads it has weights of one size.

    Fold batch norms before and quantise after (``["fold-batch-norm", "equalize-layers", "quantize"]``). It pays where
    a tensor of weights has one scale (``granularity="tensor"``). With a scale for each channel rows need no help, and
    columns that it spreads do harm at few bits. A channel whose weights are below 2^-16 of the largest of its stream is
    taken for dead and stays.

    Args:
        powers_of_two: let all scales be powers of two, which leaves every output as it was to the bit (unless numbers
            come near the limits of their dtype), at a factor of at most sqrt(2) to the best scale.
        iterations: how often all streams are visited at most; it ends earlier when nothing moves.
        exclude: glob patterns of paths of layers, or of modules that contain them, that stay as they are.
        only: glob patterns of paths of layers; others stay as they are.

    There is a site for each stream. Detail: ``writers`` and ``readers`` (paths), ``channels``, how many of them are
    ``scaled``, and the ``least`` and ``greatest`` scale.
    """

    name: ClassVar[str] = "equalize-layers"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})
    before: ClassVar[frozenset[str]] = frozenset({"fake-quantize", "quantize", "lower-int8"})
    stage: ClassVar[Stage] = Stage.SCALE

    powers_of_two: bool = True
    iterations: int = 1000
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_patterns(exclude=self.exclude, only=self.only)
        if self.iterations < 1:
            raise UsageError(f"{self.name}: iterations is at least 1, got {self.iterations!r}")

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`."""
        check_patterns_match((*self.exclude, *self.only), paths_of(*called_layers(context, LAYERS)))
        streams = find_streams(context, lambda called: called.is_wanted(self.exclude, self.only), norms=False)
        balance = Balance(streams, None, 0.5, self.powers_of_two)
        balance.run(self.iterations)
        yield from stream_sites(context.gm, streams, balance.exponents)

    def rewrite(self, site: Site) -> None:
        """See :meth:`Pass.rewrite`."""
        rescale(site)
