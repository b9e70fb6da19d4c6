"""Counting MACs in two ways: by :func:`fxcompress.analysis.cost`, and by PyTorch's ``FlopCounterMode``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.analysis import cost

__all__ = ["counted", "graph_of", "measured", "rand"]


@contextlib.contextmanager
def kernels_that_flop_counter_knows() -> Iterator[None]:
    """FlopCounterMode sees nothing in fused attention for the CPU, in oneDNN's LSTM and in nn.MultiheadAttention's fast
    path."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", "TF32 acceleration")  # which flags() mentions whatever one asks of it
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def measured(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    with torch.no_grad(), kernels_that_flop_counter_knows(), FlopCounterMode(display=False) as counter:
        call(*args, **kwargs)
    return counter.get_total_flops() // 2


def graph_of(function: Any, count: int) -> fx.GraphModule:
    """A graph that calls ``function`` (a module, a function, or a method by name) on ``count`` placeholders."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(count)]
    root = nn.Module()
    if isinstance(function, nn.Module):
        root.called = function
        value = graph.call_module("called", tuple(inputs))
    elif isinstance(function, str):
        value = graph.call_method(function, tuple(inputs))
    else:
        value = graph.call_function(function, tuple(inputs))
    graph.output(value)
    return fx.GraphModule(root, graph)


def counted(function: Any, *tensors: Tensor) -> int:
    found = cost(graph_of(function, len(tensors)), tensors)
    assert found.uncounted == frozenset()
    assert found.macs is not None
    return found.macs


def rand(*size: int) -> Tensor:
    return torch.randn(size)
