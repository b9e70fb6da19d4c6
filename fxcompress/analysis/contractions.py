"""Multiply-accumulates (MACs) of every PyTorch function that contracts tensors, from the shapes of one call.

A MAC is one multiplication whose product is added up. A function has as many as its output has elements, times the
length of the contraction; products that are not added up (elementwise, outer) and additions alone are not counted,
which is also how ``torch.utils.flop_counter`` counts, at two FLOPs per MAC. Causal masks and sparsity save nothing
here, and the multiplications of a bias, a scale or a norm are left out.

:data:`RULES` maps a function's name without leading and trailing underscores to its formula, so that ``mm``,
``Tensor.mm``, ``addmm_``, ``a @ b`` and ``torch.ops.aten.mm.default`` need one line between them. A function that
differs from others of its name is there itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F

__all__ = ["RULES", "Rule", "einsum_macs"]

Args: TypeAlias = Sequence[Any]
Kwargs: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[[Args, Kwargs, Any], int]
"""From positional arguments, keyword arguments and result of a call to its MACs."""


def _argument(args: Args, kwargs: Kwargs, position: int, *names: str, default: Any = None) -> Any:
    if position < len(args):
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _product(position: int, *names: str) -> Rule:
    """out[..., i, k] = sum_j left[..., i, j] right[..., j, k], with ``left`` at ``position``."""

    def macs(args: Args, kwargs: Kwargs, out: Any) -> int:
        return int(out.numel() * _argument(args, kwargs, position, *names).shape[-1])

    return macs


def _addbmm(args: Args, kwargs: Kwargs, out: Any) -> int:
    return int(_argument(args, kwargs, 1, "batch1").numel() * out.shape[-1])


def _convolution(args: Args, kwargs: Kwargs, out: Any) -> int:
    """weight is (out channels, in channels / groups, *kernel): each output element sums over weight[0]."""
    weight = _argument(args, kwargs, 1, "weight")
    return int(out.numel() * math.prod(weight.shape[1:]))


def _transposed_convolution(args: Args, kwargs: Kwargs, out: Any) -> int:
    """weight is (in channels, out channels / groups, *kernel): each input element is spread over weight[0]. That
    includes what padding cuts off afterwards."""
    signal = _argument(args, kwargs, 0, "input", "self")
    return int(signal.numel() * math.prod(_argument(args, kwargs, 1, "weight").shape[1:]))


def _any_convolution(args: Args, kwargs: Kwargs, out: Any) -> int:
    transposed = _argument(args, kwargs, 6, "transposed", default=False)
    return (_transposed_convolution if transposed else _convolution)(args, kwargs, out)


def _conv_tbc(args: Args, kwargs: Kwargs, out: Any) -> int:
    """weight is (kernel, in channels, out channels)."""
    return int(out.numel() * math.prod(_argument(args, kwargs, 1, "weight").shape[:2]))


def _bilinear(args: Args, kwargs: Kwargs, out: Any) -> int:
    """out[n, o] = sum_ij x1[n, i] W[o, i, j] x2[n, j], over i first."""
    _, in1, in2 = _argument(args, kwargs, 2, "weight").shape
    return int(out.numel() * (in1 * in2 + in2))


def _attention(args: Args, kwargs: Kwargs, out: Any) -> int:
    """q (..., L, E), k (..., S, E), v (..., S, Ev): q k^T and the weighted sum of v. Grouped-query attention has fewer
    heads in k and v, not in what is computed."""
    if isinstance(out, tuple):  # the aten kernels also return the log-sum-exp and more
        out = out[0]
    query, key = _argument(args, kwargs, 0, "query"), _argument(args, kwargs, 1, "key")
    return int(math.prod(out.shape[:-1]) * key.shape[-2] * (query.shape[-1] + out.shape[-1]))


_ATTENTION_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def _multi_head_attention(args: Args, kwargs: Kwargs, out: Any) -> int:
    """query (L, N, E), key (S, N, Ek), value (S, N, Ev): four projections to and from width E around attention.
    N may be missing. ``bias_k`` and ``add_zero_attn`` each append one key."""
    call = _ATTENTION_SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    query, key, value = given["query"], given["key"], given["value"]
    width = query.shape[-1]
    length = given["static_k"].shape[1] if given["static_k"] is not None else key.shape[0]
    length += (given["bias_k"] is not None) + bool(given["add_zero_attn"])
    projections = 2 * query.numel() * width + key.numel() * width + value.numel() * width
    return int(projections + 2 * query.numel() * length)


def _packed(args: Args, kwargs: Kwargs, out: Any) -> int:
    """oneDNN's int8 kernels, whose packed weight has as many elements as the weight, and a scale for each output."""
    return int(out.numel() * (args[3].numel() // args[4].numel()))


def _recurrent(args: Args, kwargs: Kwargs, out: Any) -> int:
    """Every weight matrix, of all gates, layers, directions and the projection, once per time step and sample; the
    input's rows are just those, padded (T, N, features) or packed (steps, features)."""
    weights = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple))][-1]
    signal = _argument(args, kwargs, 0, "input", "data")
    matrices = sum(weight.numel() for weight in weights if weight.dim() == 2)
    return int(signal.numel() // signal.shape[-1] * matrices)


def _recurrent_cell(args: Args, kwargs: Kwargs, out: Any) -> int:
    signal = _argument(args, kwargs, 0, "input")
    from_input, from_state = _argument(args, kwargs, 2, "w_ih"), _argument(args, kwargs, 3, "w_hh")
    return int(signal.numel() // signal.shape[-1] * (from_input.numel() + from_state.numel()))


def _aten_einsum(args: Args, kwargs: Kwargs, out: Any) -> int:
    equation, operands = args
    return einsum_macs(equation, [tuple(operand.shape) for operand in operands], kwargs.get("path"))


def _einsum(args: Args, kwargs: Kwargs, out: Any) -> int:
    """``torch.einsum`` asks opt_einsum, if installed, for the order in which it contracts."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    path, backend = None, torch.backends.opt_einsum
    if len(operands) > 2 and backend.enabled and backend.is_available():
        pairs = backend.get_opt_einsum().contract_path(equation, *operands, optimize=backend.strategy)[0]
        path = [index for pair in pairs for index in pair]
    return einsum_macs(equation, [tuple(operand.shape) for operand in operands], path)


def einsum_macs(equation: str, shapes: Sequence[Sequence[int]], path: Sequence[int] | None = None) -> int:
    """MACs of ``torch.einsum``, which contracts two operands at a time.

    A pair costs the product of the sizes of all its labels. A label that is summed and is in one of the two only is
    summed before they are multiplied, so it costs nothing; a pair with no label to sum in common is an elementwise
    product, with no MACs.

    Args:
        equation: as for ``torch.einsum``, ellipses included.
        shapes: of the operands.
        path: operands of each pair, flat, as ``torch.ops.aten.einsum`` takes it: the two are taken out and their
            product goes to the end. Left to right if missing.
    """
    terms, kept = _parse(equation, shapes)
    macs = 0
    steps = list(zip(path[::2], path[1::2], strict=True)) if path is not None else None
    while len(terms) > 1:
        first, second = sorted(steps.pop(0)) if steps else (0, 1)
        right, left = terms.pop(second), terms.pop(first)
        sizes, staying = left | right, kept.union(*terms)
        product = {label: size for label, size in sizes.items() if label in staying}
        contracted = [
            size for label, size in sizes.items() if label in left and label in right and label not in staying
        ]
        if contracted:
            macs += math.prod(product.values()) * math.prod(contracted)
        terms.insert(0 if path is None else len(terms), product)
    return macs


def _parse(equation: str, shapes: Sequence[Sequence[int]]) -> tuple[list[dict[str, int]], set[str]]:
    """The size of each label of each operand, and the labels of the output. An ellipsis stands for labels ``.-1``,
    ``.-2``, ... counted from its right end, which is how it broadcasts. Where an operand has size 1 it has no label:
    it broadcasts, so ``torch.einsum`` takes no account of it when it decides what is still needed."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = []
    for term, shape in zip(inputs.split(","), shapes, strict=True):
        before, _, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)
        labels = [*before, *(f".{i}" for i in range(-hidden, 0)), *after]
        terms.append({label: size for label, size in zip(labels, shape, strict=True) if size != 1})
    if arrow:
        kept = {*output.replace("...", "")}
        spread = "..." in output
    else:
        letters = inputs.replace(",", "").replace("...", "")
        kept, spread = {letter for letter in letters if letters.count(letter) == 1}, True
    if spread:
        kept |= {label for labelled in terms for label in labelled if label.startswith(".")}
    return terms, kept


_LEFT = _product(0, "input", "self", "mat1")

RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(("mm", "bmm", "matmul", "linalg_matmul", "mv", "dot", "vdot", "inner", "linear"), _LEFT),
    **dict.fromkeys(("int_mm", "scaled_mm"), _LEFT),
    "rmatmul": _product(1, "other"),
    **dict.fromkeys(("weight_int8pack_mm", "weight_int4pack_mm_for_cpu"), _LEFT),
    **dict.fromkeys(("qconv2d_pointwise", "qlinear_pointwise"), _packed),
    "addmm": _product(1, "mat1"),
    "addmv": _product(1, "mat"),
    "baddbmm": _product(1, "batch1"),
    "addbmm": _addbmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    "convolution": _any_convolution,
    "conv_tbc": _conv_tbc,
    "bilinear": _bilinear,
    torch.einsum: _einsum,
    "einsum": _aten_einsum,
    "scaled_dot_product_attention": _attention,
    "scaled_dot_product_attention_math": _attention,
    "scaled_dot_product_flash_attention": _attention,
    "scaled_dot_product_flash_attention_for_cpu": _attention,
    "scaled_dot_product_efficient_attention": _attention,
    "scaled_dot_product_cudnn_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _recurrent_cell),
}
