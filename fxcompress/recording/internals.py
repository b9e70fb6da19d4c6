"""The one place that leans on internals of torch; written against 2.11 to 2.13."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers operators that quantised graphs, also unpickled ones, call
import torch.distributions
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = [
    "alias",
    "autograd_function_calls",
    "code_location",
    "compiling",
    "fake_mode",
    "is_fake",
    "is_transformed",
    "module_calls",
    "non_persistent_buffers",
    "script_function_calls",
    "source_of_script_function",
    "without_assertions_on_data",
    "without_causal_detection",
    "without_fused_encoder",
    "wrap_functions_of_torch",
]

_TORCH = str(Path(torch.__file__).parent) + "/"
_TORCH_LAYERS = _TORCH + "nn/modules/"
_HERE = str(Path(__file__).parent.parent) + "/"


CallHandler = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""Gets the original call, what is called, and its arguments."""


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Let ``torch.compiler.is_compiling()`` and ``is_exporting()`` say yes.

    Libraries take this as the sign to leave out shortcuts that look at data (such as skipping a mask that happens to
    be all ones) and to run code that is valid for every input; ``torch.export`` does the same in its non-strict mode.
    """
    names = [n for n in ("_is_compiling_flag", "_is_exporting_flag") if hasattr(torch.compiler, n)]
    before = {n: getattr(torch.compiler, n) for n in names}
    try:
        for n in names:
            setattr(torch.compiler, n, True)
        yield
    finally:
        for n, value in before.items():
            setattr(torch.compiler, n, value)


@contextlib.contextmanager
def without_causal_detection() -> Iterator[None]:
    """Let ``nn.Transformer`` believe its caller about masks instead of comparing their data with a causal one.

    What it finds out is a hint to the kernel, never needed: the mask itself is always passed on.
    """
    owner = torch.nn.modules.transformer
    original = owner._detect_is_causal_mask

    def believe(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    owner._detect_is_causal_mask = believe
    try:
        yield
    finally:
        owner._detect_is_causal_mask = original


@contextlib.contextmanager
def without_assertions_on_data() -> Iterator[None]:
    """Leave out checks that look at data and otherwise change nothing: those that libraries make while compiling, and
    those of ``torch.distributions``."""
    names = [n for n in ("_check_tensor_all", "_check_tensor_all_with") if hasattr(torch, n)]
    before = {n: getattr(torch, n) for n in names}
    validates = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    for name in names:
        setattr(torch, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(validates)
        for name, function in before.items():
            setattr(torch, name, function)


@contextlib.contextmanager
def without_fused_encoder() -> Iterator[None]:
    """Let ``nn.TransformerEncoder`` run the code that it runs while training, not its fused inference kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def module_calls(
    handler: Callable[[Callable[..., Any], nn.Module, tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """Send every ``module(...)`` to ``handler(original_call, module, args, kwargs)`` while the context lasts."""
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return handler(original, self, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def script_function_calls(
    handler: Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """The same for functions compiled by ``torch.jit.script``, whose insides no Python mode can see."""
    kind = torch.jit.ScriptFunction
    original = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return handler(original, self, args, kwargs)

    kind.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__call__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def autograd_function_calls(handler: CallHandler) -> Iterator[None]:
    """Send every ``SomeFunction.apply(...)`` to ``handler(original_apply, SomeFunction, args, kwargs)``."""
    kind = torch.autograd.Function
    original = kind.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return handler(original.__get__(None, cls), cls, args, kwargs)

    kind.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        kind.apply = original  # type: ignore[method-assign]


def source_of_script_function(function: Any) -> Callable[..., Any] | None:
    """The Python function that ``torch.jit.script`` compiled, if torch still knows it."""
    return getattr(function, "_torchdynamo_inline", None)


def fake_mode() -> contextlib.AbstractContextManager[Any]:
    """Tensors made or used in here have shapes, dtypes and devices, and no values; nothing is computed."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` belongs to a transform of ``torch.func``."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has no values."""
    return isinstance(tensor, FakeTensor)


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another Python object for the same values and the same memory."""
    result: torch.Tensor = torch.ops.aten.alias.default(tensor)
    return result


def code_location() -> tuple[str, int]:
    """File and line of the innermost frame of the model's own code: not of this package, and of torch only if the
    model is itself made of layers of torch that are written in Python, such as ``nn.Transformer``."""
    frame = sys._getframe(1)
    layer: tuple[str, int] | None = None
    left_package = False
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_HERE):
            if left_package:  # back at the call that started the run
                break
        elif name.startswith(_TORCH):
            if layer is None and name.startswith(_TORCH_LAYERS) and not name.endswith("/module.py"):
                layer = (name, frame.f_lineno)
        elif not name.startswith("<"):
            return name, frame.f_lineno
        if name.startswith(_TORCH_LAYERS):
            left_package = True
        frame = frame.f_back  # type: ignore[assignment]
    return layer or ("<unknown>", 0)


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """The names of ``module``'s own buffers that stay out of its ``state_dict``; the set may be changed."""
    names: set[str] = module._non_persistent_buffers_set
    return names


def wrap_functions_of_torch(tracer: fx.Tracer) -> None:
    """Let ``tracer`` replace the functions that it wraps where code calls them as ``torch.name(...)``, too."""
    tracer._autowrap_search.append(torch)
