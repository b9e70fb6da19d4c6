"""The only things that a saved graph may call, each under one name.

PyTorch's operators (the functions of ``torch``, ``torch.nn.functional``, ``torch.linalg`` and so on that compute
tensors, and ``torch.ops``), methods of tensors, arithmetic of Python, the modules of ``torch.nn``, what is marked as
:func:`~fxcompress.storable.storable`, and what the caller trusts. Nothing that reads files, takes code, or reaches into
objects is among them. A name is never imported because a file says so.
"""

from __future__ import annotations

import builtins
import collections
import functools
import importlib
import math
import operator
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxcompress.recording.internals  # noqa: F401  registers the operators of quantised graphs
from fxcompress.errors import SerializationError, UsageError
from fxcompress.registry import registered_passes
from fxcompress.storable import qualified_name, stored_names

__all__ = ["Trusted", "Vocabulary", "is_attribute", "is_method", "name_of", "own_name"]

Trusted = Iterable[Any] | Mapping[str, Any]

_OPERATORS = tuple(
    name for name in operator.__all__ if name not in ("attrgetter", "call", "itemgetter", "length_hint", "methodcaller")
)
_BUILTINS = tuple(
    "abs bool complex dict divmod float getattr int len list max min pow range round slice sum tuple".split()
)
_MATH = tuple("ceil cos exp exp2 floor isinf isnan isqrt log log10 log2 pow prod sin sqrt tanh trunc".split())
_TORCH = tuple(
    "Size _assert broadcast_shapes device finfo iinfo is_tensor pca_lowrank "
    "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum svd_lowrank unique unravel_index".split()
)
_READS_FILES = frozenset(("from_file", "from_numpy", "frombuffer"))
_NO_FUNCTIONAL = frozenset(
    "assert_int_or_pair boolean_dispatch handle_torch_function has_torch_function has_torch_function_unary "
    "has_torch_function_variadic triplet_margin_with_distance_loss".split()
)
_NAMESPACES = frozenset(("aten", "prims", "quantized", "quantized_decomposed", "onednn", "mkldnn", "torchvision"))
_OPERATOR_NAME = re.compile(r"torch\.ops\.(\w+)\.(\w+)(?:\.(\w+))?")

_NO_METHOD = frozenset(
    "apply_ as_subclass const_data_ptr data_ptr map2_ map_ module_load numpy record_stream register_hook "
    "register_post_accumulate_grad_hook reinforce set_ share_memory_ storage storage_type untyped_storage".split()
)
_OF_CONTAINERS = frozenset(("get", "items", "keys", "values"))
_DUNDER_METHODS = frozenset(
    f"__{name}__"
    for name in (
        "abs add and bool contains eq float floordiv ge getitem gt iadd iand ifloordiv ilshift imod imul index int "
        "invert ior ipow irshift isub itruediv ixor le len lshift lt matmul mod mul ne neg or pos pow radd rand "
        "rfloordiv rlshift rmatmul rmod rmul ror rpow rrshift rshift rsub rtruediv rxor setitem sub truediv xor"
    ).split()
)
_NO_ATTRIBUTE = frozenset(("grad_fn", "name", "volatile"))
_NN = "torch.nn.modules."


def is_method(name: Any) -> bool:
    """Whether a saved graph may call the method ``name``."""
    if not isinstance(name, str):
        return False
    public = not name.startswith("_") and callable(getattr(torch.Tensor, name, None))
    return (public and name not in _NO_METHOD) or name in _DUNDER_METHODS or name in _OF_CONTAINERS


def is_attribute(name: Any) -> bool:
    """Whether ``name`` may be read of a value: nothing that Python itself gives to objects."""
    return isinstance(name, str) and name.isidentifier() and not name.startswith("_") and name not in _NO_ATTRIBUTE


@functools.cache
def _functions() -> dict[str, Any]:
    """Every function by name; of several names of one function the first is the one that is written."""
    found: dict[str, Any] = {}

    def add(prefix: str, names: Iterable[str], owner: Any, allowed: Callable[[str, Any], bool] | None = None) -> None:
        for name in names:
            value = getattr(owner, name, None)
            if callable(value) and (allowed is None or allowed(name, value)):
                found[f"{prefix}.{name}"] = value

    def operation(name: str, value: Any) -> bool:
        return not name.startswith("_") and name not in _READS_FILES and not isinstance(value, type)

    def native(name: str, value: Any) -> bool:  # some have names of one underscore, such as the norm of weights
        return not name.startswith("__") and name not in _READS_FILES and _is_native(value)

    add("torch.nn.functional", dir(F), F, lambda name, value: operation(name, value) and name not in _NO_FUNCTIONAL)
    add("torch", dir(torch._C._VariableFunctions), torch, native)
    add("torch", (*torch.functional.__all__, *_TORCH), torch)
    for module in (torch.linalg, torch.fft, torch.special):
        add(module.__name__, dir(module), module, lambda name, value: operation(name, value) and _is_native(value))
    add("torch.Tensor", dir(torch.Tensor), torch.Tensor, lambda name, _: is_method(name))
    add("operator", _OPERATORS, operator)
    add("math", _MATH, math)
    add("builtins", _BUILTINS, builtins)
    found["collections.OrderedDict"] = collections.OrderedDict
    return found


