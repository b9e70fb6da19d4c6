"""Layers as calls of the function that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxcompress.analysis.channels.maps import Labelled
from fxcompress.modules import GroupedLinear, ScaledDotProductAttention

__all__ = ["as_function", "keeps_shape", "moves"]

Parameter = Callable[[torch.Tensor], Labelled]


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function and what follows the module's own arguments in a call of it."""

    name: str
    rest: Callable[[Any, Parameter], tuple[Any, ...]] = lambda module, parameter: ()


def _of(parameter: Parameter, *tensors: torch.Tensor | None) -> tuple[Labelled | None, ...]:
    return tuple(None if t is None else parameter(t) for t in tensors)


def _convolution(module: Any, parameter: Parameter) -> tuple[Any, ...]:
    return (*_of(parameter, module.weight, module.bias), None, None, None, module.groups)


def _batch_norm(module: Any, parameter: Parameter) -> tuple[Any, ...]:
    training = module.training or module.running_mean is None
    return (*_of(parameter, module.running_mean, module.running_var, module.weight, module.bias), training)


def _instance_norm(module: Any, parameter: Parameter) -> tuple[Any, ...]:
    return _of(parameter, module.running_mean, module.running_var, module.weight, module.bias)


def _layer_norm(module: Any, parameter: Parameter) -> tuple[Any, ...]:
    return (module.normalized_shape, *_of(parameter, module.weight, getattr(module, "bias", None)))


def _group_norm(module: Any, parameter: Parameter) -> tuple[Any, ...]:
    return (module.num_groups, *_of(parameter, module.weight, module.bias))


_FUNCTIONS: dict[type[nn.Module], _Function] = {
    nn.Linear: _Function("linear", lambda m, p: _of(p, m.weight, m.bias)),
    GroupedLinear: _Function("grouped_linear", lambda m, p: (p(m.weight), None, None, None, None, m.groups)),
    nn.Embedding: _Function("embedding", lambda m, p: _of(p, m.weight)),
    nn.LayerNorm: _Function("layer_norm", _layer_norm),
    nn.RMSNorm: _Function("rms_norm", _layer_norm),
    nn.GroupNorm: _Function("group_norm", _group_norm),
    nn.LocalResponseNorm: _Function("local_response_norm"),
    nn.PReLU: _Function("prelu", lambda m, p: _of(p, m.weight)),
    nn.GLU: _Function("glu", lambda m, p: (m.dim,)),
    nn.Softmax: _Function("softmax", lambda m, p: (m.dim,)),
    nn.LogSoftmax: _Function("log_softmax", lambda m, p: (m.dim,)),
    nn.Softmax2d: _Function("softmax", lambda m, p: (-3,)),
    nn.Upsample: _Function("interpolate"),
    nn.UpsamplingBilinear2d: _Function("interpolate"),
    nn.UpsamplingNearest2d: _Function("interpolate"),
    nn.PixelShuffle: _Function("pixel_shuffle", lambda m, p: (m.upscale_factor,)),
    nn.ChannelShuffle: _Function("channel_shuffle", lambda m, p: (m.groups,)),
    ScaledDotProductAttention: _Function("scaled_dot_product_attention"),
}
for _kinds, _name, _rest in (
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv{}d", _convolution),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transpose{}d", _convolution),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), "batch_norm", _batch_norm),
    ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), "instance_norm", _instance_norm),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), "max_pool{}d", _Function("").rest),
    ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), "avg_pool{}d", _Function("").rest),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), "adaptive_avg_pool{}d", _Function("").rest),
    ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), "adaptive_max_pool{}d", _Function("").rest),
    ((nn.LPPool1d, nn.LPPool2d, nn.LPPool3d), "lp_pool{}d", _Function("").rest),
    ((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), "avg_pool{}d", _Function("").rest),  # places in space, all the same
    ((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), "pad", lambda m, p: (m.padding, "constant", m.value)),
    ((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), "avg_pool{}d", _Function("").rest),
    ((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), "avg_pool{}d", _Function("").rest),
):
    _FUNCTIONS |= {kind: _Function(_name.format(i), _rest) for i, kind in enumerate(_kinds, start=1)}

_ACTIVATIONS = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.GELU: "gelu", nn.SiLU: "silu", nn.Mish: "mish", nn.ELU: "elu",
    nn.SELU: "selu", nn.CELU: "celu", nn.Hardswish: "hardswish", nn.Hardsigmoid: "hardsigmoid",
    nn.Hardtanh: "hardtanh", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
    nn.LogSigmoid: "logsigmoid", nn.Softplus: "softplus", nn.Softsign: "softsign", nn.Tanhshrink: "tanhshrink",
    nn.Hardshrink: "hardshrink", nn.Softshrink: "softshrink", nn.Threshold: "threshold", nn.RReLU: "leaky_relu",
    nn.Identity: "identity", nn.Dropout: "dropout", nn.Dropout1d: "dropout1d", nn.Dropout2d: "dropout2d",
    nn.Dropout3d: "dropout3d", nn.AlphaDropout: "alpha_dropout", nn.FeatureAlphaDropout: "feature_alpha_dropout",
}  # fmt: skip
_FUNCTIONS |= {kind: _Function(name) for kind, name in _ACTIVATIONS.items()}

_KEEP_SHAPE = frozenset(_ACTIVATIONS) | {
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.PReLU, nn.Softmax, nn.LogSoftmax, nn.Softmax2d,
}  # fmt: skip

_MOVES = (nn.Flatten, nn.Unflatten, nn.PixelUnshuffle)


def as_function(module: nn.Module, parameter: Parameter) -> tuple[str, tuple[Any, ...]] | None:
    """The name of the function that ``module`` is, and what it is given after the module's own arguments; ``None`` if
    it is not known."""
    found = _FUNCTIONS.get(type(module))
    return None if found is None else (found.name, found.rest(module, parameter))


def moves(module: nn.Module) -> bool:
    """Whether ``module`` only moves elements about."""
    return type(module) in _MOVES


def keeps_shape(module: nn.Module) -> bool:
    """Whether what ``module`` gives has the shape of what it is given."""
    return type(module) in _KEEP_SHAPE
