"""HTML that cannot be broken out of: whatever is not :class:`Markup` already is text, and escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

__all__ = ["Markup", "join", "number", "tag"]

_VOID = frozenset({"input", "link", "meta"})


class Markup(str):
    """A string that is HTML. Made by :func:`tag` and :func:`join` only."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: text, elements, iterables of both; ``None`` is nothing.
        attributes: ``class_`` is ``class``, ``aria_label`` is ``aria-label``; ``None`` and ``False`` leave one out,
            ``True`` gives one without a value.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(str(value))}"')
    start = f"<{' '.join(words)}>"
    return Markup(start) if name in _VOID else Markup(f"{start}{join(children)}</{name}>")


def join(children: Iterable[Any], between: str = "") -> Markup:
    """Children one after another, with escaped text ``between`` them."""
    return Markup(html.escape(between).join(_markup(child) for child in children))


def _markup(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, Iterable) and not isinstance(child, str):
        return join(child)
    return html.escape(str(child))


def number(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
