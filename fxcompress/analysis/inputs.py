"""From the arguments of a call to the values of a graph's placeholders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen

from fxcompress.errors import UsageError

__all__ = ["bind_inputs"]


def bind_inputs(gm: fx.GraphModule, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> list[Any]:
    """The value of each placeholder of ``gm``, in graph order, when it is called as ``gm(*args, **kwargs)``.

    A missing argument takes the placeholder's default (``node.args[0]``). The value of a placeholder ``*rest`` is a
    tuple, that of ``**options`` a dict; plain ``fx.Interpreter`` cannot be given those two, so interpret with
    :class:`~fxcompress.analysis.running.GraphRunner`, which takes exactly this list. Where the graph flattens
    structured inputs (the pytree code generator of ``torch.export`` and ``concrete_args``), the values are the leaves.

    Returns:
        As many values as there are placeholders.

    Raises:
        UsageError: an argument is missing, unknown or one too many, or a structured input has another structure.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if type(gm.graph._codegen) is CodeGen:
        # The placeholders and not gm.forward: a graph under edit need not have been recompiled.
        return _bind(_signature(placeholders), args, kwargs or {})
    forward_values = _bind(inspect.signature(gm.forward), args, kwargs or {})
    values = list(gm.graph.process_inputs(*forward_values))
    if len(values) != len(placeholders):
        raise UsageError(
            f"the inputs do not fit the graph: they flatten to {len(values)} values and the graph has "
            f"{len(placeholders)} placeholders ({', '.join(str(n.target) for n in placeholders)}); pass inputs "
            "structured like those it was recorded with"
        )
    return values


def _signature(placeholders: Sequence[fx.Node]) -> inspect.Signature:
    parameters = []
    for node in placeholders:
        target = str(node.target)
        kind = {0: inspect.Parameter.POSITIONAL_OR_KEYWORD, 1: inspect.Parameter.VAR_POSITIONAL}.get(
            len(target) - len(target.lstrip("*")), inspect.Parameter.VAR_KEYWORD
        )
        starred = kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = node.args[0] if node.args and not starred else inspect.Parameter.empty
        parameters.append(inspect.Parameter(target.lstrip("*"), kind, default=default))
    return inspect.Signature(parameters)


def _bind(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"the inputs do not fit the graph: {error}; it takes {signature}") from error
    bound.apply_defaults()
    return list(bound.arguments.values())
