"""What a torch function is to a recording: an operation, a question about a tensor, or a read of its data."""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "Kind",
    "classify",
    "display_name",
    "draws_random_numbers",
    "makes_data_sizes",
    "reads_dtype",
    "reads_rank",
    "sizes_read",
    "splits",
    "target_of",
]


class Kind(enum.Enum):
    OPERATION = "operation"
    """Makes or changes tensors: becomes a node."""
    QUESTION = "question"
    """Asks for a size, a dtype, a device: answered, and not recorded."""
    DATA_READ = "data read"
    """Turns values of a tensor into Python values: what follows from them cannot be recorded."""
    ASSIGNMENT = "assignment"
    """Sets an attribute of a tensor."""


_DATA_READS = frozenset(
    (
        "__bool__ __int__ __float__ __complex__ __index__ __contains__ __array__ __dlpack__ item tolist "
        "numpy equal allclose is_nonzero _local_scalar_dense to_dlpack"
    ).split()
)
_SIZE_QUESTIONS = frozenset("shape size numel nelement __len__ stride nbytes".split())
_QUESTIONS = _SIZE_QUESTIONS | frozenset(
    (
        "dim ndim ndimension dtype device layout storage_offset element_size itemsize requires_grad "
        "grad_fn is_leaf grad _version data_ptr untyped_storage storage _typed_storage names has_names "
        "__hash__ __repr__ __str__ __format__ get_device result_type can_cast promote_types "
        "__dlpack_device__ register_hook retain_grad output_nr name _is_view is_tensor is_storage "
        "dim_order _base _backward_hooks _is_zerotensor _make_subclass is_same_size "
        "register_post_accumulate_grad_hook retains_grad volatile __dir__ backward requires_grad_ "
        "is_shared _has_symbolic_sizes_strides _has_compatible_shallow_copy_type type_as_string sym_sizes "
        "is_autocast_enabled __module_load__"
    ).split()
)
_TENSOR_PROPERTIES = frozenset(("T", "mT", "H", "mH", "real", "imag", "data"))

_RANDOM = frozenset(
    (
        "rand randn randint randperm rand_like randn_like randint_like normal normal_ uniform_ bernoulli "
        "bernoulli_ multinomial poisson exponential_ geometric_ log_normal_ cauchy_ random_ empty "
        "empty_like new_empty empty_strided new_empty_strided dropout alpha_dropout feature_dropout "
        "feature_alpha_dropout dropout_ rrelu rrelu_ dropout1d dropout2d dropout3d gumbel_softmax "
        "fractional_max_pool2d fractional_max_pool3d"
    ).split()
)

_DATA_SIZED = frozenset(
    (
        "nonzero argwhere unique unique_consecutive unique_dim _unique2 masked_select bincount nms batched_nms "
        "_pad_packed_sequence _pack_padded_sequence"
    ).split()
)

# x.__add__(y) is what `x + y` calls; the graph says operator.add.
_OPERATORS: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, f"__{name}__")
    for name in (
        "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift neg pos invert abs eq ne lt "
        "le gt ge getitem"
    ).split()
}
_REFLECTED = {
    f"__r{n}__": _OPERATORS[f"__{n}__"] for n in "add sub mul truediv floordiv mod pow matmul and or xor".split()
}
_REFLECTED["__rdiv__"] = operator.truediv
_OPERATORS["__div__"] = operator.truediv
# In place: methods, because the code that torch.fx generates for operator.iadd does not survive pickling as in place.
_INPLACE_METHODS = {
    "__iadd__": "add_", "__isub__": "sub_", "__imul__": "mul_", "__itruediv__": "div_", "__idiv__": "div_",
    "__ifloordiv__": "floor_divide_", "__imod__": "remainder_", "__ipow__": "pow_", "__iand__": "bitwise_and_",
    "__ior__": "bitwise_or_", "__ixor__": "bitwise_xor_", "__ilshift__": "bitwise_left_shift_",
    "__irshift__": "bitwise_right_shift_",
}  # fmt: skip

