"""What one run knows of the nodes that it records: what each depends on, where it was made, whose memory it shares."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import torch
from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxcompress.recording import internals
from fxcompress.recording.structure import leaves

__all__ = ["Depends", "Fact", "Ledger", "version"]


class Depends(enum.Flag):
    """What the value of a node can change with, besides the sizes in its own arguments."""

    NOTHING = 0
    INPUT = enum.auto()
    PARAMETER = enum.auto()
    BUFFER = enum.auto()
    RANDOM = enum.auto()


@dataclasses.dataclass(frozen=True)
class Fact:
    """What a run knows of a node: what it depends on, where the model's code made it, shape and memory of its value."""

    depends: Depends
    file: str
    line: int
    module: str
    shape: tuple[int, ...] | None = None
    storage: int | None = None
    data_dims: frozenset[int] = frozenset()
    """Dimensions whose size follows from the values of a tensor, as that of ``nonzero()``."""

    @property
    def where(self) -> str:
        """'file:line, in module path'."""
        return _place(self.file, self.line, self.module)


def _place(file: str, line: int, module: str) -> str:
    return f"{file}:{line}, in module {module or '(the model itself)'}"


class Ledger:
    """Which node stands for which tensor, the :class:`Fact` of every node, and in which module the run is (``stack``).

    Args:
        model: its parameters and buffers are known by their first name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.facts: dict[fx.Node, Fact] = {}
        self.mutations: dict[int, list[fx.Node]] = {}
        self.stack: list[tuple[str, nn.Module]] = [("", model)]
        self.names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
        self._nodes: Any = WeakTensorKeyDictionary()
        self._kept: list[Any] = []
        self._kept_storages: set[int] = set()

    def node_of(self, tensor: torch.Tensor) -> fx.Node | None:
        """The node whose value ``tensor`` is."""
        node: fx.Node | None = self._nodes.get(tensor)
        return node

    def keep(self, value: Any) -> None:
        """Keep ``value`` alive for the run, so that neither its identity nor its memory goes to another object."""
        self._kept.append(value)

    def here(self) -> str:
        """'file:line, in module path' of the model's code that is running."""
        return _place(*internals.code_location(), self.stack[-1][0])

    def note(self, node: fx.Node, value: Any, depends: Depends, data_dims: frozenset[int] = frozenset()) -> None:
        """Write down what ``node`` is; a tensor among values is from now on known as it."""
        file, line = internals.code_location()
        shape = storage = None
        if isinstance(value, torch.Tensor):
            shape, storage = tuple(value.shape), storage_of(value)
            self._nodes[value] = node
            if not depends & (Depends.INPUT | Depends.PARAMETER):
                self.keep(value)
                if storage is not None:
                    self._kept_storages.add(storage)
        self.facts[node] = Fact(depends, file, line, self.stack[-1][0], shape, storage, data_dims)

    def forget(self, node: fx.Node) -> None:
        """Drop what is known of a node that leaves the graph."""
        self.facts.pop(node, None)

    def changed_by(self, node: fx.Node, tensors: list[torch.Tensor]) -> None:
        """``node`` has written into the memory of ``tensors``. It matters for values that may be folded, and those are
        kept; other memory may be freed, and its identity pass to another tensor."""
        for tensor in tensors:
            storage = storage_of(tensor)
            if storage is not None and storage in self._kept_storages:
                self.mutations.setdefault(storage, []).append(node)

    def data_dims(self, tensor: torch.Tensor) -> frozenset[int]:
        """The dimensions of ``tensor`` whose sizes follow from values."""
        node = self.node_of(tensor)
        return frozenset() if node is None else self.facts[node].data_dims

    def data_dims_of_result(self, given: list[torch.Tensor], made: bool, result: torch.Tensor) -> frozenset[int]:
        """Those of the ``result`` of an operation on ``given``, which are passed on or (``made``) made by it. Which
        dimension became which is told by size; in doubt a size counts as following from values."""
        follows = {t.shape[d] for t in given for d in self.data_dims(t)}
        if not (made or follows):
            return frozenset()
        free = {s for t in given for d, s in enumerate(t.shape) if d not in self.data_dims(t)}
        dims = {d for d, s in enumerate(result.shape) if s in follows or (s != 1 and s not in free)}
        return frozenset(dims | ({0} if made and result.dim() else set()))

    def depends(self, value: Any) -> Depends:
        """What the tensors in ``value`` depend on."""
        result = Depends.NOTHING
        for _, leaf in leaves(value):
            if isinstance(leaf, torch.Tensor):
                result |= self._tensor_depends(leaf)
        return result

    def inputs_depend(self, node: fx.Node) -> Depends:
        """What the arguments of ``node`` depend on."""
        result = Depends.NOTHING
        for source in node.all_input_nodes:
            if source in self.facts:
                result |= self._with_mutations(self.facts[source])
        return result

    def _tensor_depends(self, tensor: torch.Tensor) -> Depends:
        node = self.node_of(tensor)
        if node is not None:
            return self._with_mutations(self.facts[node])
        if id(tensor) in self.names:
            return Depends.PARAMETER if isinstance(tensor, nn.Parameter) else Depends.BUFFER
        return Depends.NOTHING

    def _with_mutations(self, fact: Fact) -> Depends:
        depends = fact.depends
        for writer in self.mutations.get(fact.storage, ()) if fact.storage is not None else ():
            depends |= self.facts[writer].depends
        return depends


def version(tensor: torch.Tensor) -> int | None:
    """How often ``tensor`` has been changed in place; ``None`` where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def storage_of(tensor: torch.Tensor) -> int | None:
    """The identity of the memory of ``tensor``, while it lives."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    key: int = tensor.untyped_storage()._cdata
    return key
