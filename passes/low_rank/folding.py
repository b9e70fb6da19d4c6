"""A layer as matrices: how a kernel is folded, cut into slices of input channels, and put together from two factors.

A layer with weight ``W[f, c, k1, k2]`` is a matrix once its kernel dimensions are given to the rows or to the columns.
What lies along the columns is done by the *encoder*, what lies along the rows by the *decoder*. Four schemes
(Liebenwein et al. 2021, arXiv 2107.11442, section 2.2 and appendix A):

======  =======================  ============  ============
scheme  matrix                   encoder       decoder
======  =======================  ============  ============
0       ``f  x  c k1 k2``        ``k1 x k2``   ``1 x 1``
1       ``f k1  x  c k2``        ``1 x k2``    ``k1 x 1``
2       ``f k2  x  c k1``        ``k1 x 1``    ``1 x k2``
3       ``f k1 k2  x  c``        ``1 x 1``     ``k1 x k2``
======  =======================  ============  ============

With other than two kernel dimensions, scheme 1 gives the decoder the first of them and scheme 2 the others. Where a
kernel has size 1 in some of them, several schemes are the same; :meth:`Folding.distinct` keeps one of each.

The input channels are cut into ``k`` equal slices; each has a factorisation of rank ``j`` of its own,
``W_i = U_i V_i``: the encoder is a convolution with ``k`` groups and ``k j`` outputs, the decoder adds the slices up. A
layer of ``g`` groups is ``g`` layers beside each other, each cut into ``k`` slices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fxcompress.layers import Layer
from fxcompress.modules import GroupedLinear

__all__ = ["SCHEMES", "Choice", "Folding", "slices_of"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

SCHEMES = (0, 1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one layer is decomposed: scheme, number of slices ``k``, rank ``j`` of each."""

    scheme: int
    slices: int
    rank: int


