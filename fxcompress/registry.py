"""From names to passes. Built-in passes and third parties register in the same entry-point group."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import types
import typing
import warnings
from collections.abc import Mapping, Sequence, Set
from importlib import metadata
from typing import Any, Literal, Union

from fxcompress.errors import FxCompressError, UsageError
from fxcompress.pass_base import Guarantee, Pass, Stage
from fxcompress.presets import PRESETS

__all__ = ["GROUP", "expanded", "registered_passes", "resolve", "resolve_all"]

GROUP = "fxcompress.passes"


def registered_passes() -> dict[str, type[Pass]]:
    """Every installed pass by name. One that cannot be imported is left out with a warning that says why.

    Raises:
        UsageError: two distributions register the same name, an entry is no :class:`Pass`, or its ``name`` differs from
            the entry's; or this package is not installed.
    """
    found: dict[str, type[Pass]] = {}
    for name, entry in sorted(_entries().items()):
        try:
            found[name] = _load(entry)
        except _BrokenEntry as error:
            warnings.warn(str(error), stacklevel=2)
    return found


class _BrokenEntry(UsageError):
    """An entry point whose module or object cannot be imported."""


def _entries() -> dict[str, metadata.EntryPoint]:
    entries: dict[str, metadata.EntryPoint] = {}
    for entry in metadata.entry_points(group=GROUP):
        if entry.name in entries:
            raise UsageError(
                f"the pass name {entry.name!r} is registered twice, by {_origin(entries[entry.name])} and by "
                f"{_origin(entry)}; uninstall one of them"
            )
        if entry.name in PRESETS:
            raise UsageError(f"{_origin(entry)} registers a pass {entry.name!r}, which is the name of a preset")
        entries[entry.name] = entry
    if not any(entry.value.startswith("fxcompress.passes.") for entry in entries.values()):
        raise UsageError(
            "fxcompress is importable but not installed, so its passes have no names; run `pip install -e .` in its "
            "folder, or give Pass objects instead of names"
        )
    return entries


def _origin(entry: metadata.EntryPoint) -> str:
    distribution = getattr(entry, "dist", None)
    return f"{distribution.name if distribution else 'an unknown distribution'} ({entry.value})"


def _load(entry: metadata.EntryPoint) -> type[Pass]:
    try:
        loaded = entry.load()
    except Exception as error:  # whatever a third party's module raises
        raise _BrokenEntry(
            f"the pass {entry.name!r} of {_origin(entry)} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise UsageError(f"the entry {entry.name!r} of {_origin(entry)} is {loaded!r}, which is no subclass of Pass")
    if getattr(loaded, "name", None) != entry.name:
        raise UsageError(
            f"{_origin(entry)} is registered as {entry.name!r} but {loaded.__qualname__}.name is "
            f"{getattr(loaded, 'name', None)!r}; they must be the same"
        )
    return loaded


def expanded(passes: Any) -> list[Any]:
    """A list of whatever :func:`resolve` takes, from such a list or one of them by itself, with presets written out.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(passes, (str, Pass, type)):
        passes = [passes]
    if not isinstance(passes, Sequence):
        raise UsageError(f"`passes` is a list of Pass objects and names, not {type(passes).__name__}")
    return [one for spec in passes for one in _written_out(spec)]


def _written_out(spec: Any) -> Sequence[Any]:
    name, colon, _ = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    found = PRESETS.get(name.strip())
    if found is not None and colon:
        raise UsageError(
            f"{name.strip()!r} is a preset and has no options; take its passes, {', '.join(found)}, and change those"
        )
    return (spec,) if found is None else found


def resolve_all(passes: Any) -> list[Pass]:
    """The passes that a list means, or one by itself; presets are written out.

    Raises:
        UsageError: as in :func:`resolve`.
    """
    return [resolve(spec) for spec in expanded(passes)]


def resolve(spec: Any) -> Pass:
    """The pass that ``spec`` means.

    Args:
        spec: a :class:`Pass`, a class of one that needs no options, a registered name such as ``"fold-batch-norm"``,
            or ``"name:option=value,option=value"`` with values as Python literals (anything else is a string).

    Raises:
        UsageError: there is no such pass (the message names the nearest) or no such option, a value does not fit, or
            ``spec`` is something else.
    """
    if isinstance(spec, str):
        name, _, options = spec.partition(":")
        return _from_name(name.strip(), options)
    if isinstance(spec, type) and issubclass(spec, Pass):
        return _build(spec, {})
    if isinstance(spec, Pass):
        _check_contract(type(spec))
        return spec
    raise UsageError(
        f"a pass is a Pass object, its registered name, or 'name:option=value', not {spec!r} ({type(spec).__name__})"
    )


