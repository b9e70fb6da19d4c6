"""Changes to a graph: add, replace and erase nodes and the modules and parameters behind them.

``torch.fx`` regards every ``call_method`` as pure, so its own dead-code elimination drops ``x.add_(1)`` when nobody
reads the result although a later reader of ``x`` sees the sum. :func:`has_side_effect` is what this package goes by.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx, nn

from fxcompress.scopes import SCOPES

__all__ = [
    "add_module",
    "clean_up",
    "erase",
    "get_attribute",
    "has_side_effect",
    "is_inplace",
    "private_copy",
    "replace",
    "set_attribute",
    "unique_path",
]

_INPLACE_OPERATORS = frozenset(
    getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or", "xor", "lshift", "rshift")
    if hasattr(operator, f"i{name}")
) | {operator.setitem, operator.iand, operator.ior, operator.ixor}


def _truthy_argument(node: fx.Node, name: str, position: int | None) -> bool:
    if name in node.kwargs:
        return node.kwargs[name] is True
    return position is not None and len(node.args) > position and node.args[position] is True


def is_inplace(node: fx.Node) -> bool:
    """Whether running ``node`` may change a tensor that existed before it (by the naming rules of PyTorch)."""
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    if node.op == "call_method":
        name = str(node.target)
        if name.startswith("__") and name.endswith("__"):
            not_inplace = ("__invert__", "__index__", "__int__")
            return name == "__setitem__" or (name.startswith("__i") and name not in not_inplace)
        return name.endswith("_")
    if node.op == "call_function":
        if node.target in _INPLACE_OPERATORS:
            return True
        schema = getattr(node.target, "_schema", None)
        if schema is not None:  # an overload of torch.ops says so itself
            return bool(schema.is_mutable)
        name = getattr(node.target, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            return True
        return _inplace_by_position(node, name)
    if node.op == "call_module" and node.graph.owning_module is not None:
        return bool(getattr(node.graph.owning_module.get_submodule(str(node.target)), "inplace", False))
    return False


# The position of ``inplace`` in functions of torch.nn.functional that take one.
_INPLACE_POSITION = {
    "relu": 1, "relu6": 1, "hardswish": 1, "hardsigmoid": 1, "silu": 1, "mish": 1, "selu": 1,
    "elu": 2, "leaky_relu": 2, "celu": 2, "threshold": 3, "hardtanh": 3,
    "dropout": 3, "dropout1d": 3, "dropout2d": 3, "dropout3d": 3, "alpha_dropout": 3, "feature_alpha_dropout": 3,
    "rrelu": 4,
}  # fmt: skip


def _inplace_by_position(node: fx.Node, name: str) -> bool:
    position = _INPLACE_POSITION.get(name)
    return position is not None and _truthy_argument(node, "inplace", position)


def has_side_effect(node: fx.Node) -> bool:
    """Whether ``node`` must stay although nobody reads its value: in-place changes, guards, random draws, batch norm
    in training mode, modules of a kind that this package does not know."""
    if node.op in ("placeholder", "output") or is_inplace(node):
        return True
    if node.op == "call_module" and node.graph.owning_module is not None:
        module = node.graph.owning_module.get_submodule(str(node.target))
        return module.training or not type(module).__module__.startswith(("torch.nn.", "fxcompress."))
    return node.is_impure()


def clean_up(gm: fx.GraphModule) -> None:
    """Drop nodes without readers and effects, then modules, parameters and buffers that no node names; recompile."""
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and not has_side_effect(node):
            gm.graph.erase_node(node)
    _delete_unreferenced(gm)
    gm.graph.lint()
    gm.recompile()


def _delete_unreferenced(gm: fx.GraphModule) -> None:
    # By object and not by path: one module may sit at several paths, and what one path does not need another may.
    whole: set[int] = set()
    needed: set[tuple[int, str]] = set()
    for node in gm.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        value: Any = gm
        for part in str(node.target).split("."):
            needed.add((id(value), part))
            value = getattr(value, part)
        if isinstance(value, nn.Module) and id(value) not in whole:
            whole.update(id(module) for module in value.modules())
    if SCOPES in gm._modules:
        needed.add((id(gm), SCOPES))
    pending: list[nn.Module] = [gm]
    while pending:
        owner = pending.pop()
        for name in [*owner._parameters, *owner._buffers, *owner._modules]:
            if (id(owner), name) not in needed:
                delattr(owner, name)
        pending += [child for child in owner._modules.values() if child is not None and id(child) not in whole]


def private_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A deep copy that shares nothing with ``gm``.

    ``GraphModule.__deepcopy__`` registers the buffers of its own anew and so makes persistent what was not; put right
    here, or such buffers would turn up in the ``state_dict``.
    """
    copied = copy.deepcopy(gm)
    others = dict(copied.named_modules())
    for path, module in gm.named_modules():
        if isinstance(module, fx.GraphModule) and path in others:
            others[path]._non_persistent_buffers_set = module._non_persistent_buffers_set & set(others[path]._buffers)
    return copied


def replace(node: fx.Node, by: fx.Node) -> None:
    """Let every reader of ``node`` read ``by`` instead, and erase ``node``."""
    node.replace_all_uses_with(by, delete_user_cb=lambda user: user is not by)
    node.graph.erase_node(node)


def erase(node: fx.Node) -> None:
    """Erase ``node``, which must have no readers."""
    node.graph.erase_node(node)


def get_attribute(module: nn.Module, path: str) -> Any:
    """The object at dotted ``path`` below ``module``.

    Raises:
        AttributeError: there is none.
    """
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def set_attribute(module: nn.Module, path: str, value: Any) -> None:
    """Put ``value`` at dotted ``path``, making empty modules on the way; a bare tensor becomes a buffer that is not
    part of the ``state_dict`` unless a buffer of that name was."""
    *owners, leaf = path.split(".")
    for part in owners:
        if not isinstance(getattr(module, part, None), nn.Module):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and leaf not in module._buffers:
        if hasattr(module, leaf):
            delattr(module, leaf)
        module.register_buffer(leaf, value, persistent=False)
    else:
        setattr(module, leaf, value)


def unique_path(module: nn.Module, wanted: str) -> str:
    """``wanted``, or ``wanted_1``, ``wanted_2`` ... : the first path at which ``module`` has nothing yet."""
    owner_path, _, leaf = wanted.rpartition(".")
    owner: Any = module
    for part in owner_path.split(".") if owner_path else ():
        owner = getattr(owner, part, None)
        if owner is None:
            return wanted
    candidate, count = leaf, 0
    while hasattr(owner, candidate):
        count += 1
        candidate = f"{leaf}_{count}"
    return f"{owner_path}.{candidate}" if owner_path else candidate


def add_module(gm: fx.GraphModule, wanted: str, module: nn.Module) -> str:
    """Put ``module`` at ``wanted`` or, if that is taken, at the next free name beside it; return the path used."""
    path = unique_path(gm, wanted)
    set_attribute(gm, path, module)
    return path