_METHODS: dict[Any, str] = {}
for _name in sorted(dir(torch.Tensor), key=lambda n: n.startswith("_")):  # public names win over dunder aliases
    _function = getattr(torch.Tensor, _name, None)
    if callable(_function):
        try:
            _METHODS.setdefault(_function, _name)
        except TypeError:  # an unhashable attribute is no method
            continue

_PUBLIC_TWIN: dict[Any, Any] = {
    getattr(F, f"_{name}"): getattr(F, name)
    for name in (
        "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "fractional_max_pool2d fractional_max_pool3d"
    ).split()
    if hasattr(F, f"_{name}")
}


def _property_name(func: Any) -> tuple[str, str] | None:
    """("get" | "set", attribute) of a property accessor of ``torch.Tensor``, else ``None``."""
    kind = getattr(func, "__name__", "")
    if kind in ("__get__", "__set__", "__delete__"):
        return kind.strip("_"), str(getattr(func.__self__, "__name__", ""))
    return None


def display_name(func: Any) -> str:
    """A short name of a torch function for messages."""
    accessor = _property_name(func)
    if accessor is not None:
        return f"Tensor.{accessor[1]}"
    name = _METHODS.get(func)
    if name is not None:
        return f"Tensor.{name}"
    return str(getattr(func, "__name__", func))


def _plain_name(func: Any) -> str:
    accessor = _property_name(func)
    return accessor[1] if accessor else str(_METHODS.get(func) or getattr(func, "__name__", ""))


def classify(func: Any, args: tuple[Any, ...] = ()) -> Kind:
    """What ``func(*args)`` is to a recording. Whatever is not known by name counts as an operation; one that then
    returns no tensor is treated as a data read by the caller."""
    accessor = _property_name(func)
    if accessor is not None and accessor[0] != "get":
        return Kind.ASSIGNMENT
    name = _plain_name(func)
    if accessor is not None:
        return Kind.OPERATION if name in _TENSOR_PROPERTIES else Kind.QUESTION
    if name in _DATA_READS:
        return Kind.DATA_READ
    if name == "type" and len(args) == 1:
        return Kind.QUESTION
    if name in _QUESTIONS or (name.startswith("is_") and name not in ("is_nonzero",)):
        return Kind.QUESTION
    return Kind.OPERATION


def sizes_read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int] | None:
    """The dimensions of its tensor whose sizes ``func`` tells Python; ``None`` for all of them."""
    name = _plain_name(func)
    if name not in _SIZE_QUESTIONS or name in ("stride", "nbytes"):
        return set()
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if name == "__len__":
        return {0}
    return {dim % max(1, args[0].dim())} if name == "size" and isinstance(dim, int) else None


def makes_data_sizes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the size of what ``func`` returns follows from the values of its arguments."""
    name = _plain_name(func)
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "repeat_interleave":
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats", args[0])
        return isinstance(repeats, torch.Tensor) and kwargs.get("output_size") is None
    if name in ("__getitem__", "index"):
        index = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
        return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
    return name in _DATA_SIZED


def splits(func: Any) -> bool:
    """Whether ``func`` returns as many tensors as a size says."""
    return _plain_name(func) in ("unbind", "split", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit")


def reads_rank(func: Any) -> bool:
    """Whether ``func`` tells Python how many dimensions a tensor has."""
    return _plain_name(func) in ("dim", "ndim", "ndimension")


def reads_dtype(func: Any) -> bool:
    """Whether ``func`` tells Python what kind of numbers a tensor holds."""
    return _plain_name(func) in ("dtype", "is_floating_point", "is_complex", "is_signed", "type")


def draws_random_numbers(func: Any) -> bool:
    """Whether two calls of ``func`` on the same arguments may differ."""
    return _plain_name(func) in _RANDOM or getattr(func, "__module__", None) == "torch.nn.init"


def target_of(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """The node that stands for a call of ``func``: (op, target, arguments)."""
    accessor = _property_name(func)
    if accessor is not None:
        return "call_function", getattr, (args[0], accessor[1])
    name = _METHODS.get(func)
    if name is None:
        return "call_function", _PUBLIC_TWIN.get(func, func), args
    if name in _REFLECTED:
        return "call_function", _REFLECTED[name], (args[1], args[0])
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], args
    return "call_method", _INPLACE_METHODS.get(name, name), args
