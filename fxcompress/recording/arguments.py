"""From values that the model's code hands to a torch call to arguments of a node."""

from __future__ import annotations

import enum
import warnings
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxcompress.errors import TraceWarning
from fxcompress.modules import Refill
from fxcompress.recording import internals
from fxcompress.recording.facts import Depends, Ledger
from fxcompress.recording.structure import Path, leaves, to_argument

__all__ = ["Arguments"]


class Arguments:
    """Turns the arguments of calls into what ``graph`` can hold: nodes, plain values and containers of both.

    Args:
        model: its parameters and buffers become ``get_attr`` nodes.
        graph: where nodes are made.
        ledger: which node stands for which tensor.
        attributes: path -> value of what the graph needs and the model does not have; added to.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, ledger: Ledger, attributes: dict[str, Any]) -> None:
        self.model, self.graph, self.ledger, self.attributes = model, graph, ledger, attributes
        self.parts: dict[tuple[fx.Node, Path], fx.Node] = {}
        self._objects: dict[int, tuple[Any, fx.Node, list[int]]] = {}
        self._stored: dict[str, fx.Node] = {}

    def remember(self, value: Any, node: fx.Node, tensors: list[torch.Tensor]) -> None:
        """``value``, an object with ``tensors`` inside, is what ``node`` has returned."""
        self._objects[id(value)] = (value, node, [id(t) for t in tensors])

    def argument(self, value: Any) -> Any:
        """What stands for ``value`` among the arguments of a node."""
        known = self._objects.get(id(value))
        if known is not None and type(value) not in (tuple, list, dict):
            tensors = [id(t) for _, t in leaves(value) if isinstance(t, torch.Tensor)]
            if tensors == known[2]:
                return known[1]
        if type(value) is torch.Tensor or isinstance(value, torch.Tensor):
            return self.tensor_node(value)
        if type(value) in (int, float, bool, str, type(None)):
            return value
        if isinstance(value, np.generic):  # float64 is a float, and is written as np.float64(...)
            return value.item()
        return to_argument(value, self.tensor_node, self._object_node, self.graph, self.argument)

    def tensor_node(self, tensor: torch.Tensor) -> fx.Node:
        """The node whose value ``tensor`` is; a new one for a parameter, a buffer or a constant."""
        node = self.ledger.node_of(tensor)
        if node is not None:
            return node
        name = self.ledger.names.get(id(tensor))
        depends = Depends.NOTHING
        if name is None:
            name = self._constant_name(tensor)
        else:
            if name in internals.non_persistent_buffers(self.model):
                name = self._below_constants(name, tensor)
            depends = Depends.PARAMETER if isinstance(tensor, nn.Parameter) else Depends.BUFFER
        node = self._get_attr(name)
        self.ledger.note(node, tensor, depends)
        return node

    def _constant_name(self, tensor: torch.Tensor) -> str:
        """A name for a tensor that no operation of this run has made and that is no parameter or buffer."""
        if isinstance(tensor, nn.Parameter):
            warnings.warn(
                f"a Parameter used at {self.ledger.here()} is not registered with the model (it may be in a Python "
                "list); it is a constant of the graph and will not be trained",
                TraceWarning,
                stacklevel=2,
            )
        self.ledger.keep(tensor)
        for path, module in self.model.named_modules():
            for key, value in vars(module).items():
                if value is tensor:
                    return f"{path}.{key}" if path else self._below_constants(key, tensor)
        name = f"constants.c{len(self.attributes)}"
        self.attributes[name] = tensor.detach()
        return name

    def _below_constants(self, name: str, tensor: torch.Tensor) -> str:
        """A new name for a tensor of the model itself that is not in its ``state_dict``: copies of a ``GraphModule``
        forget that of its own buffers, but not of those of its submodules."""
        self.attributes[f"constants.{name}"] = tensor
        return f"constants.{name}"

    def _get_attr(self, name: str) -> fx.Node:
        if name not in self._stored:
            self._stored[name] = self.graph.create_node("get_attr", name)
        return self._stored[name]

    def _object_node(self, value: Any) -> Any:
        """An argument that is no tensor, no plain value and no plain container."""
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            return self.tensor_node(torch.from_numpy(value.copy()))
        if isinstance(value, enum.Enum):
            return value
        paths = [path for path, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
        name = f"objects.o{len(self.attributes)}"
        if not paths:
            self.attributes[name] = value
            return self._get_attr(name)
        tensors = tuple(self.argument(leaf) for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor))
        self.attributes[name] = Refill(value, paths)
        return self.graph.call_module(name, tensors)
