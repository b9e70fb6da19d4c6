"""The nodes of a graph as JSON and back.

A graph becomes Python code when it is read, so everything that stands in that code is looked at: names must be
identifiers, targets must be what :mod:`~fxcompress.serialization.vocabulary` allows, and arguments plain values.
"""

from __future__ import annotations

import dataclasses
import keyword
import re
from typing import Any

from torch import fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxcompress.errors import SerializationError
from fxcompress.serialization.stand_ins import stand_in
from fxcompress.serialization.values import Json, ValueReader, ValueWriter, damaged, shown
from fxcompress.serialization.vocabulary import Vocabulary, is_attribute, is_method

__all__ = ["ArgumentWriter", "GraphReader", "check_path", "write_graph"]

_PLACEHOLDER = re.compile(r"\*{0,2}([^\W\d]\w*)")
_PART = re.compile(r"[^\x00-\x1f\x7f\"'\\.]+")
_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")


def check_path(path: Any, where: str) -> str:
    """``path`` if it is a dotted path that a graph's code may hold.

    Raises:
        SerializationError: it is not.
    """
    parts = path.split(".") if isinstance(path, str) else [""]
    if not all(_PART.fullmatch(part) and not part.startswith("__") for part in parts):
        raise SerializationError(f"{where}: {shown(path)} is no path of modules that a saved graph may have")
    return str(path)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("__")


class ArgumentWriter(ValueWriter):
    """Writes arguments of nodes."""

    def _special(self, value: Any, where: str) -> Json:
        return {"node": value.name} if isinstance(value, fx.Node) else None

    def _instance(self, value: Any, where: str) -> Json:
        raise SerializationError(f"{where}: an argument of {type(value).__name__} has no form in a saved graph")


def write_graph(graph: fx.Graph, writer: ArgumentWriter) -> Json:
    """``graph`` as JSON.

    Raises:
        SerializationError: a node calls, or takes, what has no form.
    """
    nodes = []
    for node in graph.nodes:
        where = f"node {node.name!r}"
        if not _is_name(node.name):
            raise SerializationError(f"{where} has a name that is no identifier; rename it")
        entry: dict[str, Json] = {"op": node.op, "name": node.name, "target": _written_target(node, writer, where)}
        if node.args:
            entry["args"] = [writer.write(a, where) for a in node.args]
        if node.kwargs:
            entry["kwargs"] = {k: writer.write(v, where) for k, v in node.kwargs.items()}
        fields = _fields_of(node.target)
        if fields is not None:
            entry["fields"] = fields
        nodes.append(entry)
    return {"nodes": nodes, **_write_code(graph, writer)}


def _written_target(node: fx.Node, writer: ArgumentWriter, where: str) -> str:
    target: Any = node.target
    if node.op == "call_function":
        return writer.name(target, where)
    if node.op == "call_method" and not is_method(target):
        raise SerializationError(f"{where} calls the method {target!r}, which is not among what a saved graph may call")
    if node.op in ("get_attr", "call_module"):
        check_path(target, where)
    return str(target)


def _fields_of(target: Any) -> list[str] | None:
    """The fields of a dataclass or named tuple, by which a stand-in for it can be made."""
    if not isinstance(target, type):
        return None
    if dataclasses.is_dataclass(target):
        return [f.name for f in dataclasses.fields(target)]
    return list(target._fields) if issubclass(target, tuple) and hasattr(target, "_fields") else None


def _write_code(graph: fx.Graph, writer: ArgumentWriter) -> dict[str, Json]:
    """How inputs are taken apart and outputs put together, if not one by one."""
    code = graph._codegen
    if type(code) is CodeGen:
        return {}
    if type(code) is not _PyTreeCodeGen:
        raise SerializationError(f"the graph's code generator is a {type(code).__name__}, which has no form")
    info = code.pytree_info
    specs = (info.in_spec, info.out_spec)
    in_spec, out_spec = (None if s is None else _write_spec(s, writer) for s in specs)
    return {"pytree": {"arguments": list(info.orig_args), "inputs": in_spec, "outputs": out_spec}}


_CONTAINERS = {"tuple": tuple, "list": list, "dict": dict}


