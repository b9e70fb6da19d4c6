"""From the words on the command line to passes, tensors and models, with an error that names the word that is wrong."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxcompress.errors import UsageError

__all__ = ["INTEGER_INPUTS_BELOW", "parse_input", "read_batches", "read_dtype", "resolve_model", "split_passes"]

INTEGER_INPUTS_BELOW = 10

_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[(]*[\])])")


def split_passes(text: str) -> list[str]:
    """Split ``"a,b:x=1,y=2,c"`` into ``["a", "b:x=1,y=2", "c"]``: ``y=2`` is no name, so it belongs to the pass before.

    Raises:
        UsageError: an option comes before any pass, or a name is empty.
    """
    passes: list[str] = []
    for piece in _COMMA_OUTSIDE_BRACKETS.split(text) if text.strip() else []:
        if "=" in piece and ":" not in piece.partition("=")[0]:
            if not passes:
                raise UsageError(f"--passes {text!r}: the option {piece!r} comes before any pass name")
            passes[-1] += ("," if ":" in passes[-1] else ":") + piece.strip()
        elif piece.strip():
            passes.append(piece.strip())
        else:
            raise UsageError(f"--passes {text!r}: empty pass name")
    return passes


def read_dtype(name: str, floating: bool = False) -> torch.dtype:
    """The ``torch.dtype`` called ``name``.

    Raises:
        UsageError: there is none, or it is no ``floating`` one.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or (floating and not dtype.is_floating_point):
        kinds = "float32, float64, float16 or bfloat16" + ("" if floating else ", int64, bool")
        raise UsageError(f"{name!r} is no {'floating ' if floating else ''}dtype here; try {kinds}")
    return dtype


def parse_input(text: str, default_dtype: torch.dtype) -> torch.Tensor:
    """A random tensor for ``"1,3,224,224"`` or, with a type of its own, ``"1,16:int64"``.

    Raises:
        UsageError: the text is no shape, or the dtype is unknown.
    """
    shape_text, _, dtype_text = text.partition(":")
    dtype = read_dtype(dtype_text) if dtype_text else default_dtype
    try:
        shape = [int(size) for size in shape_text.split(",")]
    except ValueError as error:
        raise UsageError(f"--input {text!r} is no shape; write sizes with commas, such as 1,3,224,224") from error
    if min(shape) < 1:
        raise UsageError(f"--input {text!r}: every size must be at least 1")
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype)
    return torch.randint(0, 2 if dtype == torch.bool else INTEGER_INPUTS_BELOW, shape).to(dtype)


def read_batches(path: Path) -> list[Any]:
    """The batches in a file that ``torch.save`` wrote: a list of what calibration data is, or one tensor, a batch.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # of the file, the format or the unpickler
        raise UsageError(f"--calibration {path} cannot be read: {type(error).__name__}: {error}") from error
    if isinstance(found, torch.Tensor):
        return [found]
    if not isinstance(found, list) or not found:
        raise UsageError(f"--calibration {path} holds a {type(found).__name__}, and not a list of batches")
    return found


def resolve_model(target: str) -> nn.Module:
    """Import ``MODULE:CALLABLE`` (the working directory comes first on the path), call it and return the model.

    The name may also be that of a module instance, which is then taken as it is.

    Raises:
        UsageError: there is no such module or name, calling it fails, or the result is no ``nn.Module``.
    """
    module_name, _, path = target.partition(":")
    if not module_name or not path:
        raise UsageError(
            f"{target!r} does not name a model factory; write MODULE:CALLABLE, such as mypackage.nets:small"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(f"importing {module_name!r} failed: {error}") from error
        raise UsageError(f"there is no module {error.name!r} here or in the environment") from error
    except Exception as error:
        raise UsageError(f"importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise UsageError(f"{target!r}: {getattr(found, '__name__', found)!r} has no attribute {name!r}")
        found = getattr(found, name)
    return _call_factory(found, target)


def _call_factory(factory: Any, target: str) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise UsageError(f"{target!r} is a {type(factory).__name__} and cannot be called for a model")
    try:
        model = factory()
    except Exception as error:
        raise UsageError(f"calling {target!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{target!r} gave a {type(model).__name__}; expected a torch.nn.Module")
    return model
