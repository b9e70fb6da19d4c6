"""One rule per functional form: the module that stands for it, or ``None`` where nothing exact does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress import editing
from fxcompress.canonical.layers import Layers, TrainingUse, fill, linear
from fxcompress.modules import ScaledDotProductAttention

__all__ = ["RULES", "Rule", "arguments", "matmul"]

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
"""Path of the module, and what it is called with."""
Rule = Callable[[Layers, fx.Node, dict[str, Any], TrainingUse | None], Call | None]

_CONVOLUTIONS: dict[Any, type[nn.Module]] = {
    torch.conv1d: nn.Conv1d, torch.conv2d: nn.Conv2d, torch.conv3d: nn.Conv3d,
    F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d,
}  # fmt: skip
_TRANSPOSED: dict[Any, type[nn.Module]] = {
    F.conv_transpose1d: nn.ConvTranspose1d, F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d, torch.conv_transpose1d: nn.ConvTranspose1d,
    torch.conv_transpose2d: nn.ConvTranspose2d, torch.conv_transpose3d: nn.ConvTranspose3d,
}  # fmt: skip
_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout, F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}  # fmt: skip
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

# Builtins have no signature that Python can see.
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.addmm: ("input", "mat1", "mat2"),
    torch.matmul: ("input", "other"),
    torch.prelu: ("input", "weight"),
    F.scaled_dot_product_attention: (
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ),
}  # fmt: skip
_SIGNATURES |= dict.fromkeys(_CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
_SIGNATURES |= dict.fromkeys(
    _TRANSPOSED, ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
)


def arguments(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a ``call_function`` by name, without those left at their default; ``None`` if unknowable."""
    names = _SIGNATURES.get(node.target)
    if names is None:
        try:
            names = tuple(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
        except (ValueError, TypeError):  # a builtin that says nothing about itself
            return None
    if len(node.args) > len(names):
        return None
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _convolution(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    weight, bias = given["weight"], given.get("bias")
    tensor = layers.parameter(weight)
    if tensor is None or not layers.parameters(bias):
        return None
    transposed = node.target in _TRANSPOSED
    options = {k: given[k] for k in ("stride", "padding", "dilation", "groups", "output_padding") if k in given}
    if any(
        isinstance(v, fx.Node)
        for value in options.values()
        for v in (value if isinstance(value, (tuple, list)) else (value,))
    ):
        return None
    groups = options.get("groups", 1)
    rows, columns = tensor.shape[0], tensor.shape[1] * groups
    if transposed:
        rows, columns = tensor.shape[0], tensor.shape[1] * groups
    sizes = (rows, columns) if transposed else (columns, rows)
    kinds = _TRANSPOSED if transposed else _CONVOLUTIONS
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    module: nn.Module = kinds[node.target](
        *sizes, tuple(tensor.shape[2:]), bias=bias is not None, device="meta", dtype=tensor.dtype, **options
    )
    fill(module, tensor, layers.gm.training, weight=tensor, bias=layers.parameter(bias))
    path = layers.put("conv", {"weight": weight, "bias": bias}, module, tuple(sorted(options.items())))
    return path, (given["input"],), {}


def _linear(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    weight, bias = given["weight"], given.get("bias")
    tensor = layers.parameter(weight)
    if tensor is None or tensor.dim() != 2 or not layers.parameters(bias):
        return None
    path = linear(layers, weight, bias, tensor)
    return path, (given["input"],), {}


def _transposed_linear(layers: Layers, weight: Any, bias: Any) -> str | None:
    """The path of an ``nn.Linear`` for ``x @ W + b`` with W (in, out). The new weight is W seen transposed, so that the
    same kernel runs on the same memory. Not if W is used elsewhere too: the tie would be lost."""
    tensor = layers.parameter(weight)
    if tensor is None or tensor.dim() != 2 or not layers.parameters(bias) or not layers.read_once(weight):
        return None
    view = nn.Parameter(tensor.detach().t(), requires_grad=tensor.requires_grad)
    module = nn.Linear(tensor.shape[0], tensor.shape[1], bias=bias is not None, device="meta", dtype=tensor.dtype)
    fill(module, tensor, layers.gm.training, weight=view, bias=layers.parameter(bias))
    return layers.put("linear", {"transposed": weight, "bias": bias}, module)


def _addmm(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or "out" in given or len(given) < 3:
        return None
    bias = layers.parameter(given["input"])
    if bias is None or bias.dim() != 1:
        return None
    path = _transposed_linear(layers, given["mat2"], given["input"])
    return None if path is None else (path, (given["mat1"],), {})


def matmul(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    x, other = given["input"], given["other"]
    if not isinstance(x, fx.Node) or not isinstance(other, fx.Node) or "out" in given:
        return None
    seen = _transpose_of(other)
    if seen is not None and layers.parameter(seen) is not None:
        return _linear(layers, node, {"input": x, "weight": seen}, use)
    if layers.parameter(x) is not None:
        return None
    path = _transposed_linear(layers, other, None)
    return None if path is None else (path, (x,), {})


def _transpose_of(node: fx.Node) -> fx.Node | None:
    """The node that ``node`` is the 2-D transpose of."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.op == "call_method" and node.target == "t":
        return source
    if node.op == "call_method" and node.target == "transpose" and set(node.args[1:]) in ({0, 1}, {-1, -2}):
        return source
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("T", "mT"):
        return source
    return source if node.op == "call_function" and node.target is torch.t else None


def _batch_norm(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    mean, var, weight, bias = (given.get(k) for k in ("running_mean", "running_var", "weight", "bias"))
    if use is None or not use.follows or mean is None or var is None or use.rank not in _BATCH_NORMS:
        return None
    if not layers.parameters(weight, bias) or (weight is None) != (bias is None):
        return None
    tensor = layers.tensor(mean)
    if mean.op != "get_attr" or var.op != "get_attr" or tensor is None:
        return None
    momentum, eps = given.get("momentum", 0.1), given.get("eps", 1e-5)
    if isinstance(momentum, fx.Node) or isinstance(eps, fx.Node):
        return None
    module: nn.Module = _BATCH_NORMS[use.rank](
        tensor.numel(), eps=eps, momentum=momentum, affine=weight is not None, device="meta", dtype=tensor.dtype
    )
    tensors = {"running_mean": tensor, "running_var": layers.tensor(var)}
    if weight is not None:
        tensors |= {"weight": layers.parameter(weight), "bias": layers.parameter(bias)}
    fill(module, tensor, use.training, **tensors)
    sources = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    path = layers.put("batch_norm", sources, module, (eps, momentum))
    _count_batches_once(layers, path, node)
    return path, (given["input"],), {}


def _count_batches_once(layers: Layers, path: str, node: fx.Node) -> None:
    """``nn.BatchNorm`` counts batches itself: the same counter is adopted, and an increment in the graph dropped."""
    name = f"{path}.num_batches_tracked"
    for other in list(node.graph.nodes):
        if other.op == "call_method" and other.target == "add_" and not other.users:
            source = other.args[0]
            if isinstance(source, fx.Node) and source.op == "get_attr" and source.target == name:
                node.graph.erase_node(other)


def _layer_norm(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    weight, bias = given.get("weight"), given.get("bias")
    tensor = layers.parameter(weight)
    if tensor is None or not layers.parameters(bias):
        return None
    eps = given.get("eps", 1e-5)
    module = nn.LayerNorm(tuple(tensor.shape), eps=eps, bias=bias is not None, device="meta", dtype=tensor.dtype)
    fill(module, tensor, layers.gm.training, weight=tensor, bias=layers.parameter(bias))
    return layers.put("layer_norm", {"weight": weight, "bias": bias}, module, eps), (given["input"],), {}


def _rms_norm(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    tensor = layers.parameter(given.get("weight"))
    if tensor is None:
        return None
    eps = given.get("eps")
    module = nn.RMSNorm(tuple(tensor.shape), eps=eps, device="meta", dtype=tensor.dtype)
    fill(module, tensor, layers.gm.training, weight=tensor)
    return layers.put("rms_norm", {"weight": given["weight"]}, module, eps), (given["input"],), {}


def _group_norm(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    weight, bias = given.get("weight"), given.get("bias")
    tensor = layers.parameter(weight)
    if tensor is None or bias is None or not layers.parameters(bias):
        return None
    groups, eps = given["num_groups"], given.get("eps", 1e-5)
    module = nn.GroupNorm(groups, tensor.numel(), eps=eps, device="meta", dtype=tensor.dtype)
    fill(module, tensor, layers.gm.training, weight=tensor, bias=layers.parameter(bias))
    return layers.put("group_norm", {"weight": weight, "bias": bias}, module, (groups, eps)), (given["input"],), {}


def _embedding(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    tensor = layers.parameter(given["weight"])
    if tensor is None or given.get("max_norm") is not None or given.get("sparse") or given.get("scale_grad_by_freq"):
        return None
    padding = given.get("padding_idx")
    rows, columns = tensor.shape
    module = nn.Embedding(rows, columns, padding_idx=padding, device="meta", dtype=tensor.dtype)
    fill(module, tensor, layers.gm.training, weight=tensor)
    return layers.put("embedding", {"weight": given["weight"]}, module, padding), (given["input"],), {}


def _prelu(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    tensor = layers.parameter(given["weight"])
    if tensor is None or tensor.dim() != 1:
        return None
    module = nn.PReLU(tensor.numel(), device="meta", dtype=tensor.dtype)
    fill(module, tensor, layers.gm.training, weight=tensor)
    return layers.put("prelu", {"weight": given["weight"]}, module), (given["input"],), {}


def _dropout(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    if use is None or not use.follows:
        return None
    inplace = bool(given.get("inplace", False))
    module = _DROPOUTS[node.target](p=use.probability, inplace=inplace)
    module.train(use.training)
    return editing.add_module(layers.gm, f"dropouts.{node.name}", module), (given["input"],), {}


def _attention(layers: Layers, node: fx.Node, given: dict[str, Any], use: TrainingUse | None) -> Call | None:
    if use is None or not use.follows or use.probability == 0.0:
        return None
    module = ScaledDotProductAttention(use.probability)
    module.train(use.training)
    given.pop("dropout_p", None)
    query, key, value = (given.pop(k) for k in ("query", "key", "value"))
    return editing.add_module(layers.gm, f"attentions.{node.name}", module), (query, key, value), given


RULES: dict[Any, Rule] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: matmul,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.rms_norm: _rms_norm,
    F.embedding: _embedding,
    F.prelu: _prelu,
    torch.prelu: _prelu,
    F.scaled_dot_product_attention: _attention,
}
RULES |= dict.fromkeys((*_CONVOLUTIONS, *_TRANSPOSED), _convolution)
RULES |= dict.fromkeys(_DROPOUTS, _dropout)
