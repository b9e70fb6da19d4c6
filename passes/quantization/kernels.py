"""Layers on integers: oneDNN's int8 kernels behind modules, and the few operations between them.

A module holds its weight as the reference graph does (``weight`` in int8, ``weight_scale``, ``bias``), so that either's
``state_dict`` fits the other. The form that the kernel wants is made at the first call and again whenever the weight
has changed; it is in no ``state_dict``, copy or pickle. While ``torch.compile`` looks at it a module is what it stands
for, written in quantize and dequantize operators, which Inductor has kernels of its own for.

oneDNN has wrong kernels for some sizes on some processors (``docs/architecture.md``), so each is tried on random
integers before it is used; where it is wrong the layer is computed as in the reference graph.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.vocabulary import PerTensor, dequantize, dequantize_channels, quantize
from fxcompress.storable import storable

__all__ = [
    "WRONG_KERNEL",
    "Int8Conv",
    "Int8Layer",
    "Int8Linear",
    "IntegerLayer",
    "PostOp",
    "is_right",
    "max_pool2d",
    "to_uint8",
    "unavailable",
]

_ONEDNN: Any = torch.ops.onednn
_WEIGHTS = Grid.of_weights(8)
_ROUNDING = 2e-5
"""What float32 may make of a sum, relative to the sizes of its terms added up."""
_FEW_TAPS = 5


def unavailable() -> str | None:
    """Why there are no int8 kernels on this machine; ``None`` if there are."""
    if not all(hasattr(_ONEDNN, name) for name in ("qconv2d_pointwise", "qlinear_pointwise", "qconv_prepack")):
        return "this build of PyTorch has no int8 kernels of oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "this processor has no VNNI instructions, without which int8 kernels are not faster"
    return None


@storable
@dataclasses.dataclass(frozen=True)
class PostOp:
    """What a kernel does to its result before it rounds it: the name, numbers and variant that oneDNN knows it by."""

    name: str = "none"
    numbers: tuple[float, ...] = ()
    variant: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        """The same on real numbers."""
        if self.name == "none":
            return x
        if self.name == "hardtanh":
            return x.clamp(*self.numbers)
        if self.name == "leaky_relu":
            return F.leaky_relu(x, self.numbers[0])
        if self.name == "gelu":
            return F.gelu(x, approximate=self.variant)
        plain: dict[str, Any] = {"relu": F.relu, "hardswish": F.hardswish, "swish": F.silu, "tanh": torch.tanh}
        result: Tensor = plain[self.name](x)
        return result


class IntegerLayer(nn.Module):
    """A layer of integer weights: what the reference graph holds of it, and what a kernel wants, made from that when it
    is first needed and whenever that has changed.

    Args:
        holder: what holds ``weight``, ``weight_scale``, ``weight_zero_point`` and ``bias`` in the reference graph.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, holder: nn.Module) -> None:
        super().__init__()
        self.register_parameter("weight", holder.weight)  # type: ignore[arg-type]
        self.register_parameter("bias", getattr(holder, "bias", None))
        self.register_buffer("weight_scale", holder.weight_scale)  # type: ignore[arg-type]
        self.register_buffer("weight_zero_point", holder.weight_zero_point)  # type: ignore[arg-type]
        self._packed: Any = None
        self._packed_from: tuple[int, ...] | None = None
        self.train(holder.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_packed_from": None}

    def reals(self) -> Tensor:
        """The weight in real numbers, with a scale for each output channel."""
        return dequantize_channels(self.weight, self.weight_scale, self.weight_zero_point, 0, _WEIGHTS)

    def _packed_for(self, x: Tensor) -> Any:
        """What :meth:`_pack` makes, made anew if the weight or its scale has changed."""
        weight, scale = self.weight, self.weight_scale
        origin = (weight._version, weight.data_ptr(), scale._version, scale.data_ptr())
        if self._packed is None or origin != self._packed_from:
            self._packed, self._packed_from = self._pack(x), origin
        return self._packed

    def _dense(self) -> Tensor:
        """The weight, row after row: packing ignores strides, and would take a transposed one for another."""
        return self.weight.detach().contiguous()

    def _pack(self, x: Tensor) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must say how its weight is packed")


class Int8Layer(IntegerLayer):
    """A layer on integers; see the module. Use :class:`Int8Conv` or :class:`Int8Linear`.

    Args:
        holder: see :class:`IntegerLayer`.
        given: the scale of the input.
        made: that of the output; ``None`` for real numbers.
        post: what follows.
        adds: whether another tensor is added before that.
        other: the scale of that; ``None`` if it is real.
    """

    def __init__(
        self,
        holder: nn.Module,
        given: PerTensor,
        made: PerTensor | None,
        post: PostOp,
        adds: bool = False,
        other: PerTensor | None = None,
    ) -> None:
        super().__init__(holder)
        self.given, self.made, self.post, self.adds, self.other = given, made, post, adds, other
        self._tried: dict[tuple[int, ...], bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tried": {}}

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The layer, the addition of ``other`` and what follows. A convolution that adds integers to integers writes
        its result to the memory of ``other``."""
        if torch.compiler.is_compiling() or not self._has_kernel(x, other):
            return self.reference(x, other)
        return self.kernel(x, other, self.given)

    def _has_kernel(self, x: Tensor, other: Tensor | None) -> bool:
        """Whether the kernel for such inputs is right, which is tried once."""
        shape = tuple(x.shape)
        found = self._tried.get(shape)
        if found is None:
            if type(x) is not Tensor or not x.numel():
                return True  # nothing that could be tried
            if self._tried and not self.has_doubtful_kernels:
                found = next(iter(self._tried.values()))
            else:
                found = is_right(self, x, other)
                if not found:
                    text = f"{self} is computed in real numbers for inputs of shape {shape}: {WRONG_KERNEL}"
                    warnings.warn(text, stacklevel=2)
            self._tried[shape] = found
        return found

    @property
    def has_doubtful_kernels(self) -> bool:
        """Whether some kernels for such layers are wrong, by the shape of the input."""
        return False

    def reference(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """What :meth:`forward` stands for, in real numbers."""
        y = self._on_reals(dequantize(x, self.given), self.reals())
        if other is not None:
            y = y + (other if self.other is None else dequantize(other, self.other))
        y = self.post(y)
        return y if self.made is None else quantize(y, self.made)

    def _inputs(self, x: Tensor, given: PerTensor) -> tuple[Any, ...]:
        return x, given.scale, given.zero_point, self._packed_for(x), self.weight_scale, self.weight_zero_point

    @property
    def _output(self) -> tuple[float, int, torch.dtype]:
        return (1.0, 0, torch.float32) if self.made is None else (self.made.scale, self.made.zero_point, torch.uint8)

    @property
    def _added(self) -> tuple[float, int]:
        return (1.0, 0) if self.other is None else (self.other.scale, self.other.zero_point)

    def kernel(self, x: Tensor, other: Tensor | None, given: PerTensor) -> Tensor:
        """What oneDNN computes in place of :meth:`reference`, from an input on the scale ``given``."""
        raise NotImplementedError(f"{type(self).__name__} must call a kernel")

    def _on_reals(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say what it does with real numbers")

    def extra_repr(self) -> str:
        parts = [str(tuple(self.weight.shape)), f"post={self.post.name}"]
        return ", ".join(parts + ["adds"] * self.adds + ["real output"] * (self.made is None))


@storable
class Int8Conv(Int8Layer):
    """A convolution of two dimensions on integers.

    Args:
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``, as lists.
        options: of :class:`Int8Layer`.
    """

    def __init__(
        self, *args: Any, stride: list[int], padding: list[int], dilation: list[int], groups: int, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._sizes = (stride, padding, dilation, groups)

    @property
    def has_doubtful_kernels(self) -> bool:
        """See :class:`Int8Layer`: groups of several channels, and large windows."""
        outputs, inputs, *window = self.weight.shape
        groups = self._sizes[-1]
        return (groups > 1 and (outputs, inputs) != (groups, 1)) or max(window) > _FEW_TAPS

    @property
    def _sizes_of_kernel(self) -> tuple[list[int], list[int], list[int], int]:
        """Without the padding of a dilated convolution: oneDNN's kernels write beyond their memory there."""
        stride, padding, dilation, groups = self._sizes
        return stride, padding if max(dilation) == 1 else [0, 0], dilation, groups

    def _pack(self, x: Tensor) -> Tensor:
        scales = self.weight_scale, self.given.scale, self.given.zero_point
        packed: Tensor = _ONEDNN.qconv_prepack(self._dense(), *scales, *self._sizes_of_kernel, list(x.shape))
        return packed

    def kernel(self, x: Tensor, other: Tensor | None, given: PerTensor) -> Tensor:
        after = self.post.name, list(self.post.numbers), self.post.variant
        sizes, (height, width) = self._sizes_of_kernel, self._sizes[1]
        if sizes[1] != [height, width]:
            x = F.pad(x, (width, width, height, height), value=given.zero_point)
        inputs, output = self._inputs(x, given), (*sizes, *self._output)
        result: Tensor
        if other is None:
            result = _ONEDNN.qconv2d_pointwise.default(*inputs, self.bias, *output, *after)
        else:
            added = (*self._added, "sum", 1.0)
            other = other.contiguous(memory_format=torch.channels_last)
            result = _ONEDNN.qconv2d_pointwise.binary(*inputs, other, self.bias, *output, *added, *after)
        return result

    def _on_reals(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, *self._sizes)


@storable
class Int8Linear(Int8Layer):
    """A linear layer on integers. Arguments are those of :class:`Int8Layer`."""

    def _pack(self, x: Tensor) -> Tensor:
        packed: Tensor = _ONEDNN.qlinear_prepack(self._dense(), [x.numel() // x.shape[-1], x.shape[-1]])
        return packed

    def kernel(self, x: Tensor, other: Tensor | None, given: PerTensor) -> Tensor:
        after = self.post.name, list(self.post.numbers), self.post.variant
        inputs, output = self._inputs(x, given), self._output
        result: Tensor
        if other is None:
            result = _ONEDNN.qlinear_pointwise.default(*inputs, self.bias, *output, *after)
        else:
            added = (*self._added, "add", 1.0)
            other = other.contiguous()  # of another the kernel makes a copy, and reads it after giving it back
            result = _ONEDNN.qlinear_pointwise.binary(*inputs, other, self.bias, *output, *added, *after)
        return result

    def _on_reals(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


# ------------------------------------------------------------------------------------------------- wrong kernels
WRONG_KERNEL = "oneDNN's int8 kernel for it is wrong, or may be, on this processor"


def is_right(layer: Int8Layer, x: Tensor, other: Tensor | None) -> bool:
    """Whether the kernel gives what ``layer`` stands for, to a quantum or float32's rounding, on random numbers.

    Args:
        layer: the layer.
        x: integers; only shape and strides matter.
        other: what is added, likewise.
    """
    generator = torch.Generator().manual_seed(0)
    tried, added = torch.empty_like(x).random_(generator=generator), None
    step = 0.0 if layer.made is None else layer.made.scale
    with torch.no_grad():
        terms = layer.reals().abs().flatten(1).sum(1) * (255 * layer.given.scale)
        if layer.bias is not None:
            terms = terms + layer.bias.abs()
        largest = float(terms.max())
        if other is not None:
            like, real = torch.empty_like(other), other.is_floating_point()
            added = like.normal_(0, largest, generator=generator) if real else like.random_(generator=generator)
            largest += float(added.abs().max()) if layer.other is None else 255 * layer.other.scale
        expected = layer.reference(tried, added)
        found = layer.kernel(tried, None if added is None else added.clone(), layer.given)
    missing = float((found.float() - expected.float()).abs().max()) * (step or 1.0)
    return math.isfinite(missing) and missing <= 1.01 * step + _ROUNDING * largest


# ------------------------------------------------------------------------------------------------- between layers
@storable
def to_uint8(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """``x`` as integers from ``low`` to ``high``, in three steps where the operator takes five; halves are rounded up.

    Args:
        x: real numbers.
        scale: of the integers.
        zero_point: the integer that stands for 0.
        low: at least 0.
        high: at most 255.

    Raises:
        TypeError: ``x`` is not float32, for which the graph was quantised.
    """
    if has_torch_function_unary(x):  # a graph that comes back from a pickle is traced: this stays one call
        result: Tensor = handle_torch_function(to_uint8, (x,), x, scale, zero_point, low, high)
        return result
    if x.dtype is not torch.float32:
        raise TypeError(f"the graph was quantised for float32 and got {x.dtype}; convert the inputs, or quantise anew")
    if torch.compiler.is_compiling():
        return quantize(x, PerTensor(scale, zero_point, Grid(low, high, torch.uint8)))
    shifted = torch.add(x.new_tensor(zero_point + 0.5), x, alpha=1 / scale)
    return shifted.clamp_(low, high + 0.5).to(torch.uint8)


@storable
def max_pool2d(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    """``torch.nn.functional.max_pool2d`` of unsigned integers, which that function does not take."""
    if torch.compiler.is_exporting():  # other runtimes do not know the operator; the integers are exact in float32
        return F.max_pool2d(x.float(), kernel_size, stride, padding, dilation, ceil_mode).to(x.dtype)
    result: Tensor = torch.ops.quantized.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    return result