def _write_spec(spec: pytree.TreeSpec, writer: ArgumentWriter) -> Json:
    if spec.is_leaf():
        return None
    children = [_write_spec(spec.child(i), writer) for i in range(spec.num_children)]
    for kind, found in _CONTAINERS.items():
        if spec.type is found:
            context = None if spec.context is None else writer.write(list(spec.context), "a container")
            return [kind, context, children]
    raise SerializationError(f"inputs or outputs in a {spec.type} have no form; use tuples, lists and dicts")


def _read_spec(data: Json, reader: ValueReader) -> pytree.TreeSpec:
    if data is None:
        return pytree.treespec_leaf()
    fits = isinstance(data, list) and len(data) == 3 and isinstance(data[2], list) and isinstance(data[0], str)
    if not fits or data[0] not in _CONTAINERS:
        raise damaged("pytree", f"{shown(data)} is no container")
    kind, children = data[0], [_read_spec(child, reader) for child in data[2]]
    if kind != "dict":
        return pytree.TreeSpec(_CONTAINERS[kind], None, children)
    keys = reader.read(data[1], "pytree")
    if not isinstance(keys, list) or len(keys) != len(children) or len({*map(repr, keys)}) != len(keys):
        raise damaged("pytree", "a dict whose keys do not fit its values")
    if not all(isinstance(k, (str, int)) for k in keys):
        raise damaged("pytree", f"{shown(keys)} are no keys")
    return pytree.TreeSpec(dict, keys, children)


