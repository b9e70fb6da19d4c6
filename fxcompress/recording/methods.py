"""Methods of modules, other than ``forward``, that are kept as one call.

A detector calls ``self.transform.postprocess(...)`` or ``self.postprocess_detections(...)`` in its own forward: code
that looks at data, in no submodule that could be kept whole, yet with a name of its own.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from torch import nn

from fxcompress.modules import MethodCall

__all__ = ["Method", "calling_method", "intercepted", "method_call"]

Method = tuple[str, str]
"""Path of the module, and the name of its method."""

_NOT_HELPERS = frozenset(("forward", "__call__", "_call_impl", "_wrapped_call_impl"))


def calling_method(paths: Mapping[int, str]) -> Method | None:
    """The innermost method of a module of the model that is running now, if it is not a forward.

    Args:
        paths: ``id(module)`` -> path, of every module of the model.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            name = frame.f_code.co_name
            return None if name in _NOT_HELPERS else (paths[id(owner)], name)
        frame = frame.f_back
    return None


@contextlib.contextmanager
def intercepted(
    model: nn.Module, methods: Mapping[Method, str], handler: Callable[[str, Callable[..., Any], Any, Any], Any]
) -> Iterator[None]:
    """Send calls of ``methods`` to ``handler(name of the method in methods, original, args, kwargs)``."""
    owners = [(model.get_submodule(path) if path else model, name, where) for (path, name), where in methods.items()]

    def wrapper(where: str, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: handler(where, original, args, kwargs)

    for owner, name, where in owners:
        vars(owner)[name] = wrapper(where, getattr(owner, name))
    try:
        yield
    finally:
        for owner, name, _ in owners:
            del vars(owner)[name]


def method_call(model: nn.Module, method: Method) -> MethodCall:
    """The module that stands for calls of ``method``. A method of the model itself gets a copy of it without
    submodules, parameters and buffers: what it keeps whole is code and plain attributes."""
    path, name = method
    if path:
        return MethodCall(model.get_submodule(path), name)
    shell = copy.copy(model)
    vars(shell).update(_modules={}, _parameters={}, _buffers={})
    return MethodCall(shell, name)
