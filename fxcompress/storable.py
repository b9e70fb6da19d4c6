"""What of this package, and of packages that extend it, may stand in a saved graph.

A class or function that a pass puts into graphs is marked by :func:`storable`; :func:`fxcompress.load` finds it by its
qualified name once the module that defines it has been imported, which looking up all registered passes does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

__all__ = ["qualified_name", "storable", "stored_names"]

T = TypeVar("T")

_STORABLE: dict[str, Any] = {}


def qualified_name(value: Any) -> str:
    """Module and name of a class or function."""
    return f"{value.__module__}.{value.__qualname__}"


def storable(value: T) -> T:
    """Allow saved graphs to name ``value``; as a decorator.

    Modules (their attributes must be plain values, or they define ``__getstate__`` and ``__setstate__`` such that the
    state is), frozen dataclasses of plain values that modules have as attributes, and functions that nodes call.
    """
    _STORABLE[qualified_name(value)] = value
    return value


def stored_names() -> Mapping[str, Any]:
    """Everything that was marked so far, by qualified name."""
    return MappingProxyType(_STORABLE)
