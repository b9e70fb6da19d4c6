"""Running a graph to ask something about it, so that nobody can tell afterwards that it ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.analysis.inputs import bind_inputs
from fxcompress.editing import get_attribute

__all__ = ["GraphRunner", "SteppedRun", "copied", "undisturbed"]


class GraphRunner(fx.Interpreter):
    """An ``fx.Interpreter`` that is called the way the module is: by position, by keyword, with defaults.

    An analysis overrides one method, usually ``run_node``, and calls :meth:`observe`.
    """

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The next value of :func:`bind_inputs`, which has one for every placeholder, starred ones too."""
        return next(self.args_iter)

    def call(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """What ``gm(*args, **kwargs)`` returns, with all that it does to buffers, inputs and random state.

        Raises:
            UsageError: the inputs do not fit the graph.
        """
        return self._run_bound(bind_inputs(self._graph_module(), args, kwargs))

    def observe(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """As :meth:`call` but without gradients and leaving the module, the inputs and the random state as they were.

        Raises:
            UsageError: the inputs do not fit the graph.
        """
        gm = self._graph_module()
        values = bind_inputs(gm, args, kwargs)
        with torch.no_grad(), undisturbed(gm, values):
            return self._run_bound(copied(values))

    def _graph_module(self) -> fx.GraphModule:
        assert isinstance(self.module, fx.GraphModule), "a GraphRunner runs a GraphModule"
        return self.module

    def _run_bound(self, values: Sequence[Any]) -> Any:
        output = self.run(*values, enable_io_processing=False)
        return self.graph.process_outputs(output)


class SteppedRun(GraphRunner):
    """One run of a graph on copies of its inputs, a node at a time: several of them go through it abreast.

    ``env`` holds the values of the nodes run so far that a node to come reads.
    """

    def __init__(self, gm: fx.GraphModule, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__(gm)
        self.args_iter: Iterator[Any] = iter(copied(bind_inputs(gm, args, kwargs)))

    def step(self, node: fx.Node) -> None:
        """Run ``node``; all before it have been run."""
        self.env[node] = self.run_node(node)
        for dead in self.user_to_last_uses.get(node, ()):
            del self.env[dead]


def copied(values: Any) -> Any:
    """``values`` with every tensor cloned, so that an in-place operation on an input does not reach the caller's."""
    with torch.no_grad():
        return pytree.tree_map_only(torch.Tensor, torch.clone, values)


@contextlib.contextmanager
def undisturbed(module: nn.Module, values: Any = ()) -> Iterator[None]:
    """Put buffers, tensors that the graph reads by ``get_attr``, and PyTorch's random state back on leaving.

    Batch norm in training mode writes its buffers and dropout draws random numbers. Python attributes that a module
    sets on itself, and random generators of other libraries, are not covered.

    Args:
        module: the module that will run.
        values: its inputs; only their devices matter (whose random state is kept).
    """
    # TorchScript keeps its registry in C++, where no object can take the place of another.
    owners = [owner for owner in module.modules() if not isinstance(owner, torch.jit.ScriptModule)]
    registries = [(owner, dict(owner._buffers)) for owner in owners]
    snapshots = [(tensor, tensor.detach().clone()) for tensor in _mutable_tensors(module)]
    tensors = [*module.parameters(), *module.buffers(), *pytree.tree_leaves(values)]
    cuda = {t.device.index for t in tensors if isinstance(t, torch.Tensor) and t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(cuda)):
        try:
            yield
        finally:
            for owner, buffers in registries:
                owner._buffers.clear()
                owner._buffers.update(buffers)
            for tensor, before in snapshots:
                # Writing bumps the version counter, which would break a backward pass the caller is in: only if needed.
                if not torch.equal(tensor, before):
                    with torch.no_grad():
                        tensor.copy_(before)


def _mutable_tensors(module: nn.Module) -> list[torch.Tensor]:
    tensors = list(module.buffers())
    if isinstance(module, fx.GraphModule):
        values = (get_attribute(module, str(node.target)) for node in module.graph.nodes if node.op == "get_attr")
        tensors += [value for value in values if isinstance(value, torch.Tensor)]
    unique = {id(tensor): tensor for tensor in tensors}
    # Prepacked (oneDNN) weights are constants, and can be neither compared nor written.
    return [tensor for tensor in unique.values() if tensor.layout is torch.strided and not tensor.is_meta]
