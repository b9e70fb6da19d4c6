"""Modules as JSON and back: class, flags, parameters, buffers, children and plain attributes, each module once.

Modules are numbered from the leaves up, so that each refers only to numbers before its own, and no file can describe a
module that contains itself.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import SerializationError
from fxcompress.report import CARRIER
from fxcompress.serialization.graphs import ArgumentWriter, GraphReader, check_path, write_graph
from fxcompress.serialization.tensors import TensorReader, TensorWriter
from fxcompress.serialization.values import Json, ValueReader, ValueWriter, damaged, shown
from fxcompress.serialization.vocabulary import Vocabulary, own_name

__all__ = ["ModuleReader", "ModuleWriter"]

_GRAPH = "torch.fx.GraphModule"
_INTERNAL = frozenset(nn.Module().__dict__)
_HOOKS = tuple(sorted(name for name in _INTERNAL if name.endswith("_hooks")))
_FIELDS = frozenset(
    ("attributes", "buffers", "class", "graph", "modules", "name", "non_persistent", "parameters", "training")
)
_CLASS_NAME = re.compile(r"[^\W\d]\w*")


class ModuleWriter(ValueWriter):
    """Writes modules.

    Args:
        tensors: gives tensors their numbers.
        arguments: writes arguments of nodes.
    """

    def __init__(self, tensors: TensorWriter, arguments: ArgumentWriter) -> None:
        super().__init__()
        self.entries: list[Json] = []
        self._tensors, self._arguments = tensors, arguments
        self.to_trust = arguments.to_trust
        self._numbers: dict[int, int | None] = {}
        self._path = ""

    def number(self, module: nn.Module, path: str, run: frozenset[str] | None = None) -> int:
        """The number of ``module``, written when it is first met.

        Args:
            module: the module.
            path: where it is.
            run: paths of the modules that are run, if this one only holds them; of its own nothing is kept then
                that is not known. ``None``: it is run, and what is below it may be.

        Raises:
            SerializationError: it, or something in it, has no form.
        """
        if id(module) in self._numbers:
            number = self._numbers[id(module)]
            if number is None:
                raise SerializationError(f"{path or 'the graph'} contains itself")
            return number
        self._numbers[id(module)] = None
        outer, self._path = self._path, path
        entry = self._graph(module, path) if isinstance(module, fx.GraphModule) else self._module(module, path, run)
        self._path = outer
        self.entries.append(entry)
        self._numbers[id(module)] = len(self.entries) - 1
        return len(self.entries) - 1

    def _graph(self, gm: fx.GraphModule, path: str) -> Json:
        _refuse_hooks(gm, path)
        called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
        called |= {str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and _is_module(gm, str(n.target))}
        entry = self._common(gm, path, frozenset(_join(path, target) for target in called))
        name = type(gm).__name__ if _CLASS_NAME.fullmatch(type(gm).__name__) else "GraphModule"
        return {"class": _GRAPH, "name": name, **entry, "graph": write_graph(gm.graph, self._arguments)}

    def _module(self, module: nn.Module, path: str, run: frozenset[str] | None) -> Json:
        kind = type(module)
        if run is None:
            _refuse_hooks(module, path)
        elif own_name(kind) is None:
            return {"class": f"{nn.Module.__module__}.Module", **self._common(module, path, run)}
        where = f"module {path!r} ({kind.__name__})"
        entry = {"class": self.name(kind, where), **self._common(module, path, run)}
        attributes = {}
        for name, value in self._state(module, where).items():
            _check_attribute(kind, name, where)
            attributes[name] = self.write(value, f"{where}, attribute {name!r}")
        return {**entry, "attributes": attributes} if attributes else entry

    def _state(self, module: nn.Module, where: str) -> Mapping[str, Any]:
        state = module.__getstate__()  # type: ignore[no-untyped-call]
        if not isinstance(state, dict):
            raise SerializationError(f"{where}: its __getstate__ gives no dict")
        return {name: value for name, value in state.items() if name not in _INTERNAL}

    def _common(self, module: nn.Module, path: str, run: frozenset[str] | None) -> dict[str, Json]:
        """Flags, parameters, buffers and children."""
        entry: dict[str, Json] = {"training": True} if module.training else {}
        for kind, table in (("parameters", module._parameters), ("buffers", module._buffers)):
            numbers: dict[str, Json] = {}
            for name, tensor in table.items():
                check_path(name, f"module {path!r}")
                numbers[name] = None if tensor is None else self._tensors.number(tensor, _join(path, name))
            if numbers:
                entry[kind] = numbers
        if module._non_persistent_buffers_set:
            entry["non_persistent"] = sorted(module._non_persistent_buffers_set)
        children: dict[str, Json] = {}
        for name, child in module._modules.items():
            if name != CARRIER:
                below = check_path(_join(path, name), f"module {path!r}")
                inside = None if run is None or below in run else run
                children[name] = None if child is None else self.number(child, below, inside)
        if children:
            entry["modules"] = children
        return entry

    def _special(self, value: Any, where: str) -> Json:
        if isinstance(value, nn.Module):
            return {"module": self.number(value, f"{self._path}.(attribute)")}
        if isinstance(value, torch.Tensor):
            return {"tensor": self._tensors.number(value, f"{self._path}.(attribute {len(self.entries)})")}
        return None


def _refuse_hooks(module: nn.Module, path: str) -> None:
    hooks = [name for name in _HOOKS if vars(module).get(name)]
    if hooks:
        raise SerializationError(
            f"module {path or 'of the graph'!r} has hooks ({', '.join(hooks)}), which are code; remove them first"
        )


def _is_module(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_attribute(kind: type, name: Any, where: str) -> None:
    """Refuse attributes that would take the place of what a class or Python gives to objects."""
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("__") or _is_internal(name):
        raise SerializationError(f"{where}: an attribute may not be called {shown(name)}")
    if hasattr(kind, name) and (callable(getattr(kind, name)) or isinstance(getattr(kind, name), property)):
        raise SerializationError(f"{where}: its attribute {name!r} takes the place of a method of its class")


def _is_internal(name: str) -> bool:
    return name in _INTERNAL or hasattr(nn.Module, name)


class ModuleReader(ValueReader):
    """Reads modules.

    Args:
        vocabulary: which classes are allowed, and what graphs may call.
        tensors: has the tensors by number.
        stand_ins: see :class:`~fxcompress.serialization.graphs.GraphReader`.
    """

    def __init__(self, vocabulary: Vocabulary, tensors: TensorReader, stand_ins: bool) -> None:
        super().__init__(vocabulary)
        self._tensors, self._stand_ins = tensors, stand_ins
        self._modules: list[nn.Module] = []
        self._kinds["tensor"] = lambda v, where: self._tensors[v]
        self._kinds["module"] = self._module

    def read_modules(self, data: Json) -> fx.GraphModule:
        """All modules; the last is the graph that was saved.

        Raises:
            SerializationError: they are damaged, or name what is not allowed.
        """
        if not isinstance(data, list) or not data:
            raise damaged("modules", "no list")
        for number, entry in enumerate(data):
            self._modules.append(self._read(entry, f"module {number}"))
        root = self._modules[-1]
        if not isinstance(root, fx.GraphModule):
            raise damaged("modules", "the last one is no graph")
        return root

    def _module(self, number: Json, where: str) -> nn.Module:
        if type(number) is not int or not 0 <= number < len(self._modules):
            raise damaged(where, f"there is no module {shown(number)} before it")
        return self._modules[number]

    def _read(self, entry: Json, where: str) -> nn.Module:
        if not isinstance(entry, dict) or set(entry) - _FIELDS or type(entry.get("training", True)) is not bool:
            raise damaged(where, f"{shown(entry)} is no module")
        name = entry.get("class")
        if name == _GRAPH:
            return self._graph(entry, where)
        kind = self.named(name, where)
        if not isinstance(kind, type) or not issubclass(kind, nn.Module) or "graph" in entry or "name" in entry:
            raise damaged(where, f"{shown(name)} is no class of modules")
        module: nn.Module = kind.__new__(kind)
        nn.Module.__init__(module)
        self._fill(module, entry, where)
        state = self._attributes(kind, entry.get("attributes", {}), f"{where} ({kind.__name__})")
        if kind.__module__.startswith("torch."):
            module.__dict__.update(state)
            _finish(module, where)
        else:
            module.__setstate__({**module.__dict__, **state})  # type: ignore[no-untyped-call]
        return module

    def _attributes(self, kind: type, data: Json, where: str) -> dict[str, Any]:
        if not isinstance(data, dict):
            raise damaged(where, "attributes that are none")
        for name in data:
            _check_attribute(kind, name, where)
        return {name: self.read(value, f"{where}, attribute {name!r}") for name, value in data.items()}

    def _fill(self, module: nn.Module, entry: dict[str, Json], where: str) -> None:
        module.__dict__["training"] = entry.get("training", False)
        taken: set[str] = set()
        for field, table in (
            ("parameters", module._parameters),
            ("buffers", module._buffers),
            ("modules", module._modules),
        ):
            data = entry.get(field, {})
            if not isinstance(data, dict) or taken & set(data):
                raise damaged(where, f"{field} that are none, or have names of others")
            taken |= set(data)
            for name, number in data.items():
                if "." in check_path(name, where) or hasattr(nn.Module, name):
                    raise damaged(where, f"{shown(name)} is no name of {field}")
                table[name] = None if number is None else self._part(field, number, where)
        names = entry.get("non_persistent", [])
        if not isinstance(names, list) or not all(isinstance(n, str) and n in module._buffers for n in names):
            raise damaged(where, f"{shown(names)} are no buffers")
        module._non_persistent_buffers_set.update(names)

    def _part(self, field: str, number: Json, where: str) -> Any:
        if field == "modules":
            return self._module(number, where)
        tensor = self._tensors[number]
        if isinstance(tensor, nn.Parameter) is not (field == "parameters"):
            raise damaged(where, f"tensor {number} is not one of its {field}")
        return tensor

    def _graph(self, entry: dict[str, Json], where: str) -> nn.Module:
        name = entry.get("name")
        if not isinstance(name, str) or not _CLASS_NAME.fullmatch(name) or "attributes" in entry:
            raise damaged(where, f"{shown(name)} is no name of a graph")
        root = nn.Module()
        self._fill(root, entry, where)
        graph = GraphReader(self.vocabulary, root, self._stand_ins).read_graph(entry.get("graph"))
        gm = fx.GraphModule(nn.Module(), fx.Graph(), class_name=name)
        # Not by way of GraphModule's own copying, which takes only what nodes name, and makes all buffers persistent.
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            gm.__dict__[table] = getattr(root, table)
        gm.__dict__["training"] = root.training
        try:
            gm.graph = graph
        except Exception as error:  # whatever the code generator of torch.fx stumbles over
            raise damaged(where, f"its nodes give no code ({type(error).__name__}: {error})") from error
        return gm


def _finish(module: nn.Module, where: str) -> None:
    """Make what a class of ``torch.nn`` keeps in memory only."""
    if isinstance(module, nn.RNNBase):
        weights = module.__dict__.get("_flat_weights")
        if not isinstance(weights, list) or not all(w is None or isinstance(w, torch.Tensor) for w in weights):
            raise damaged(where, "a recurrent layer without weights")
        module.__dict__["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in weights]