@dataclasses.dataclass(frozen=True)
class Folding:
    """The sizes of a layer. Made by :meth:`of`.

    Attributes:
        groups: of the layer.
        outputs, inputs: channels of one group.
        kernel: sizes of the kernel; empty for a linear layer.
    """

    groups: int
    outputs: int
    inputs: int
    kernel: tuple[int, ...]

    @classmethod
    def of(cls, layer: Layer) -> Folding:
        """That of ``layer``."""
        if isinstance(layer, nn.Linear):
            return cls(1, layer.out_features, layer.in_features, ())
        groups = layer.groups
        return cls(groups, layer.out_channels // groups, layer.in_channels // groups, tuple(layer.kernel_size))

    @property
    def size(self) -> int:
        """Weights of the layer."""
        return self.groups * self.outputs * self.inputs * math.prod(self.kernel)

    # ------------------------------------------------------------------------------------------------- schemes
    def by_decoder(self, scheme: int) -> tuple[bool, ...]:
        """For each kernel dimension, whether the decoder does it."""
        rank = len(self.kernel)
        return tuple({0: False, 1: d == 0, 2: d > 0, 3: True}[scheme] for d in range(rank))

    def distinct(self, schemes: tuple[int, ...]) -> tuple[int, ...]:
        """One of each that are the same, in ascending order; 0 and 3 stand for 1 and 2 where these are such."""
        seen: dict[tuple[bool, ...], int] = {}
        for scheme in sorted(schemes, key=lambda s: (s in (1, 2), s)):
            seen.setdefault(
                tuple(d for d, k in zip(self.by_decoder(scheme), self.kernel, strict=True) if k > 1), scheme
            )
        return tuple(sorted(seen.values()))

    def taps(self, scheme: int) -> tuple[int, int]:
        """How many elements of the kernel the encoder and the decoder have."""
        decoder = math.prod(k for k, d in zip(self.kernel, self.by_decoder(scheme), strict=True) if d)
        return math.prod(self.kernel) // decoder, decoder

    def all_slices(self) -> list[int]:
        """Every ``k`` into which the input channels of a group can be cut."""
        return [k for k in range(1, self.inputs + 1) if self.inputs % k == 0]

    def shape(self, scheme: int, slices: int) -> tuple[int, int]:
        """Rows and columns of one slice."""
        encoder, decoder = self.taps(scheme)
        return self.outputs * decoder, self.inputs // slices * encoder

    def weights_per_rank(self, scheme: int, slices: int) -> tuple[int, int]:
        """Weights that the encoder and the decoder have for each unit of rank."""
        rows, columns = self.shape(scheme, slices)
        return self.groups * slices * columns, self.groups * slices * rows

    # ------------------------------------------------------------------------------------------------- matrices
    def matrices(self, layer: Layer, scheme: int, slices: int) -> Tensor:
        """The slices of the weight in float64 on the CPU, of shape ``(groups * slices, rows, columns)``."""
        weight = layer.weight.detach().to("cpu", torch.float64)
        if isinstance(layer, _TRANSPOSED):  # stored as (inputs, outputs of a group, *kernel)
            weight = weight.reshape(self.groups, self.inputs, self.outputs, *self.kernel).transpose(1, 2)
        weight = weight.reshape(self.groups, self.outputs, slices, self.inputs // slices, *self.kernel)
        rows, columns = self._kernel_order(scheme, first=4)
        weight = weight.permute(0, 2, 1, *rows, 3, *columns)
        return weight.reshape(self.groups * slices, *self.shape(scheme, slices))

    def weight_of(self, layer: Layer, scheme: int, matrices: Tensor) -> Tensor:
        """The weight, in the layout of ``layer``, whose slices are ``matrices``: the inverse of :meth:`matrices`."""
        slices = len(matrices) // self.groups
        rows, columns = (self._kernel_order(scheme, first=0)[i] for i in (0, 1))
        sizes = [self.kernel[d] for d in (*rows, *columns)]
        shape = (self.groups, slices, self.outputs, *sizes[: len(rows)], self.inputs // slices, *sizes[len(rows) :])
        inner = [3 + rows.index(d) if d in rows else 4 + len(rows) + columns.index(d) for d in range(len(self.kernel))]
        weight = matrices.reshape(shape).permute(0, 2, 1, 3 + len(rows), *inner)
        weight = weight.reshape(self.groups, self.outputs, self.inputs, *self.kernel)
        if isinstance(layer, _TRANSPOSED):
            weight = weight.transpose(1, 2)
        return weight.reshape(layer.weight.shape)

    def _kernel_order(self, scheme: int, first: int) -> tuple[list[int], list[int]]:
        """The kernel's dimensions, counted from ``first``: those of the rows, those of the columns."""
        by = self.by_decoder(scheme)
        return [first + d for d, mine in enumerate(by) if mine], [first + d for d, mine in enumerate(by) if not mine]

    def _kernel_of(self, scheme: int, decoder: bool) -> tuple[int, ...]:
        return tuple(k if d == decoder else 1 for k, d in zip(self.kernel, self.by_decoder(scheme), strict=True))

    def pair(
        self, layer: Layer, scheme: int, left: Tensor, right: Tensor, bias: Tensor | None
    ) -> tuple[nn.Module, nn.Module]:
        """The encoder and the decoder that stand for ``layer``.

        Args:
            layer: the layer.
            scheme: how it was folded.
            left: ``U``, of shape ``(groups * slices, rows, rank)``.
            right: ``V``, of shape ``(groups * slices, rank, columns)``.
            bias: of the decoder, of shape ``(outputs,)``, or none.
        """
        slices, rank = len(left) // self.groups, left.shape[2]
        if isinstance(layer, nn.Linear):
            pair: tuple[nn.Module, nn.Module] = self._linear(layer, slices, rank, bias is not None)
            weights = right.flatten(0, 1), left.transpose(0, 1).flatten(1)
        else:
            pair = self._convolutions(layer, scheme, slices, rank, bias is not None)
            weights = self._encoder_weight(pair[0], scheme, right), self._decoder_weight(pair[1], scheme, left)
        for module, weight in zip(pair, weights, strict=True):
            _fill(module, weight, layer.weight)
        if bias is not None:
            decoder_bias = pair[1].bias
            assert isinstance(decoder_bias, nn.Parameter), "the decoder was made with a bias"
            with torch.no_grad():
                decoder_bias.copy_(bias)
            decoder_bias.requires_grad_(layer.weight.requires_grad if layer.bias is None else layer.bias.requires_grad)
        for module in pair:
            module.train(layer.training)
        return pair

    def _linear(self, layer: nn.Linear, slices: int, rank: int, bias: bool) -> tuple[nn.Module, nn.Module]:
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        encoder: nn.Module
        if slices == 1:
            encoder = _made(nn.Linear, self.inputs, rank, bias=False, **like)
        else:
            encoder = _made(GroupedLinear, self.inputs, slices * rank, slices, **like)
        return encoder, _made(nn.Linear, slices * rank, self.outputs, bias=bias, **like)

    def _convolutions(
        self, layer: nn.modules.conv._ConvNd, scheme: int, slices: int, rank: int, bias: bool
    ) -> tuple[nn.Module, nn.Module]:
        width, slices_in_all = self.groups * slices * rank, self.groups * slices
        encoder = self._part(layer, scheme, False, (layer.in_channels, width, slices_in_all), False)
        return encoder, self._part(layer, scheme, True, (width, layer.out_channels, self.groups), bias)

    def _part(
        self, layer: nn.modules.conv._ConvNd, scheme: int, decoder: bool, sizes: tuple[int, int, int], bias: bool
    ) -> nn.Module:
        """The convolution that does its part of the kernel of ``layer``, and is of size 1 in the other dimensions.
        ``sizes`` are channels that come in, channels that go out, groups."""
        mine = [d == decoder for d in self.by_decoder(scheme)]

        def own(values: Sequence[int], neutral: int) -> tuple[int, ...]:
            return tuple(v if m else neutral for v, m in zip(values, mine, strict=True))

        into, out, groups = sizes
        options: dict[str, Any] = {
            "kernel_size": own(self.kernel, 1),
            "stride": own(layer.stride, 1),
            "dilation": own(layer.dilation, 1),
            "padding": layer.padding if isinstance(layer.padding, str) else own(layer.padding, 0),
            "padding_mode": layer.padding_mode,
            "groups": groups,
            "bias": bias,
            "device": layer.weight.device,
            "dtype": layer.weight.dtype,
        }
        kind: Any = type(layer)
        if isinstance(layer, _TRANSPOSED):
            if any(mine):
                options["output_padding"] = own(layer.output_padding, 0)
            else:  # a transposed convolution that moves nothing
                kind = _CONVOLUTIONS[len(self.kernel) - 1]
        return _made(kind, into, out, **options)

    def _encoder_weight(self, module: nn.Module, scheme: int, right: Tensor) -> Tensor:
        slices, rank = len(right) // self.groups, right.shape[1]
        kernel = self._kernel_of(scheme, decoder=False)
        weight = right.reshape(self.groups * slices, rank, self.inputs // slices, *kernel)
        if isinstance(module, _TRANSPOSED):
            weight = weight.transpose(1, 2)
        return weight.flatten(0, 1)

    def _decoder_weight(self, module: nn.Module, scheme: int, left: Tensor) -> Tensor:
        slices, rank = len(left) // self.groups, left.shape[2]
        kernel = self._kernel_of(scheme, decoder=True)
        weight = left.reshape(self.groups, slices, self.outputs, *kernel, rank)
        weight = weight.movedim(-1, 2).flatten(1, 2)  # (groups, slices * rank, outputs, *kernel)
        if not isinstance(module, _TRANSPOSED):
            weight = weight.transpose(1, 2)
        return weight.flatten(0, 1)


def slices_of(second: Tensor, slices: int) -> Tensor:
    """The blocks along the diagonal of ``(groups, n, n)``, of shape ``(groups * slices, n / slices, n / slices)``."""
    groups, size, _ = second.shape
    blocks = second.reshape(groups, slices, size // slices, slices, size // slices)
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)


def _made(kind: type[nn.Module], *args: Any, **options: Any) -> nn.Module:
    """A layer whose weights are not initialised, so that no random numbers are drawn."""
    made: nn.Module = skip_init(kind, *args, **options)  # type: ignore[no-untyped-call]
    return made


def _fill(module: Any, weight: Tensor, like: Tensor) -> None:
    """Give ``module`` its weight, in the memory format of ``like``."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
    if layout is not None and like.is_contiguous(memory_format=layout) and not like.is_contiguous():
        module.to(memory_format=layout)
    with torch.no_grad():
        module.weight.copy_(weight)
    module.weight.requires_grad_(like.requires_grad)
