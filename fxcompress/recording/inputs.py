"""Forward's arguments: their names and defaults, the same inputs at other sizes and with other values."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import UsageError
from fxcompress.recording.guards import check_input
from fxcompress.recording.structure import Path, children, leaves

__all__ = ["Argument", "Dimension", "Inputs", "Sizes", "guard", "read_inputs"]

Dimension = tuple[str, Path, int]
"""One dimension of one input tensor: argument name, path of the tensor inside the argument, dimension."""
Sizes = Mapping[Dimension, int]


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument of forward: ``given`` by the caller or left at its default; ``keyword``: how it was given."""

    name: str
    value: Any
    given: bool
    keyword: bool


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All arguments up to the last one given, in the order of the signature."""

    arguments: tuple[Argument, ...]

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What to call the model with."""
        given = [a for a in self.arguments if a.given]
        return tuple(a.value for a in given if not a.keyword), {a.name: a.value for a in given if a.keyword}

    def values(self) -> tuple[Any, ...]:
        """What to call the graph with: the value of every placeholder."""
        return tuple(a.value if a.given or not isinstance(a.value, torch.Tensor) else None for a in self.arguments)

    def tensors(self) -> dict[tuple[str, Path], torch.Tensor]:
        """Every tensor in the arguments."""
        return {
            (a.name, path): leaf
            for a in self.arguments
            if a.given
            for path, leaf in leaves(a.value)
            if isinstance(leaf, torch.Tensor)
        }

    def changed(self, sizes: Sizes, seed: int | None = None) -> Inputs:
        """The same inputs at other ``sizes``; with a ``seed`` also with other values of the same kind.

        Values are repeated along a dimension that grows. Fresh values are the given ones in another order and, for
        floating point, scaled a little, so that they stay within what the model expects. A tensor given twice becomes
        two tensors: they are two inputs.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)

        def change(name: str, path: Path, tensor: torch.Tensor) -> torch.Tensor:
            result = tensor.detach()
            for dim in range(tensor.dim()):
                size = sizes.get((name, path, dim), tensor.shape[dim])
                if size != tensor.shape[dim]:
                    index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
                    result = result.index_select(dim, index)
            return (result if generator is None else _other_values(result, generator)).clone()

        return self._mapped(change)

    def converted(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """The same inputs with ``convert`` applied to every tensor."""
        return self._mapped(lambda name, path, tensor: convert(tensor))

    def _mapped(self, change: Callable[[str, Path, torch.Tensor], torch.Tensor]) -> Inputs:
        return Inputs(
            tuple(
                dataclasses.replace(a, value=_map(a.value, (), functools.partial(change, a.name))) if a.given else a
                for a in self.arguments
            )
        )


def _other_values(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    flat = tensor.reshape(-1)
    flat = flat[torch.randperm(flat.numel(), generator=generator).to(tensor.device)]
    if tensor.is_floating_point() and flat.numel():
        if bool((flat == flat[0]).all()):  # a constant stays the same in every order
            flat = flat + torch.rand(flat.shape, generator=generator).to(flat)
        factor = 0.75 + 0.5 * torch.rand(flat.shape, generator=generator)
        flat = flat * factor.to(flat)
    return flat.reshape(tensor.shape)


def _map(value: Any, path: Path, change: Callable[[Path, torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with other tensors in it. Containers are copied, so that the caller's stay as they are."""
    if isinstance(value, torch.Tensor):
        return change(path, value)
    parts = children(value)
    if not any(isinstance(leaf, torch.Tensor) for _, leaf in leaves(value)):
        return value
    new = {step: _map(part, (*path, step), change) for step, part in parts}
    if isinstance(value, Mapping):
        if type(value) is dict:
            return {key: new[("item", key)] for key in value}
        return _copy_with(value, new)
    if type(value) in (list, tuple):
        return type(value)(new.values())
    if isinstance(value, tuple):
        return type(value)(*new.values())
    return _copy_with(value, new)


def _copy_with(value: Any, new: dict[tuple[str, Any], Any]) -> Any:
    result = copy.copy(value)
    for (kind, key), part in new.items():
        if kind == "item":
            result[key] = part
        else:
            object.__setattr__(result, key, part)  # frozen dataclasses too: it is a copy
    return result


def read_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """Match what the caller gave with the signature of ``model.forward``.

    Raises:
        UsageError: the arguments do not fit the signature.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}. Positional ones go "
            "into example_inputs (a tuple), keyword ones into example_kwargs (a dict)"
        ) from None
    arguments: list[Argument] = []
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            extra = bound.arguments.get(name, ())
            arguments += [Argument(f"{name}_{i}", v, True, False) for i, v in enumerate(extra)]
        elif parameter.kind is parameter.VAR_KEYWORD:
            arguments += [Argument(k, v, True, True) for k, v in bound.arguments.get(name, {}).items()]
        elif name in bound.arguments:
            arguments.append(Argument(name, bound.arguments[name], True, name in kwargs))
        else:
            arguments.append(Argument(name, parameter.default, False, True))
    while arguments and not arguments[-1].given:
        arguments.pop()
    return Inputs(tuple(arguments))


def guard(
    graph: fx.Graph, placeholder: fx.Node, argument: Argument, fixed: Callable[[Path, torch.Tensor], Any]
) -> None:
    """Insert a check of ``placeholder`` where the graph's cursor stands, if there is anything to check.

    Args:
        graph: the graph.
        placeholder: the node of the argument.
        argument: what it was recorded with.
        fixed: for a tensor at a path, what is fixed: sizes (``None``: any), and floating point or not.
    """
    value = None if isinstance(argument.value, torch.Tensor) and not argument.given else argument.value
    expected = _expected(value, (), fixed)
    if expected not in (("tensor", None, None), ("any",)):
        graph.call_function(check_input, (placeholder, expected, argument.name))


def _expected(value: Any, path: Path, fixed: Callable[[Path, torch.Tensor], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return ("tensor", *fixed(path, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return ("value", value)
    parts = {step: _expected(part, (*path, step), fixed) for step, part in children(value)}
    if not parts:
        return ("any",)
    if isinstance(value, Mapping):
        if not all(isinstance(key, (str, int)) for key in value):
            return ("any",)
        return ("mapping", {key: part for (_, key), part in parts.items()})
    if isinstance(value, (list, tuple)):
        return ("sequence", tuple(parts.values()))
    return ("object", {key: part for (_, key), part in parts.items()})