class GraphReader(ValueReader):
    """Reads the nodes of one graph.

    Args:
        vocabulary: what may be called.
        root: the module that the graph belongs to, with all that is below it.
        stand_ins: whether dataclasses and named tuples that are not allowed get a stand-in.
    """

    def __init__(self, vocabulary: Vocabulary, root: nn.Module, stand_ins: bool) -> None:
        super().__init__(vocabulary)
        self._root, self._stand_ins = root, stand_ins
        self._nodes: dict[str, fx.Node] = {}
        self._ended = False
        self._kinds["node"] = self._node
        for kind in ("record", "instance", "member", "set", "frozenset"):
            del self._kinds[kind]

    def read_graph(self, data: Json) -> fx.Graph:
        """The graph.

        Raises:
            SerializationError: it is not one, or calls what it may not.
        """
        if not isinstance(data, dict) or not isinstance(data.get("nodes"), list) or set(data) - {"nodes", "pytree"}:
            raise damaged("graph", "no list of nodes")
        graph = fx.Graph()
        for number, entry in enumerate(data["nodes"]):
            self._add(graph, entry, f"node {number}")
        if not self._ended:
            raise damaged("graph", "no output at the end")
        if "pytree" in data:
            graph.set_codegen(_PyTreeCodeGen(self._pytree(data["pytree"])))
        return graph

    def _add(self, graph: fx.Graph, entry: Json, where: str) -> None:
        known = {"op", "name", "target", "args", "kwargs", "fields"}
        if not isinstance(entry, dict) or set(entry) - known or entry.get("op") not in _OPS:
            raise damaged(where, f"{shown(entry)} is no node")
        op, name = entry["op"], str(entry.get("name"))
        if not _is_name(entry.get("name")) or name in self._nodes:
            raise damaged(where, f"{shown(name)} is no name, or that of another node")
        where = f"node {name!r}"
        if self._ended:
            raise damaged(where, "a node after the output")
        args = tuple(self._parts(entry.get("args", []), where))
        kwargs = self._keywords(entry.get("kwargs", {}), where)
        if op in ("placeholder", "output", "get_attr"):
            most = {"placeholder": 1, "output": 1, "get_attr": 0}[op]
            if kwargs or len(args) > most or (op == "output" and len(args) != 1):
                raise damaged(where, f"arguments that a node {op} does not have")
        target = self._target(op, entry, args, where)
        _check_strings((args, kwargs), where)
        node = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            node.name = name  # torch.fx renames what looks like a builtin; in code that it made itself it does not
        self._nodes[name] = node
        self._ended = op == "output"

    def _keywords(self, data: Json, where: str) -> dict[str, Any]:
        if not isinstance(data, dict) or not all(_is_name(k) for k in data):
            raise damaged(where, f"{shown(data)} are no keywords")
        return {k: self.read(v, where) for k, v in data.items()}

    def _node(self, name: Json, where: str) -> fx.Node:
        found = self._nodes.get(name) if isinstance(name, str) else None
        if found is None or found.op == "output":
            raise damaged(where, f"it reads {shown(name)}, which is no node before it")
        return found

    def _target(self, op: str, entry: dict[str, Json], args: tuple[Any, ...], where: str) -> Any:
        target = entry.get("target")
        if op == "placeholder":
            match = _PLACEHOLDER.fullmatch(target) if isinstance(target, str) else None
            if match is None or not _is_name(match[1]):
                raise damaged(where, f"{shown(target)} is no name of an argument")
        elif op == "output":
            target = "output"
        elif op == "call_method":
            if not is_method(target) or not args:
                raise SerializationError(f"{where}: {shown(target)} is no method that a saved graph may call")
        elif op == "call_function":
            return self._function(target, entry.get("fields"), args, where)
        else:
            self._below(check_path(target, where), op == "call_module", where)
        return target

    def _function(self, name: Json, fields: Json, args: tuple[Any, ...], where: str) -> Any:
        found = self.vocabulary.find(name)
        if found is None and self._stand_ins and isinstance(name, str) and isinstance(fields, list):
            if not all(_is_name(field) for field in fields):
                raise damaged(where, f"{shown(fields)} are no fields")
            return stand_in(name, tuple(fields))
        if found is None and isinstance(fields, list):
            raise SerializationError(
                f"{where} makes a {shown(name)}, a class of the model's source. Give it if you trust the file "
                f"(fxcompress.load(..., trusted=[{name}])), or have plain containers with the same fields instead "
                "(stand_ins=True)"
            )
        found = self.named(name, where)
        if isinstance(found, type) and issubclass(found, nn.Module):
            raise damaged(where, f"{shown(name)} is a class of modules, not a function")
        if found is getattr and not (len(args) == 2 and isinstance(args[0], fx.Node) and is_attribute(args[1])):
            raise SerializationError(f"{where} reads the attribute {shown(args[1:])}, which a saved graph may not")
        return found

    def _below(self, path: str, module: bool, where: str) -> None:
        """Check that there is such a module, parameter or buffer."""
        value: Any = self._root
        for part in path.split("."):
            tables = (value._modules, value._parameters, value._buffers) if isinstance(value, nn.Module) else ()
            value = next((table[part] for table in tables if table.get(part) is not None), None)
            if value is None:
                raise damaged(where, f"there is nothing at {shown(path)}")
        if module and not isinstance(value, nn.Module):
            raise damaged(where, f"{shown(path)} is no module")

    def _pytree(self, data: Json) -> _PyTreeInfo:
        if not isinstance(data, dict) or set(data) != {"arguments", "inputs", "outputs"}:
            raise damaged("pytree", "no arguments, inputs and outputs")
        names = data["arguments"]
        if not isinstance(names, list) or not all(_is_name(name) for name in names):
            raise damaged("pytree", f"{shown(names)} are no names of arguments")
        inputs = _read_spec(data["inputs"], self)
        outputs = None if data["outputs"] is None else _read_spec(data["outputs"], self)
        by_name = not inputs.is_leaf() and inputs.num_children == 2 and inputs.child(1).type is dict
        if by_name and not all(_is_name(key) for key in inputs.child(1).context):  # they stand in the code as they are
            raise damaged("pytree", f"{shown(inputs.child(1).context)} are no names of arguments")
        return _PyTreeInfo(list(names), inputs, outputs)


def _check_strings(value: Any, where: str) -> None:
    """Refuse the names that Python gives to what all objects have, wherever they stand."""
    if isinstance(value, str) and value.startswith("__") and value.endswith("__"):
        raise SerializationError(f"{where}: {shown(value)} may not stand in a saved graph")
    if isinstance(value, dict):
        _check_strings(tuple(value) + tuple(value.values()), where)
    elif isinstance(value, (tuple, list)):
        for part in value:
            _check_strings(part, where)
