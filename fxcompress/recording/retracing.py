"""How a recorded graph comes back from a pickle.

``GraphModule`` pickles its generated code, and rebuilds the graph by running that code on stand-ins for tensors, with
the tracer class that the graph names. The stock tracer fails there on factory calls whose sizes are stand-ins, and
turns ordered dicts and dataclasses in the output into plain dicts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.recording.internals import wrap_functions_of_torch
from fxcompress.recording.structure import children, to_argument

__all__ = ["Retracer"]

# Functions without a tensor among their arguments, which would not notice that a size is a stand-in.
_FACTORIES = tuple(
    getattr(torch, name)
    for name in (
        "zeros ones full empty arange linspace logspace eye rand randn randint randperm normal tril_indices "
        "triu_indices empty_strided tensor scalar_tensor range"
    ).split()
)


class Retracer(fx.Tracer):
    """Traces the generated code of a recorded graph back into that graph."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(autowrap_functions=_FACTORIES)
        wrap_functions_of_torch(self)

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """As in the base class, but without the marks that would have the wrapped names, such as ``torch.zeros``,
        looked up as globals when the graph is traced once more."""
        graph = super().trace(*args, **kwargs)
        for node in graph.nodes:
            node.meta.pop("is_wrapped", None)
        return graph

    def create_arg(self, a: Any) -> Any:
        """As in the base class, but containers stay of the class that they are of."""
        if (
            isinstance(a, (fx.Proxy, torch.Tensor, torch.nn.Module))
            or type(a) in (tuple, list, dict)
            or not children(a)
        ):
            return super().create_arg(a)
        return to_argument(a, self.create_arg, super().create_arg, self.graph, self.create_arg)
