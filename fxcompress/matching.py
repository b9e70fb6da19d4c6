"""Questions about calls in a graph, the same for modules, functions and methods. Nothing here changes anything."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from torch import fx, nn
from torch.nn.utils import parametrize

from fxcompress.errors import UsageError

__all__ = [
    "argument",
    "called",
    "check_patterns",
    "check_patterns_match",
    "describe",
    "is_call",
    "is_torch_call",
    "matches_path",
    "name_of_call",
    "override_of",
    "tensor_input",
]

M = TypeVar("M", bound=nn.Module)

_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def called(gm: fx.GraphModule, node: Any, *types: type[M]) -> M | None:
    """The module that ``node`` calls if its type is *exactly* one of ``types``, else ``None``.

    A subclass may do anything in its ``forward``, so it does not count; ask ``isinstance`` where it should.
    """
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    return module if type(module) in types else None  # type: ignore[return-value]


def _is_torch_function(target: Any) -> bool:
    owner = getattr(target, "__objclass__", None)  # methods such as torch.Tensor.add have no __module__
    module = getattr(owner if owner is not None else target, "__module__", None) or ""
    return module in ("_operator", "operator") or module.split(".")[0] == "torch"


def is_torch_call(node: fx.Node) -> bool:
    """Whether ``node`` calls a function of ``torch`` or ``operator``, a method, or a module defined in ``torch.nn``."""
    if node.op == "call_module" and node.graph.owning_module is not None:
        module = node.graph.owning_module.get_submodule(str(node.target))
        return type(module).__module__.startswith("torch.nn.")
    return node.op == "call_method" or (node.op == "call_function" and _is_torch_function(node.target))


def name_of_call(node: fx.Node) -> str:
    """The bare name of the torch function, operator or method that ``node`` calls, without double underscores
    (``torch.add``, ``operator.add``, ``Tensor.add`` and ``Tensor.__add__`` are all ``"add"``); else ``""``."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function" and _is_torch_function(node.target):
        name = getattr(node.target, "__name__", "")
    else:
        return ""
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def is_call(node: Any, names: Collection[str]) -> bool:
    """Whether ``node`` calls a torch function, operator or method of one of these bare ``names``."""
    return isinstance(node, fx.Node) and name_of_call(node) in names


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """The argument at ``position`` or, by keyword, ``name``; ``default`` if the call does not give it."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def tensor_input(node: fx.Node) -> fx.Node | None:
    """The node that gives the first argument of ``node`` (also as ``input=`` or ``self=``), else ``None``."""
    value = argument(node, 0, "input", node.kwargs.get("self"))
    return value if isinstance(value, fx.Node) else None


def matches_path(path: str, pattern: str) -> bool:
    """Whether the glob ``pattern`` matches the dotted ``path`` of a module, or that of a module that it lies in."""
    parts = path.split(".")
    return any(fnmatch.fnmatch(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def check_patterns_match(patterns: Iterable[str], paths: Collection[str]) -> None:
    """Refuse a pattern that matches no path.

    Raises:
        UsageError: one does not; the message has the nearest paths.
    """
    for pattern in patterns:
        if not any(matches_path(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, sorted(paths), n=3, cutoff=0.0)
            raise UsageError(f"no module path matches {pattern!r}; near it: {', '.join(near)}")


def check_patterns(**options: object) -> None:
    """Refuse a single string where there should be a tuple of patterns, as its characters would be taken for them.

    Raises:
        UsageError: one of ``options`` is a string.
    """
    for option, patterns in options.items():
        if isinstance(patterns, str):
            raise UsageError(f"{option} is a tuple of patterns, got the string {patterns!r}; write ({patterns!r},)")


def override_of(module: nn.Module) -> str | None:
    """What makes calling ``module`` differ from what its class and parameters say, in words; ``None`` if nothing."""
    if parametrize.is_parametrized(module):
        return "has parametrizations (torch.nn.utils.parametrize); remove them or make them permanent first"
    if any(getattr(module, table, None) for table in _HOOK_TABLES):
        return "has hooks (or an old weight_norm, spectral_norm or prune); remove them first"
    if "forward" in module.__dict__:
        return "has a `forward` of its own set on the instance"
    return None


def describe(gm: fx.GraphModule, node: Any) -> str:
    """``node`` in words for a message: ``Conv2d 'features.0'``, ``relu (node 'relu_1')``, ``the model's output``."""
    if not isinstance(node, fx.Node):
        return f"the constant {node!r}"
    if node.op == "call_module":
        return f"{type(gm.get_submodule(str(node.target))).__name__} {str(node.target)!r}"
    if node.op == "placeholder":
        return f"the model's input {str(node.target)!r}"
    if node.op == "get_attr":
        return f"the attribute {str(node.target)!r}"
    if node.op == "output":
        return "the model's output"
    return f"{name_of_call(node) or getattr(node.target, '__name__', node.target)} (node {node.name!r})"
