"""Plain values as JSON and back. What JSON has no form for is an object of one key, its kind: ``{"tuple": [1]}``."""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxcompress.errors import SerializationError
from fxcompress.reporting.figures import shortened
from fxcompress.serialization.vocabulary import Vocabulary, name_of
from fxcompress.storable import qualified_name, stored_names

__all__ = ["Json", "ValueReader", "ValueWriter", "damaged", "shown"]

Json = Any

_LARGEST = 2**63
_TORCH_WORDS: dict[str, dict[str, Any]] = {
    "dtype": {str(v)[len("torch.") :]: v for v in vars(torch).values() if isinstance(v, torch.dtype)},
    "layout": {str(v)[len("torch.") :]: v for v in vars(torch).values() if isinstance(v, torch.layout)},
    "memory_format": {str(v)[len("torch.") :]: v for v in vars(torch).values() if isinstance(v, torch.memory_format)},
}


def shown(value: Any) -> str:
    """``value``, which came from a file, in a message: short, and on one line."""
    return shortened(repr(value), 80)


def damaged(where: str, what: str) -> SerializationError:
    """The error for a file that says what it may not."""
    return SerializationError(f"{where}: {what}; the file is damaged or was not written by fxcompress.save")


class ValueWriter:
    """Writes values; derived classes say what stands for nodes, tensors and modules.

    Attributes:
        to_trust: names that will have to be trusted when the file is read.
    """

    def __init__(self) -> None:
        self.to_trust: dict[str, None] = {}

    def write(self, value: Any, where: str) -> Json:
        """``value`` as JSON.

        Args:
            value: what to write.
            where: what it is part of, for messages.

        Raises:
            SerializationError: there is no form for it.
        """
        special = self._special(value, where)
        if special is not None:
            return special
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if value is None or type(value) in (bool, int, str):
            return value
        for kind, found in (("tuple", tuple), ("size", torch.Size)):
            if type(value) is found:
                return {kind: [self.write(v, where) for v in value]}
        if isinstance(value, list):  # of torch.fx, too, which has lists and dicts of its own
            return [self.write(v, where) for v in value]
        if type(value) in (set, frozenset):
            return {type(value).__name__: [self.write(v, where) for v in sorted(value, key=repr)]}
        if isinstance(value, dict) and not isinstance(value, collections.defaultdict):
            kind = "ordered_dict" if isinstance(value, collections.OrderedDict) else "dict"
            return {kind: [[self.write(k, where), self.write(v, where)] for k, v in value.items()]}
        return self._other(value, where)

    def _special(self, value: Any, where: str) -> Json:
        """The form of what only a derived class knows; ``None`` if this is none of it."""
        return None

    def _other(self, value: Any, where: str) -> Json:
        if isinstance(value, (slice, range)):
            return {type(value).__name__: [self.write(v, where) for v in (value.start, value.stop, value.step)]}
        if isinstance(value, complex):
            return {"complex": [self.write(value.real, where), self.write(value.imag, where)]}
        if value is ...:
            return {"ellipsis": True}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        for kind in _TORCH_WORDS:
            if isinstance(value, getattr(torch, kind)):
                return {kind: str(value)[len("torch.") :]}
        if isinstance(value, (bytes, memoryview, type(torch), nn.Module, torch.Tensor)):
            raise SerializationError(f"{where}: {type(value).__name__} has no form in a saved graph")
        if isinstance(value, type) or (callable(value) and hasattr(value, "__name__")):
            return {"object": self.name(value, where)}
        return self._instance(value, where)

    def name(self, value: Any, where: str) -> str:
        """The name of a function or class; remembered if it has to be trusted."""
        name, trusted = name_of(value, where)
        if trusted:
            self.to_trust[name] = None
        return name

    def _instance(self, value: Any, where: str) -> Json:
        kind = type(value)
        if dataclasses.is_dataclass(kind) and stored_names().get(qualified_name(kind)) is kind:
            fields = {f.name: self.write(getattr(value, f.name), where) for f in dataclasses.fields(value)}
            return {"record": [qualified_name(kind), fields]}
        if isinstance(value, enum.Enum):
            return {"member": [self.name(kind, where), value.name]}
        if isinstance(value, (int, str, tuple, torch.dtype)) or not hasattr(value, "__dict__"):
            raise SerializationError(f"{where}: a value of {qualified_name(kind)} has no form in a saved graph")
        name = self.name(kind, where)
        state = {k: self.write(v, f"{where}.{k}") for k, v in vars(value).items()}
        return {"instance": [name, state]}


