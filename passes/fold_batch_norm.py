"""Fold batch normalisation into the convolution or linear layer next to it.

In evaluation mode a batch norm is an affine map of every channel (Ioffe & Szegedy 2015, arXiv 1502.03167)::

    BN(x) = a x + s      with   a = gamma / sqrt(sigma2 + eps)   and   s = beta - a mu

``gamma``, ``beta`` are its weight and bias (1 and 0 if not affine), ``mu``, ``sigma2`` its running mean and variance. A
linear map ``y = W x + b`` (a convolution is one) takes it in on either side:

* after: ``BN(W x + b) = (a W) x + (a b + s)``, ``a`` running over W's output channels (Jacob et al. 2018, arXiv
  1712.05877, section 3.2, equation 14);
* before: ``W BN(x) + b = (W a) x + (b + W s)``, ``a`` running over W's input channels; ``W s`` sums over kernel taps.

The second holds only if every output position sees all kernel taps, because zeros padded after the batch norm are not
shifted by it: no padding, or padding made of the input's own values, or ``s = 0``; for a transposed convolution, a
stride of 1 with its uneven border cropped (a kernel of 1, say), or ``s = 0``. Both are equalities over the reals
(guarantee EXACT). The folded numbers are worked out in float64 and then rounded once to the weight's dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxcompress import editing, matching
from fxcompress.layers import as_stored, by_group, channel_counts
from fxcompress.pass_base import Guarantee, Pass, PassContext, Refusal, Site, Stage

__all__ = ["FoldBatchNorm"]

_Direction = Literal["after", "before"]
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_Layer = _Conv | _Transposed | nn.Linear
_LAYERS = (*_Conv.__args__, *_Transposed.__args__, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class _Fold:
    """``layer`` takes in ``norm`` at each of ``pairs``, which are (call of the layer, call of the batch norm)."""

    layer: _Layer
    norm: _BatchNorm
    direction: _Direction
    pairs: tuple[tuple[fx.Node, fx.Node], ...]


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold every batch norm that runs on fixed statistics into a convolution or linear layer before or after it.

    The layer keeps its path, its parameters' names, dtypes and ``requires_grad``; a bias that was not there becomes
    ``<path>.bias``. A layer that several calls share is folded once if every call meets the same batch norm, and
    refused if not: a copy of the weights for each call would make the model larger.

    Detail of a site: ``{"conv": path, "batch_norm": path, "direction": "after" | "before", "calls": number}``.
    """

    name: ClassVar[str] = "fold-batch-norm"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    repeat: ClassVar[bool] = True
    before: ClassVar[frozenset[str]] = frozenset({"fake-quantize", "quantize", "lower-int8"})
    why_after: ClassVar[str] = "a batch norm that is folded has no statistics left"
    stage: ClassVar[Stage] = Stage.FOLD

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """Batch norms in graph order. A layer takes in one a round; what waits for it is neither site nor refusal."""
        survey = _Survey(context)
        for node in context.gm.graph.nodes:
            if matching.is_call(node, ("batch_norm",)):
                yield Refusal(node, _why_not_a_function(node))
            elif isinstance(context.module(node), _BatchNorm) and node not in survey.settled:
                found = survey.examine(node)
                if isinstance(found, str):
                    yield Refusal(node, found)
                elif found is not None:
                    yield survey.settle(node, found)

    def rewrite(self, site: Site) -> None:
        """Give the layer folded parameters (new ones; the old tensors are left alone) and drop the batch norm calls."""
        fold: _Fold = site.data
        _install(fold.layer, *_folded(fold))
        for layer_node, norm_node in fold.pairs:
            if fold.direction == "after":
                editing.replace(norm_node, layer_node)
                continue
            source = matching.tensor_input(norm_node)
            assert source is not None, "sites() admits only batch norms of one input"
            layer_node.replace_input_with(norm_node, source)
            # The layer takes the batch norm's place: an in-place change of `source` may stand between the two.
            norm_node.prepend(layer_node)
            editing.erase(norm_node)


def _why_not_a_function(node: fx.Node) -> str:
    if matching.argument(node, 1, "running_mean") is None:
        return "it keeps no running statistics (as in the standardisation of weights), so it is no fixed map"
    return "batch norm called as a function; tracing with example inputs makes it a module"


# --- the arithmetic, all in float64 ---