def _is_native(value: Any) -> bool:
    return isinstance(value, types.BuiltinFunctionType)


@functools.cache
def _names_of_functions() -> dict[int, str]:
    """The inverse of :func:`_functions`, by identity; its values are kept alive there."""
    names: dict[int, str] = {}
    for name, value in _functions().items():
        names.setdefault(id(value), name)
    return names


def own_name(value: Any) -> str | None:
    """The name of a function or class that needs no trust; ``None`` of any other."""
    if operator_name := _operator_name(value):
        return operator_name if _operator(operator_name) is value else None
    if isinstance(value, type) and issubclass(value, nn.Module):
        name = qualified_name(value)
        return name if _known_class(name) is value else None
    try:
        name = qualified_name(value)
    except AttributeError:
        name = ""
    return name if stored_names().get(name) is value else _names_of_functions().get(id(value))


def _operator_name(value: Any) -> str | None:
    """The qualified name of an operator of ``torch.ops``; ``None`` of anything else."""
    is_operator = isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    return f"torch.ops.{str(value).replace('::', '.')}" if is_operator else None


def _known_class(name: str) -> type[nn.Module] | None:
    """The class of modules that ``name`` means among those of ``torch.nn`` and those that are storable."""
    found: Any = stored_names().get(name)
    if found is None and name.startswith(_NN):
        module, _, attribute = name[len(_NN) :].partition(".")
        found = getattr(getattr(nn.modules, module, None), attribute, None) if attribute.isidentifier() else None
        if not isinstance(found, type) or qualified_name(found) != name:
            return None
    allowed = isinstance(found, type) and issubclass(found, nn.Module)
    return found if allowed and not issubclass(found, nn.modules.lazy.LazyModuleMixin) else None


def _operator(name: str) -> Any:
    """The operator of ``torch.ops`` called ``name``, if its namespace is one that only computes."""
    match = _OPERATOR_NAME.fullmatch(name)
    if match is None or match[1] not in _NAMESPACES or match[2] in _READS_FILES or match[2].startswith("__"):
        return None
    packet = getattr(getattr(torch.ops, match[1]), match[2], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    overloads: list[str] = packet.overloads()  # type: ignore[no-untyped-call]
    if any(a.name == "filename" for o in overloads for a in getattr(packet, o)._schema.arguments):
        return None
    if match[3] is None:
        return packet
    return getattr(packet, match[3]) if match[3] in overloads else None


def name_of(value: Any, where: str) -> tuple[str, bool]:
    """The name to save ``value``, a function or class, under, and whether it is to be trusted when it is loaded.

    Raises:
        SerializationError: it has no name by which anybody could find it again.
    """
    name = own_name(value)
    if name is not None:
        return name, False
    if operator_name := _operator_name(value):
        return operator_name, True
    if not hasattr(value, "__qualname__") or "<" in qualified_name(value):
        raise SerializationError(
            f"{where}: {value!r} is defined inside a function, or is no function or class, so that no name leads to "
            "it; define it at the top of a module"
        )
    return qualified_name(value), True


class Vocabulary:
    """Looks names up.

    Args:
        trusted: functions and classes that may be called besides, or their qualified names (which are imported), or a
            mapping of names to objects.

    Raises:
        UsageError: something trusted is neither.
    """

    def __init__(self, trusted: Trusted = ()) -> None:
        if isinstance(trusted, Mapping):
            self._trusted = dict(trusted)
        else:
            self._trusted = dict(_named(item) for item in ([trusted] if isinstance(trusted, str) else trusted))
        self._imported = False

    def find(self, name: Any) -> Any:
        """What ``name`` means; ``None`` if it is not allowed."""
        if not isinstance(name, str):
            return None
        if name in self._trusted:
            return self._trusted[name]
        if name in _functions():
            return _functions()[name]
        if name.startswith("torch.ops."):
            return _operator(name)
        if name.startswith("torch."):
            return _known_class(name)
        return self._storable(name)

    def is_trusted(self, value: Any) -> bool:
        """Whether ``value`` is there because the caller trusts it."""
        return any(value is item for item in self._trusted.values())

    def _storable(self, name: str) -> Any:
        if name not in stored_names() and not self._imported:
            self._imported = True
            registered_passes()  # imports them
        return stored_names().get(name)


def _named(item: Any) -> tuple[str, Any]:
    if not isinstance(item, str):
        if operator_name := _operator_name(item):
            return operator_name, item
        if not hasattr(item, "__qualname__"):
            raise UsageError(f"trusted= takes functions, classes and their names, not {item!r}")
        return qualified_name(item), item
    module, _, attribute = item.rpartition(".")
    try:
        if module.startswith("torch.ops."):
            return item, operator.attrgetter(item[len("torch.") :])(torch)
        return item, getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"trusted={item!r} cannot be imported: {error}") from error
