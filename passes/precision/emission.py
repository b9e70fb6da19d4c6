"""Casts and low parameters, written into the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress import matching
from fxcompress.editing import get_attribute, set_attribute
from fxcompress.pass_base import PassContext
from fxcompress.passes.precision.placement import Survey, rounding_error
from fxcompress.passes.precision.rules import attention_mask, is_cast_to_float32
from fxcompress.passes.precision.trial import Decision

__all__ = ["Emission"]


class Emission:
    """Carries out a decision node by node, in graph order; one cast serves all readers of a value.

    Args:
        survey: of the graph.
        decision: what is to be done.
    """

    def __init__(self, survey: Survey, decision: Decision) -> None:
        self._gm, self._context, self._dtype = survey.gm, survey.context, survey.dtype
        self._decision = decision
        self._written = survey.written
        self._made: dict[tuple[fx.Node, torch.dtype, bool], fx.Node] = {}
        self._raised: dict[fx.Node, fx.Node] = {}
        self._errors: dict[int, float] = {}
        self._masks = {node: attention_mask(self._gm, node) for node in decision.casts}
        self._names = {
            id(tensor): _names(survey.context, tensor)
            for node in survey.nodes
            for _, tensor in decision.placement.parameters(node)
        }
        self.casts = 0

    def write(self, node: fx.Node) -> dict[str, Any]:
        """Change ``node``; gives the number of casts that were put in, and how far rounding moved parameters."""
        before = self.casts
        error = max((self._store(tensor) for _, tensor in self._decision.placement.parameters(node)), default=0.0)
        module = self._context.module(node)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
        casts = self._decision.casts.get(node, {})
        actual = {self._raised.get(s, s): self._cast(node, s, dtype) for s, dtype in casts.items()}
        node.args = fx.node.map_arg(node.args, lambda n: actual.get(n, n))
        node.kwargs = fx.node.map_arg(node.kwargs, lambda n: actual.get(n, n))
        if node in self._decision.raised:
            self._raise(node)
        return {"casts": self.casts - before, "weight_error": error}

    # ------------------------------------------------------------------------------------------------- parameters
    def _store(self, tensor: Tensor) -> float:
        """Put a rounded tensor wherever ``tensor`` is, unless another reader has seen to that; how far it is off."""
        if id(tensor) not in self._errors:
            low = tensor.detach().to(self._dtype)
            if isinstance(tensor, nn.Parameter):
                low = nn.Parameter(low, requires_grad=tensor.requires_grad)
            for name in self._names[id(tensor)]:
                set_attribute(self._gm, name, low)
            self._errors[id(low)] = rounding_error(tensor, low)
            return self._errors[id(low)]
        return self._errors[id(tensor)]

    # ------------------------------------------------------------------------------------------------- casts
    def _cast(self, reader: fx.Node, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        is_mask = self._masks[reader] is source and dtype is self._dtype
        source = source if is_mask else self._shortened(source, dtype)
        actual = self._raised.get(source, source)
        if self._decision.dtypes.get(source) is dtype:
            return actual
        key = (source, dtype, is_mask)
        if key in self._made:
            return self._made[key]
        if dtype is torch.float32 and source not in self._written:
            for own in actual.users:  # the model's, which stands there already
                if own < reader and is_cast_to_float32(own):
                    return own
        with reader.graph.inserting_before(reader):
            made = self._fitted(actual) if is_mask else reader.graph.call_method("to", (actual, dtype))
        self.casts += 1
        if source not in self._written:
            self._made[key] = made
        return made

    def _shortened(self, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Where the model's own code casts a low value to float32, what it casts."""
        while dtype is self._dtype and is_cast_to_float32(source) and source not in self._written:
            before = matching.tensor_input(source)
            if before is None or before in self._written or self._decision.dtypes.get(before) is not dtype:
                break
            source = before
        return source

    def _fitted(self, mask: fx.Node) -> fx.Node:
        """As ``trial.fitted``."""
        graph, info = mask.graph, torch.finfo(self._dtype)
        infinite = graph.call_method("isinf", (mask,))
        near = graph.call_method("clamp", (mask, info.min, info.max))
        return graph.call_method("to", (graph.call_function(torch.where, (infinite, mask, near)), self._dtype))

    def _raise(self, node: fx.Node) -> None:
        with node.graph.inserting_after(node):
            made = node.graph.call_method("to", (node, torch.float32))
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        self._raised[node] = made
        self.casts += 1


def _names(context: PassContext, tensor: Tensor) -> tuple[str, ...]:
    return tuple(n for n in context.aliasing.names(tensor) if get_attribute(context.gm, n) is tensor)
