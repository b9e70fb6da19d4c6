"""Teachers as graphs that give what losses read."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

from torch import fx, nn

from fxcompress import editing
from fxcompress.analysis.memory import Memory
from fxcompress.analysis.outputs import tensor_leaves
from fxcompress.analysis.shapes import Shapes, TensorSpec
from fxcompress.errors import FxCompressError, PreconditionError, UsageError
from fxcompress.examples import map_tensors
from fxcompress.pass_base import Example
from fxcompress.passes.distillation.fused import holder_of, own_dtype
from fxcompress.passes.distillation.reading import output_node
from fxcompress.passes.distillation.taps import resolve_tap
from fxcompress.trace import trace

__all__ = ["TappedTeacher", "kept", "recorded"]


def recorded(teacher: nn.Module, example: Example, name: str) -> tuple[fx.GraphModule, Example]:
    """A graph of ``teacher`` that shares nothing with it, in evaluation mode and where ``example`` is; and that in its
    dtype.

    Raises:
        PreconditionError: it cannot be recorded; ``name`` is that of the pass.
        UsageError: there is distillation in it.
    """
    example = _in_dtype_of(teacher, example)
    device = next((t.device for _, t in tensor_leaves((example.args, example.kwargs))), None)
    if isinstance(teacher, fx.GraphModule):
        gm = editing.private_copy(teacher).to(device)
    else:
        try:
            gm = trace(copy.deepcopy(teacher).to(device).eval(), example.args, example_kwargs=dict(example.kwargs))
        except FxCompressError as error:
            raise PreconditionError(f"{name}: the teacher cannot be recorded: {error}") from error
    if holder_of(gm) is not None:
        raise UsageError(f"{name}: the teacher has distillation in it; use detach-distillation before")
    return gm.eval(), example


def _in_dtype_of(network: nn.Module, example: Example) -> Example:
    dtype = own_dtype(network)
    tensors = [t for _, t in tensor_leaves((example.args, example.kwargs)) if t.is_floating_point()]
    if dtype is None or all(t.dtype is dtype for t in tensors):
        return example
    return map_tensors(example, lambda t: t.to(dtype) if t.is_floating_point() else t)


@dataclasses.dataclass(frozen=True, eq=False)
class TappedTeacher:
    """A teacher that gives what losses read: the output, then the taps.

    Attributes:
        gm: its graph, which gives a tuple of tensors.
        specs: of these.
        writes: whether it writes to what it is given.
    """

    gm: fx.GraphModule
    specs: tuple[TensorSpec, ...]
    writes: bool

    @classmethod
    def of(
        cls, gm: fx.GraphModule, example: Example, known: Shapes, output: str | None, names: Sequence[str]
    ) -> TappedTeacher:
        """From the graph of a teacher, which is changed.

        Args:
            gm: that graph.
            example: inputs of it.
            known: its shapes.
            output: see :func:`output_node`.
            names: of the taps.
        """
        nodes = [output_node(gm, example, output), *(resolve_tap(gm, name, "teacher") for name in names)]
        memory = Memory(gm, lambda node: isinstance(known[node], TensorSpec))
        writes = any(n.op == "placeholder" and memory.writer_after(n) is not None for n in gm.graph.nodes)
        gm.graph.output_node().args = (tuple(kept(node, memory) for node in nodes),)
        editing.clean_up(gm)
        return cls(gm, tuple(known.spec(node) for node in nodes), writes)


def kept(value: fx.Node, memory: Memory) -> fx.Node:
    """``value`` as it is when it is made, whatever is written to it later."""
    if memory.writer_after(value) is None:
        return value
    with value.graph.inserting_after(value):
        return value.graph.call_method("clone", (value,))
