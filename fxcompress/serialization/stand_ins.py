"""Stand-ins for the classes in which a model gives its outputs, where the classes themselves are not there."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

__all__ = ["StandIn", "stand_in"]


class StandIn:
    """Holds what a dataclass or named tuple of the original model would: by attribute, by key, and by position among
    the fields that are not ``None``.

    Use :func:`stand_in` for the class of an original.
    """

    original: str = ""
    fields: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self.fields, args, strict=False))
        for name in self.fields:
            setattr(self, name, kwargs.get(name, given.get(name)))

    def keys(self) -> list[str]:
        """The names of fields that are not ``None``."""
        return [name for name in self.fields if getattr(self, name) is not None]

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return tuple(self)[key]

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.keys())
        return f"StandIn of {self.original}({parts})"


@functools.cache
def stand_in(original: str, fields: tuple[str, ...]) -> type[StandIn]:
    """The class that stands for ``original``, a qualified name, with these fields."""
    return type("StandIn", (StandIn,), {"original": original, "fields": fields, "__module__": __name__})
