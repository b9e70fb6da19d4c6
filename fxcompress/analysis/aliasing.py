"""Who else would feel a change: shared modules, tied parameters, and all the nodes that use them.

Folding batch norm into a convolution changes the convolution's weight. That is right only when no other call, no
``get_attr`` and no tied layer reads this weight, and fx graphs hide such readers well: one module object may sit at
several paths, one ``Parameter`` in several modules, one storage in several parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import fx, nn

from fxcompress.analysis.storage import Extent, extent, memory_blocks
from fxcompress.editing import get_attribute

__all__ = ["Aliasing", "aliasing"]


class Aliasing:
    """Answers about sharing, as the graph was when :func:`aliasing` looked. Nodes come in graph order.

    A module is meant as an object (whatever path reaches it), a tensor as memory (whatever parameter or buffer holds
    it). A module or tensor that does not belong to the graph module has no paths, names, calls or readers.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._paths: dict[int, list[str]] = defaultdict(list)
        self._calls: dict[int, list[fx.Node]] = defaultdict(list)
        self._users: dict[int, list[fx.Node]] = defaultdict(list)
        self._block_of: dict[Extent, int] = {}
        self._names: dict[int, list[str]] = defaultdict(list)
        self._readers: dict[int, list[fx.Node]] = defaultdict(list)
        for path, module in gm.named_modules(remove_duplicate=False):
            self._paths[id(module)].append(path)
        self._read_tensors()
        for node in gm.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                self._read_node(node)

    def paths(self, module: nn.Module) -> tuple[str, ...]:
        """Every dotted path at which ``module`` is registered."""
        return tuple(self._paths.get(id(module), ()))

    def calls(self, module: nn.Module) -> tuple[fx.Node, ...]:
        """The ``call_module`` nodes that call ``module`` itself, through whichever of its paths."""
        return tuple(self._calls.get(id(module), ()))

    def users(self, module: nn.Module) -> tuple[fx.Node, ...]:
        """All nodes that use ``module``: its calls, the calls of opaque modules that contain it, and the ``get_attr``
        nodes that read it or a parameter or buffer of its own or inside it."""
        used = {*self._users.get(id(module), ())}
        readers = (reader for tensor in _tensors(module) for reader in self.readers(tensor))
        used.update(reader for reader in readers if reader.op == "get_attr")
        return tuple(sorted(used))

    def is_shared(self, module: nn.Module) -> bool:
        """Whether ``module`` has several paths or several users."""
        return len(self.paths(module)) > 1 or len(self.users(module)) > 1

    def names(self, tensor: torch.Tensor) -> tuple[str, ...]:
        """Every dotted name under which this parameter or buffer, or one that overlaps it in memory, is registered."""
        return tuple(self._names.get(self._block(tensor), ()))

    def is_tied(self, tensor: torch.Tensor) -> bool:
        """Whether a parameter or buffer goes, in whole or in part, by several names."""
        return len(self.names(tensor)) > 1

    def readers(self, tensor: torch.Tensor) -> tuple[fx.Node, ...]:
        """The nodes that read this parameter or buffer under any of its names: ``get_attr`` nodes, and ``call_module``
        nodes whose module holds it or contains a module that does."""
        return tuple(self._readers.get(self._block(tensor), ()))

    def is_private(self, module: nn.Module) -> bool:
        """Whether parameters of ``module`` may be changed in place with only its one user noticing: it is not shared,
        and no parameter or buffer of it is tied or read by another node."""
        tensors = list(_tensors(module))
        alone = not any(self.is_tied(tensor) or len(self.readers(tensor)) > 1 for tensor in tensors)
        return alone and not self.is_shared(module)

    def shared_modules(self) -> tuple[nn.Module, ...]:
        """The modules, other than the root, for which :meth:`is_shared` holds, in order of their first path."""
        return tuple(m for path, m in self._gm.named_modules() if path and self.is_shared(m))

    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The names of each group of parameters and buffers that share memory, in order of their first name."""
        return tuple(tuple(names) for names in self._names.values() if len(names) > 1)

    def _read_tensors(self) -> None:
        named = [*self._gm.named_parameters(remove_duplicate=False), *self._gm.named_buffers(remove_duplicate=False)]
        known = {name for name, _ in named}
        for node in self._gm.graph.nodes:
            # A graph may also read a tensor that is a plain attribute and so no parameter or buffer.
            if node.op == "get_attr" and str(node.target) not in known:
                value = get_attribute(self._gm, str(node.target))
                if isinstance(value, torch.Tensor):
                    named.append((str(node.target), value))
                    known.add(str(node.target))
        for index, block in enumerate(memory_blocks(tensor for _, tensor in named)):
            self._block_of.update((extent(tensor), index) for tensor in block.tensors)
        for name, tensor in named:
            self._names[self._block(tensor)].append(name)

    def _read_node(self, node: fx.Node) -> None:
        value = get_attribute(self._gm, str(node.target))
        if isinstance(value, nn.Module):
            if node.op == "call_module":
                self._calls[id(value)].append(node)
            for module in value.modules():
                self._users[id(module)].append(node)
            tensors = list(_tensors(value))
        else:
            tensors = [value] if isinstance(value, torch.Tensor) else []
        for block in dict.fromkeys(self._block(tensor) for tensor in tensors):
            self._readers[block].append(node)

    def _block(self, tensor: torch.Tensor) -> int:
        return self._block_of.get(extent(tensor), -1)


def _tensors(module: nn.Module) -> Iterable[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def aliasing(gm: fx.GraphModule) -> Aliasing:
    """Find what is shared in ``gm``: modules, parameters, and the nodes behind them. Nothing is run.

    Raises:
        AttributeError: a node names a module or parameter that is not there (``gm.graph.lint()`` would say so).
    """
    return Aliasing(gm)
