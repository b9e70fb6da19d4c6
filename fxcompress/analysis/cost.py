"""What a graph costs: parameters, bytes and multiply-accumulates (MACs)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.analysis.contractions import RULES
from fxcompress.analysis.running import GraphRunner
from fxcompress.analysis.shapes import outline
from fxcompress.analysis.storage import memory_blocks

__all__ = ["Cost", "cost"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a graph, made by :func:`cost`.

    Attributes:
        parameters: elements of all parameters; those that share memory (tied weights) count once.
        parameter_bytes: bytes of memory that the parameters occupy, shared memory once.
        buffer_bytes: the same for buffers, without memory that a parameter occupies already.
        macs: multiply-accumulates of one call, or ``None`` if no inputs were given to run it on.
        macs_by_node: those of each node, also the ones that have none; empty without inputs.
        values_by_node: the :func:`~fxcompress.analysis.shapes.outline` of what each node gave; empty without inputs.
        uncounted: operators from outside ATen that ran and in which nothing could be counted, so that ``macs`` may be
            too low (each as ``namespace.name``).
    """

    parameters: int
    parameter_bytes: int
    buffer_bytes: int
    macs: int | None = None
    macs_by_node: Mapping[fx.Node, int] = dataclasses.field(default_factory=dict, repr=False)
    values_by_node: Mapping[fx.Node, Any] = dataclasses.field(default_factory=dict, repr=False)
    uncounted: frozenset[str] = frozenset()

    @property
    def bytes(self) -> int:
        """Size of parameters and buffers."""
        return self.parameter_bytes + self.buffer_bytes


def cost(gm: fx.GraphModule, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None) -> Cost:
    """Count parameters and bytes of ``gm`` and, given inputs, the MACs of ``gm(*args, **kwargs)`` in one run.

    Every torch function that runs is counted, whichever way it is called and however deep inside a called module. The
    formulas are in ``contractions.py``; a function that has none there is measured by PyTorch's ``FlopCounterMode``.
    The module, the inputs and the random state stay as they were.

    Raises:
        UsageError: the inputs do not fit the graph.
    """
    parameters = memory_blocks(gm.parameters())
    all_tensors = memory_blocks([*gm.parameters(), *gm.buffers()])
    parameter_bytes = sum(block.bytes for block in parameters)
    static = Cost(
        parameters=sum(block.elements for block in parameters),
        parameter_bytes=parameter_bytes,
        buffer_bytes=sum(block.bytes for block in all_tensors) - parameter_bytes,
    )
    if args is None and kwargs is None:
        return static
    runner = _CostRunner(gm)
    runner.observe(args or (), kwargs)
    return dataclasses.replace(
        static,
        macs=runner.counter.macs,
        macs_by_node=runner.macs,
        values_by_node=runner.values,
        uncounted=frozenset(runner.counter.uncounted),
    )


class _CostRunner(GraphRunner):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.counter = _MacCounter()
        self.macs: dict[fx.Node, int] = {}
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.macs
        if self._is_scripted(n):
            value = self.counter.measure(super().run_node, n)
        else:
            with self.counter:
                value = super().run_node(n)
        self.macs[n] = self.counter.macs - before
        self.values[n] = outline(value)
        return value

    def _is_scripted(self, node: fx.Node) -> bool:
        """TorchScript runs in C++, where the counter does not see it."""
        if node.op == "call_module":
            called = self._graph_module().get_submodule(str(node.target))
            return any(isinstance(module, torch.jit.ScriptModule) for module in called.modules())
        return isinstance(node.target, torch.jit.ScriptFunction)


# Names that need no look inside: frequent, and none has anything to contract. For speed only.
_NOTHING = """
    get set size dim numel shape getitem setitem view reshape flatten unflatten permute transpose t contiguous
    expand unsqueeze squeeze cat stack split chunk unbind pad roll clone to type float dropout
    add radd iadd sub rsub isub mul rmul imul div truediv rtruediv pow rsqrt sqrt exp sin cos neg mean sum
    relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu softmax
    batch_norm layer_norm group_norm rms_norm instance_norm embedding
    max_pool2d avg_pool2d adaptive_avg_pool2d
"""
_NOTHING_TO_COUNT = frozenset(_NOTHING.split())
_COUNTABLE_NAMESPACES = frozenset({"aten", "prim", "prims", "quantized_decomposed", "quantized", "onednn"})


class _MacCounter(TorchFunctionMode):
    """Adds up the MACs of the torch functions that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.uncounted: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, name = _namespace_and_name(func)
        rule = RULES.get(func) or (RULES.get(name) if namespace in _COUNTABLE_NAMESPACES else None)
        if rule:
            value = func(*args, **kwargs)
            self.macs += rule(args, kwargs, value)
            return value
        if namespace in _COUNTABLE_NAMESPACES and name in _NOTHING_TO_COUNT:
            return func(*args, **kwargs)
        before = self.macs
        value = self.measure(func, *args, **kwargs)
        if self.macs == before and namespace not in _COUNTABLE_NAMESPACES:
            self.uncounted.add(f"{namespace}.{name}")
        return value

    def measure(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``func`` under ``FlopCounterMode``; this counter must not be active, or both would count."""
        with FlopCounterMode(display=False, custom_mapping=_EXTRA_FLOPS) as flops:
            value = func(*args, **kwargs)
        self.macs += flops.get_total_flops() // 2
        return value


def _namespace_and_name(func: Any) -> tuple[str, str]:
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace, name = str(func).split(".")[:2]
        return namespace, name.strip("_") if namespace == "aten" else name
    return "aten", str(getattr(func, "__name__", func)).strip("_")


def _flops_of(name: str) -> Callable[..., int]:
    def flops(*args: Any, out_val: Any, **kwargs: Any) -> int:
        return 2 * RULES[name](args, kwargs, out_val)

    flops._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode: give tensors, not shapes
    return flops


# What FlopCounterMode does not know by itself.
_EXTRA_FLOPS = {
    torch.ops.aten.mv: _flops_of("mv"),
    torch.ops.aten.addmv: _flops_of("addmv"),
    torch.ops.aten.dot: _flops_of("dot"),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flops_of("scaled_dot_product_attention"),
}