def _double(tensor: Tensor | None, otherwise: float, like: Tensor) -> Tensor:
    # on the CPU, since not every accelerator has float64
    if tensor is None:
        return torch.full(like.shape, otherwise, dtype=torch.float64)
    return tensor.detach().to("cpu", torch.float64)


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """``a`` and ``s`` of the module docstring, each ``(channels,)``."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    like = norm.running_mean
    gamma, beta = _double(norm.weight, 1.0, like), _double(norm.bias, 0.0, like)
    mu, sigma2 = _double(norm.running_mean, 0.0, like), _double(norm.running_var, 1.0, like)
    a = gamma / torch.sqrt(sigma2 + norm.eps)
    return a, beta - a * mu


def _folded(fold: _Fold) -> tuple[Tensor, Tensor | None]:
    """The layer's new weight, in its own layout, and bias ``(outputs,)``; no bias if there was none and needs none."""
    layer = fold.layer
    groups, outputs, _ = channel_counts(layer)
    a, s = _affine(fold.norm)
    w = by_group(layer, _double(layer.weight, 0.0, layer.weight))
    b = _double(layer.bias, 0.0, layer.weight.new_empty(outputs))
    if fold.direction == "after":
        return as_stored(layer, w * a.view(groups, -1, 1, 1)), a * b + s
    weight = as_stored(layer, w * a.view(groups, 1, -1, 1))
    if layer.bias is None and not s.any():
        return weight, None
    return weight, b + (w.sum(-1) * s.view(groups, 1, -1)).sum(-1).flatten()


def _install(layer: _Layer, weight: Tensor, bias: Tensor | None) -> None:
    old = layer.weight
    if bias is not None:
        asks = old.requires_grad if layer.bias is None else layer.bias.requires_grad
        layer.bias = nn.Parameter(bias.to(old.device, old.dtype), requires_grad=asks)
    # empty_like keeps the memory format, such as channels_last
    layer.weight = nn.Parameter(torch.empty_like(old.detach()).copy_(weight), requires_grad=old.requires_grad)


# --- the conditions ---


class _Survey:
    """One look at the whole graph, and what this round has settled so far."""

    def __init__(self, context: PassContext) -> None:
        self.context = context
        self.gm = context.gm
        self.settled: set[fx.Node] = set()
        self.taken: set[nn.Module] = set()

    def settle(self, node: fx.Node, fold: _Fold) -> Site:
        self.taken.add(fold.layer)
        self.settled.update(norm_node for _, norm_node in fold.pairs)
        detail = {
            "conv": str(fold.pairs[0][0].target),
            "batch_norm": str(node.target),
            "direction": fold.direction,
            "calls": len(fold.pairs),
        }
        return Site(node, fold, detail)

    def examine(self, node: fx.Node) -> _Fold | str | None:
        """How to fold the batch norm at ``node``, or why not, or ``None``: wait for the layer's next round."""
        norm = self.gm.get_submodule(str(node.target))
        assert isinstance(norm, _BatchNorm)
        source = matching.tensor_input(node)
        if source is None or len(node.args) + len(node.kwargs) != 1:
            return "it is not called with exactly one tensor"
        if reason := _norm_obstacle(norm):
            return reason
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if {matching.called(self.gm, n, *_LAYERS) for n in (source, reader)} & self.taken:
            return None
        after = self._try(node, norm, source, "after")
        if isinstance(after, _Fold):
            return after
        if reader is None:
            return f"{after}; its output is read by {len(node.users)} nodes"
        before = self._try(node, norm, reader, "before")
        return before if isinstance(before, _Fold) else f"{after}; {before}"

    def _try(self, node: fx.Node, norm: _BatchNorm, partner: fx.Node, direction: _Direction) -> _Fold | str:
        where = f"it {'follows' if direction == 'after' else 'precedes'} {matching.describe(self.gm, partner)}"
        layer = self.context.module(partner)
        if not isinstance(layer, _LAYERS):
            return where
        if type(layer) not in _LAYERS and matching.override_of(layer) is None:
            return f"{where}, a subclass that may compute something else"
        if reason := self._layer_obstacle(layer):
            return f"{where}, which {reason}"
        fold = _Fold(layer, norm, direction, tuple(self._pairs(layer, norm, direction)))
        reason = (
            self._call_obstacle(fold, partner)
            or self._shape_obstacle(fold)
            or (_border_obstacle(fold) if direction == "before" else None)
            or _range_obstacle(fold)
        )
        return f"{where}, but {reason}" if reason else fold

    def _pairs(self, layer: _Layer, norm: _BatchNorm, direction: _Direction) -> Iterator[tuple[fx.Node, fx.Node]]:
        """The calls of ``layer`` that have ``norm``, and nothing else, on the side in question."""
        for call in self.context.aliasing.calls(layer):
            norm_node = next(iter(call.users), None) if direction == "after" else matching.tensor_input(call)
            if norm_node is None or self.context.module(norm_node) is not norm:
                continue
            first = call if direction == "after" else norm_node
            if len(first.users) == 1 and len(norm_node.args) + len(norm_node.kwargs) == 1:
                yield call, norm_node

    def _call_obstacle(self, fold: _Fold, partner: fx.Node) -> str | None:
        calls = self.context.aliasing.calls(fold.layer)
        if len(fold.pairs) == len(calls):
            extra = fold.direction == "before" and any(len(n.args) + len(n.kwargs) != 1 for n in calls)
            return "that layer is called with further arguments" if extra else None
        if len(calls) > 1:
            met = "followed" if fold.direction == "after" else "preceded"
            return (
                f"that layer is shared by {len(calls)} calls of which {len(fold.pairs)} are {met} by this batch norm "
                "alone; folding would need a copy of the weights for each call"
            )
        return f"the output of that layer has {len(partner.users)} readers"

    def _layer_obstacle(self, layer: _Layer) -> str | None:
        if reason := matching.override_of(layer):
            return reason
        for name, parameter in (("weight", layer.weight), ("bias", layer.bias)):
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided:
                return f"has a {name} of type {type(parameter).__name__} and layout {parameter.layout}"
            if parameter.dtype not in _DTYPES:
                return f"has a {name} of dtype {parameter.dtype}; only real floating point of 16 to 64 bits is folded"
            if elsewhere := self._elsewhere(layer, name, parameter):
                return f"has a {name} that is tied or read elsewhere ({', '.join(elsewhere)})"
        return None

    def _elsewhere(self, layer: _Layer, name: str, parameter: Tensor) -> list[str]:
        aliasing = self.context.aliasing
        own = {f"{path}.{name}" for path in aliasing.paths(layer)}
        names = [other for other in aliasing.names(parameter) if other not in own]
        return names + [f"node {n}" for n in aliasing.readers(parameter) if n not in aliasing.calls(layer)]

    def _shape_obstacle(self, fold: _Fold) -> str | None:
        """A batch norm normalises dimension 1; that must be the dimension of the layer's channels."""
        _, outputs, inputs = channel_counts(fold.layer)
        channels, features = (outputs if fold.direction == "after" else inputs), fold.norm.num_features
        if channels != features:
            return f"that layer has {channels} channels on this side and the batch norm {features}"
        wanted = fold.layer.weight.dim()
        for _, norm_node in fold.pairs:
            rank = self._rank(norm_node, fold.norm)
            if rank is None:
                return f"a {type(fold.norm).__name__} takes inputs of several ranks; give example inputs to tell them"
            if rank != wanted:
                return f"the batch norm sees {rank} dimensions, where its dimension 1 is not that layer's channels"
        return None

    def _rank(self, node: fx.Node, norm: _BatchNorm) -> int | None:
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):  # these insist on one rank
            return 4 if isinstance(norm, nn.BatchNorm2d) else 5
        return None if self.context.example is None else len(self.context.shapes.shape(node))