def _from_name(name: str, options: str) -> Pass:
    entries = _entries()
    if name not in entries:
        known = [*entries, *PRESETS]
        near = difflib.get_close_matches(name.replace("_", "-").lower(), known, n=1, cutoff=0.0)
        raise UsageError(
            f"there is no pass {name!r}; did you mean {near[0]!r}? Passes: {', '.join(sorted(entries))}; "
            f"presets: {', '.join(PRESETS)}"
        )
    return _build(_load(entries[name]), dict(_assignment(name, text) for text in _split(options)))


def _split(options: str) -> list[str]:
    """Split at the commas that are not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for char in options:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
            if char == "," and not depth:
                parts.append("")
                continue
        parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _assignment(name: str, text: str) -> tuple[str, str]:
    option, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"options of {name!r} are written 'option=value,option=value', found {text!r}")
    return option.strip(), value.strip()


def _check_contract(cls: type[Pass]) -> None:
    if "__dataclass_fields__" not in vars(cls):
        raise UsageError(f"{cls.__qualname__} must be decorated with @dataclasses.dataclass(frozen=True)")
    if not isinstance(getattr(cls, "name", None), str) or not isinstance(getattr(cls, "guarantee", None), Guarantee):
        raise UsageError(f"{cls.__qualname__} needs the class attributes `name` (a str) and `guarantee` (a Guarantee)")
    for attribute in ("before", "after", "pays_with"):
        names = getattr(cls, attribute)
        if not isinstance(names, Set) or not all(isinstance(name, str) for name in names):
            raise UsageError(f"{cls.__qualname__}.{attribute} is a set of names of passes, not {names!r}")
    if cls.stage is not None and not isinstance(cls.stage, Stage):
        raise UsageError(f"{cls.__qualname__}.stage is an fxcompress.Stage or None, not {cls.stage!r}")


def _build(cls: type[Pass], texts: Mapping[str, str]) -> Pass:
    _check_contract(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for option in texts:
        if option not in fields:
            known = ", ".join(fields) or "none"
            raise UsageError(f"pass {cls.name!r} has no option {option!r}; its options: {known}")
    missing = dataclasses.MISSING
    for option, field in fields.items():
        if option not in texts and field.default is missing and field.default_factory is missing:
            raise UsageError(f"pass {cls.name!r} needs the option {option!r}, as in '{cls.name}:{option}=...'")
    values = {option: _value(cls.name, option, text, hints[option]) for option, text in texts.items()}
    try:
        return cls(**values)
    except FxCompressError:
        raise
    except Exception as error:  # a __post_init__ that refuses its options
        raise UsageError(f"pass {cls.name!r} cannot be made with {values}: {error}") from error


class _Misfit(Exception):
    """A value that is not of the annotated type."""


def _value(name: str, option: str, text: str, annotation: Any) -> Any:
    try:
        literal = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        literal = text
    for candidate in (literal, text):
        try:
            return _fit(candidate, annotation)
        except _Misfit:
            continue
    wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    raise UsageError(f"option {option!r} of pass {name!r} is {wanted}; {text!r} is {type(literal).__name__}")


def _fit(value: Any, annotation: Any) -> Any:
    """``value`` as ``annotation`` wants it: lists become tuples, integers floats, names enum members."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _fit_any(value, arguments)
    if origin is Literal:
        return _require(value in arguments, value)
    if annotation is float:
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), value)
        return float(value)
    if annotation is int:
        return _require(isinstance(value, int) and not isinstance(value, bool), value)
    if annotation is None or annotation is type(None):
        return _require(value is None, value)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _fit_enum(value, annotation)
    container = origin or annotation
    if container in (tuple, list, frozenset, set, Sequence):
        _require(isinstance(value, (tuple, list, set)), value)
        element = arguments[0] if arguments else Any
        if container is tuple and arguments and arguments[-1] is not Ellipsis:
            _require(len(value) == len(arguments), value)
            return tuple(_fit(v, a) for v, a in zip(value, arguments, strict=True))
        return (tuple if container is Sequence else container)(_fit(v, element) for v in value)
    # Of other generic types (dict[str, int], say) only the outside is checked.
    return _require(not isinstance(container, type) or isinstance(value, container), value)


def _require(fits: bool, value: Any) -> Any:
    if not fits:
        raise _Misfit(value)
    return value


def _fit_any(value: Any, annotations: tuple[Any, ...]) -> Any:
    # An exact match first: 1 for `float | int` stays an integer.
    for annotation in sorted(annotations, key=lambda a: type(value) is not a):
        try:
            return _fit(value, annotation)
        except _Misfit:
            continue
    raise _Misfit(value)


def _fit_enum(value: Any, annotation: type[enum.Enum]) -> enum.Enum:
    for member in annotation:
        if value == member.value or value == member.name:
            return member
    raise _Misfit(value)
