"""Moments of what the encoders of a layer would read, and what they say of a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.analysis.moments import Moments, MomentsObserver, second_moment_fits
from fxcompress.analysis.patches import READABLE
from fxcompress.layers import Layer
from fxcompress.passes.low_rank.folding import Folding

__all__ = ["few_rows", "given_by_mean", "observer_of", "takes_up_mean", "unobservable", "weighting_of"]


def takes_up_mean(layer: Layer) -> bool:
    """Whether a change of the bias of ``layer`` makes up for what a pair misses of the mean input: in a transposed
    convolution not every output gets something from every tap."""
    return layer.bias is not None and not getattr(layer, "transposed", False)


def unobservable(layer: Layer, folding: Folding, scheme: int) -> str | None:
    """Why no moments are taken of what the encoder reads: under the taps of a transposed convolution it cannot be
    written as rows, and where there are very many columns their moment would not fit (and its roots take minutes)."""
    if not isinstance(layer, READABLE) and folding.taps(scheme)[0] > 1:
        return "a transposed kernel"
    columns = folding.shape(scheme, 1)[1]
    if not second_moment_fits(folding.groups, columns):
        return f"a second moment of {columns} inputs is too large"
    return None


def observer_of(layer: Layer, scheme: int) -> MomentsObserver:
    """An observer of the input of ``layer`` as the encoder of ``scheme`` reads it; :func:`unobservable` is ``None``."""
    folding = Folding.of(layer)
    nothing = torch.zeros(folding.groups, folding.outputs * folding.taps(scheme)[1], 1, dtype=torch.float64)
    empty = torch.zeros(folding.groups, 1, folding.inputs * folding.taps(scheme)[0], dtype=torch.float64)
    encoder = folding.pair(layer, scheme, nothing, empty, None)[0]
    assert isinstance(encoder, READABLE), "unobservable() is None, and there is one slice"
    return MomentsObserver(encoder)


def weighting_of(moments: Moments, layer: Layer, shrinkage: float) -> Tensor | None:
    """What the weight of ``layer`` is multiplied by: see :meth:`Moments.weighting`."""
    return moments.weighting(centred=takes_up_mean(layer), shrinkage=shrinkage)


def few_rows(moments: Moments, scheme: int) -> str:
    """What to say where there are fewer rows than inputs."""
    return (
        f"scheme {scheme}: {moments.count} rows of calibration data for {moments.mean.shape[1]} inputs, so their "
        "covariance is singular; see `shrinkage`"
    )


def given_by_mean(moments: Moments, folding: Folding, missing: Tensor) -> Tensor:
    """What the missing part of a weight gives on the mean input; borders aside.

    Args:
        moments: of the input.
        folding: of the layer.
        missing: the weight less the pair's, ``(groups * slices, rows, columns)``.

    Returns:
        For each output, ``(all outputs,)``.
    """
    mean = moments.mean.reshape(len(missing), -1, 1)
    given = (missing @ mean).reshape(folding.groups, -1, folding.outputs, missing.shape[1] // folding.outputs)
    return given.sum((1, 3)).flatten()