def _norm_obstacle(norm: _BatchNorm) -> str | None:
    """Why this batch norm cannot be folded into anything."""
    if type(norm) not in _NORMS:
        return f"{type(norm).__name__} is a subclass of batch norm that may compute something else"
    if reason := matching.override_of(norm):
        return f"it {reason}"
    if norm.training:
        return "it is in training mode, where it normalises by the statistics of the batch; call model.eval() first"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics (track_running_stats=False), so it is no fixed map"
    if norm.running_mean.dtype not in _DTYPES:
        return f"its statistics have dtype {norm.running_mean.dtype}"
    for name, value in (*norm.named_parameters(), *norm.named_buffers()):
        if not bool(torch.isfinite(value).all()):
            return f"its {name} holds NaN or infinity"
    if bool((_double(norm.running_var, 1.0, norm.running_var) + norm.eps <= 0).any()):
        return "its running_var + eps is not positive everywhere"
    return None


def _border_obstacle(fold: _Fold) -> str | None:
    """Folding on the input side needs every output position to see all kernel taps, or a shift of zero."""
    layer = fold.layer
    if isinstance(layer, nn.Linear) or not bool(_affine(fold.norm)[1].any()):
        return None
    if isinstance(layer, _Transposed):
        reach = tuple(d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        cropped = all(crop >= r for crop, r in zip(layer.padding, reach, strict=True))  # type: ignore[operator]
        even = cropped and set(layer.stride) == {1} and not any(layer.output_padding)
        return None if even else "that transposed layer reaches its outputs unevenly and the shift is not zero"
    if layer.padding_mode != "zeros" or not any(_padding(layer)):
        return None
    return "that layer pads with zeros, which the batch norm's shift (not zero here) does not reach"


def _padding(layer: _Conv) -> tuple[int, ...]:
    if layer.padding == "same":
        return tuple(d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return () if isinstance(layer.padding, str) else layer.padding


def _range_obstacle(fold: _Fold) -> str | None:
    dtype = fold.layer.weight.dtype
    if dtype != torch.float16:  # the others reach far enough that the unfolded model would overflow as well
        return None
    before: list[Any] = [fold.layer.weight, fold.layer.bias]
    for old, new in zip(before, _folded(fold), strict=True):
        finite = old is None or bool(torch.isfinite(old).all())
        if new is not None and finite and not bool(torch.isfinite(new.to(dtype)).all()):
            return "the folded parameters overflow float16"
    return None