class ValueReader:
    """Reads what :class:`ValueWriter` wrote; derived classes say what stands for nodes, tensors and modules.

    Args:
        vocabulary: what may be named.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._kinds: dict[str, Callable[[Any, str], Any]] = {
            "tuple": lambda v, where: tuple(self._parts(v, where)),
            "size": lambda v, where: torch.Size(self._integers(v, where)),
            "set": lambda v, where: set(self._keys(v, where)),
            "frozenset": lambda v, where: frozenset(self._keys(v, where)),
            "dict": self._dict,
            "ordered_dict": lambda v, where: collections.OrderedDict(self._dict(v, where)),
            "slice": lambda v, where: slice(*self._parts(v, where, 3)),
            "range": self._range,
            "float": self._float,
            "complex": self._complex,
            "ellipsis": lambda v, where: ...,
            "device": self._device,
            "object": self._object,
            "record": self._record,
            "member": self._member,
            "instance": self._instance,
            **{kind: self._word(kind) for kind in _TORCH_WORDS},
        }

    def read(self, data: Json, where: str) -> Any:
        """The value.

        Raises:
            SerializationError: there is no such form, or it names what is not allowed.
        """
        if data is None or isinstance(data, (bool, float, str)):
            return data
        if isinstance(data, int):
            if not -_LARGEST <= data < 2 * _LARGEST:
                raise damaged(where, "an integer of more than 64 bits")
            return data
        if isinstance(data, list):
            return [self.read(v, where) for v in data]
        if not isinstance(data, dict) or len(data) != 1:
            raise damaged(where, f"{shown(data)} is no value")
        ((kind, content),) = data.items()
        if kind not in self._kinds:
            raise damaged(where, f"values of the kind {shown(kind)} are not known")
        return self._kinds[kind](content, where)

    def named(self, name: Json, where: str) -> Any:
        """The function or class of that name.

        Raises:
            SerializationError: it is not allowed.
        """
        found = self.vocabulary.find(name)
        if found is None:
            raise SerializationError(
                f"{where}: {shown(name)} is not among what a saved graph may call. If you trust the file, give it: "
                f"fxcompress.load(..., trusted=[{name if isinstance(name, str) else '...'}])"
            )
        return found

    def _object(self, name: Json, where: str) -> Any:
        found = self.named(name, where)
        if found is getattr:
            raise damaged(where, f"{shown(name)} as a value")
        return found

    def _parts(self, data: Json, where: str, count: int | None = None) -> list[Any]:
        if not isinstance(data, list) or (count is not None and len(data) != count):
            raise damaged(where, f"{shown(data)} is no list{'' if count is None else f' of {count}'}")
        return [self.read(v, where) for v in data]

    def _integers(self, data: Json, where: str, count: int | None = None) -> list[int]:
        parts = self._parts(data, where, count)
        if not all(type(v) is int and -_LARGEST <= v < _LARGEST for v in parts):
            raise damaged(where, f"{shown(data)} are no integers")
        return parts

    def _range(self, data: Json, where: str) -> range:
        start, stop, step = self._integers(data, where, 3)
        if step == 0:
            raise damaged(where, "a range without a step")
        return range(start, stop, step)

    def _keys(self, data: Json, where: str) -> list[Any]:
        parts = self._parts(data, where)
        for part in parts:
            self._check_key(part, where)
        return parts

    def _check_key(self, key: Any, where: str) -> None:
        plain = key is None or isinstance(key, (bool, int, float, str, torch.dtype, torch.device))
        if not plain and not (isinstance(key, tuple) and all(v is None or isinstance(v, (int, str)) for v in key)):
            raise damaged(where, f"{shown(key)} is no key")

    def _dict(self, data: Json, where: str) -> dict[Any, Any]:
        if not isinstance(data, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in data):
            raise damaged(where, f"{shown(data)} are no pairs")
        keys = self._keys([key for key, _ in data], where)
        return dict(zip(keys, (self.read(value, where) for _, value in data), strict=True))

    def _float(self, data: Json, where: str) -> float:
        if data not in ("inf", "-inf", "nan"):
            raise damaged(where, f"{shown(data)} is no number")
        return float(data)

    def _complex(self, data: Json, where: str) -> complex:
        parts = self._parts(data, where, 2)
        if not all(isinstance(v, float) for v in parts):
            raise damaged(where, f"{shown(data)} is no complex number")
        return complex(*parts)

    def _device(self, data: Json, where: str) -> torch.device:
        kind, _, index = data.partition(":") if isinstance(data, str) else ("", "", "")
        if kind not in ("cpu", "cuda", "mps", "xpu", "meta", "hpu", "mtia") or (index and not index[:3].isdecimal()):
            raise damaged(where, f"{shown(data)} is no device")
        try:
            return torch.device(data)
        except RuntimeError as error:
            raise damaged(where, f"{shown(data)} is no device") from error

    def _word(self, kind: str) -> Callable[[Any, str], Any]:
        def find(data: Json, where: str) -> Any:
            if not isinstance(data, str) or data not in _TORCH_WORDS[kind]:
                raise damaged(where, f"this PyTorch ({torch.__version__}) has no {kind} {shown(data)}")
            return _TORCH_WORDS[kind][data]

        return find

    def _record(self, data: Json, where: str) -> Any:
        name, fields = self._pair(data, where)
        kind = self.named(name, where)
        names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        if not isinstance(kind, type) or sorted(fields) != sorted(names):
            raise damaged(where, f"{shown(name)} has no fields {shown(sorted(fields))}")
        value: Any = object.__new__(kind)
        for field in names:
            object.__setattr__(value, field, self.read(fields[field], where))
        return value

    def _pair(self, data: Json, where: str) -> tuple[str, Mapping[str, Json]]:
        if not isinstance(data, list) or len(data) != 2 or not isinstance(data[1], dict):
            raise damaged(where, f"{shown(data)} is no name with fields")
        return data[0], data[1]

    def _trusted_class(self, name: Json, where: str) -> type:
        found = self.named(name, where)
        if not isinstance(found, type) or issubclass(found, nn.Module) or not self.vocabulary.is_trusted(found):
            raise damaged(where, f"{shown(name)} is no class that was given as trusted")
        return found

    def _member(self, data: Json, where: str) -> Any:
        if not isinstance(data, list) or len(data) != 2 or not isinstance(data[1], str):
            raise damaged(where, f"{shown(data)} is no member")
        members = getattr(self._trusted_class(data[0], where), "__members__", {})
        if data[1] not in members:
            raise damaged(where, f"{shown(data[0])} has no member {shown(data[1])}")
        return members[data[1]]

    def _instance(self, data: Json, where: str) -> Any:
        name, state = self._pair(data, where)
        kind = self._trusted_class(name, where)
        value: Any = object.__new__(kind)
        for attribute, content in state.items():
            if attribute.startswith("__"):
                raise damaged(where, f"the attribute {shown(attribute)}")
            value.__dict__[attribute] = self.read(content, where)
        return value
