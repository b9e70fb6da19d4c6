"""What each operation asks of the precision of its operands.

The lists start from those of ``torch.autocast`` and differ where the value is rounded only once either way. What is not
listed computes in float32.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import fx, nn

from fxcompress import matching
from fxcompress.analysis.channels.arithmetic import is_pointwise
from fxcompress.modules import GroupedLinear, ScaledDotProductAttention

__all__ = ["Kind", "attention_mask", "is_cast_to_float32", "kind_of", "operation"]


class Kind(enum.Enum):
    """How an operation treats precision."""

    LOW = "low"
    """A contraction: reads and gives the low dtype, whatever it adds up in."""

    FLOAT32 = "float32"
    """Reads and gives float32."""

    ONCE = "once"
    """Adds up in float32 inside, whatever it reads. On low operands it gives the low dtype where all of its readers
    want that, since the result is rounded once either way; else float32."""

    MOVES = "moves"
    """Rounding before it equals rounding after it (movement, relu, max pooling): a cast may come before or after."""

    FOLLOWS = "follows"
    """Gives what PyTorch makes of its operands' dtypes: low if all are low, float32 if one is."""


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_LOW_MODULES: frozenset[type[nn.Module]] = frozenset(
    {*_CONVOLUTIONS, *_RECURRENT, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.PReLU, GroupedLinear}
    | {ScaledDotProductAttention}
)
_MOVING_MODULES = frozenset(
    "ReLU Identity Flatten Unflatten PixelShuffle PixelUnshuffle ChannelShuffle Unfold Dropout Dropout1d Dropout2d "
    "Dropout3d MaxPool1d MaxPool2d MaxPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d".split()
)
_FOLLOWING_MODULES = frozenset(
    "ReLU6 LeakyReLU ELU CELU SELU GELU SiLU Mish Hardtanh Hardswish Hardsigmoid Sigmoid Tanh Softshrink Hardshrink "
    "Tanhshrink Softsign Threshold GLU RReLU AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d "
    "AdaptiveAvgPool3d Upsample UpsamplingNearest2d UpsamplingBilinear2d AlphaDropout FeatureAlphaDropout "
    "BatchNorm1d BatchNorm2d BatchNorm3d".split()
)

_LOW = frozenset(
    "linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm bmm mv dot "
    "inner addmm addbmm baddbmm addmv addr einsum tensordot chain_matmul multi_dot scaled_dot_product_attention "
    "embedding embedding_bag prelu".split()
)
_ONCE = frozenset(("softmax", "mean"))
_MOVES = frozenset(
    "view reshape flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis unsqueeze squeeze "
    "contiguous clone detach expand expand_as view_as reshape_as repeat repeat_interleave tile broadcast_to getitem "
    "select narrow "
    "split chunk unbind tensor_split split_with_sizes index_select gather take_along_dim roll flip rot90 pad diagonal "
    "pixel_shuffle pixel_unshuffle channel_shuffle unfold relu tril triu max_pool1d max_pool2d max_pool3d dropout "
    "dropout1d dropout2d dropout3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split()
)
_FOLLOWS = frozenset(
    "cat concat stack hstack vstack dstack interpolate upsample avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d batch_norm glu topk sort argsort argmax argmin max min amax amin scatter "
    "index_put index_copy index_fill masked_select masked_scatter setitem size dim numel stride is_contiguous "
    "is_floating_point getattr new_zeros new_ones new_full new_empty new_tensor subtract multiply divide "
    "meshgrid broadcast_tensors nonzero and or xor".split()
)
# Of the operations element by element: steep or of great range, so that rounding or overflow shows.
_FLOAT32 = frozenset(
    "exp exp2 expm1 log log2 log10 log1p pow rpow float_power square sqrt rsqrt reciprocal rdiv rtruediv sin cos tan "
    "sinc asin acos atan atan2 arcsin arccos arctan sinh cosh asinh acosh atanh erfinv erfc lgamma digamma polygamma "
    "mvlgamma i0 softplus logsigmoid log_sigmoid logit logaddexp logaddexp2 hypot xlogy special_xlogy igamma igammac "
    "heaviside bernoulli complex polar".split()
)
_MOVING_ATTRIBUTES = ("T", "mT", "H", "mH")


def operation(gm: fx.GraphModule, node: fx.Node) -> str:
    """The name of what ``node`` does, for the option ``keep`` and for the record: the class of its module, or the name
    of its function without a trailing underscore."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    name = matching.name_of_call(node)
    return (name.rstrip("_") or name) if name else str(getattr(node.target, "__name__", node.op))


def kind_of(gm: fx.GraphModule, node: fx.Node) -> Kind:
    """What ``node`` asks by itself, wherever it stands."""
    if node.op in ("placeholder", "get_attr"):
        return Kind.FOLLOWS
    if node.op == "call_module":
        return _kind_of_module(gm.get_submodule(str(node.target)))
    name = matching.name_of_call(node)
    if not name or any(node.kwargs.get(option) is not None for option in ("out", "max_norm")):
        return Kind.FLOAT32
    name = name.rstrip("_") or name
    if name == "getattr":
        return Kind.MOVES if node.args[1] in _MOVING_ATTRIBUTES else Kind.FOLLOWS
    if name in ("truediv", "div", "true_divide") and isinstance(node.args[0], (int, float)):
        return Kind.FLOAT32  # a reciprocal
    for kind, names in ((Kind.LOW, _LOW), (Kind.ONCE, _ONCE), (Kind.MOVES, _MOVES), (Kind.FLOAT32, _FLOAT32)):
        if name in names:
            return kind
    return Kind.FOLLOWS if name in _FOLLOWS or is_pointwise(name) else Kind.FLOAT32


def _kind_of_module(module: nn.Module) -> Kind:
    cls = type(module)
    if cls in _LOW_MODULES:  # an embedding with a largest norm changes its weight in place
        return Kind.LOW if getattr(module, "max_norm", None) is None else Kind.FLOAT32
    if not cls.__module__.startswith("torch.nn.modules.") or matching.override_of(module):
        return Kind.FLOAT32
    if cls is nn.Softmax:
        return Kind.ONCE
    if cls.__name__ in _MOVING_MODULES or cls.__module__ == "torch.nn.modules.padding":
        return Kind.MOVES
    return Kind.FOLLOWS if cls.__name__ in _FOLLOWING_MODULES else Kind.FLOAT32


def attention_mask(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The mask that is added to the scores, if ``node`` is an attention that is given one."""
    module = matching.called(gm, node, ScaledDotProductAttention)
    if module is None and not matching.is_call(node, ("scaled_dot_product_attention",)):
        return None
    mask = matching.argument(node, 3, "attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def is_cast_to_float32(node: fx.Node) -> bool:
    """Whether ``node`` is a cast that the model's code makes to float32, and nothing else."""
    if matching.is_call(node, ("float",)):
        return True
    if not matching.is_call(node, ("to", "type")) or not set(node.kwargs) <= {"dtype", "device"}:
        return False
    given: list[Any] = [*node.args[1:], *node.kwargs.values()]
    return torch.float32 in given and all(v is torch.float32 or not isinstance(v, bool) for v in given)
