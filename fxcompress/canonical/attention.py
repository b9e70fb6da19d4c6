"""``F.multi_head_attention_forward`` written out: projections, heads, ``scaled_dot_product_attention``, projection.

Shapes, with L target length, S source length, N batch, E embedding, H heads, D = E / H: the inputs are (L, N, E) and
(S, N, E), or without N; inside, heads stand apart as (N, H, L, D). Follows the function of the same name in
``torch/nn/functional.py``, with which it agrees up to the order of additions inside one kernel (Vaswani et al. 2017).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress import editing
from fxcompress.canonical.layers import Layers, TrainingUse, linear
from fxcompress.canonical.rules import arguments
from fxcompress.modules import ScaledDotProductAttention

__all__ = ["expand_attention"]


def expand_attention(layers: Layers, node: fx.Node, use: TrainingUse) -> bool:
    """Replace one call by explicit nodes. Left as it is, and ``False`` returned, where the call uses what has no
    explicit form here (added key/value biases, static keys, boolean masks handed in directly)."""
    given = arguments(node)
    if given is None or not _is_plain(layers, given, use):
        return False
    with node.graph.inserting_before(node):
        weights_wanted = bool(given.get("need_weights", True)) and _reads_weights(node)
        _Expansion(layers, node, given, use).run(weights_wanted)
    return True


def _is_plain(layers: Layers, given: dict[str, Any], use: TrainingUse) -> bool:
    if any(given.get(k) is not None for k in ("bias_k", "bias_v", "static_k", "static_v")) or given["add_zero_attn"]:
        return False
    if isinstance(given["num_heads"], fx.Node) or not use.float_masks or use.rank not in (2, 3):
        return False
    names = ["in_proj_bias", "out_proj_weight", "out_proj_bias"]
    if given.get("use_separate_proj_weight"):
        names += ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        if given["in_proj_bias"] is not None:  # one bias for three weights: no module of torch.nn holds that
            return False
    else:
        names.append("in_proj_weight")
        if given["in_proj_weight"] is None:
            return False
    return layers.parameters(*(given.get(k) for k in names))


def _reads_weights(node: fx.Node) -> bool:
    """Whether anything reads the second result, the attention weights."""
    for user in node.users:
        is_item = user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem"
        if not is_item or (user.args[1] == 1 and user.users) or user.args[1] not in (0, 1):
            return True
    return False


@dataclasses.dataclass
class _Expansion:
    layers: Layers
    node: fx.Node
    given: dict[str, Any]
    use: TrainingUse

    def __post_init__(self) -> None:
        self.graph = self.node.graph
        self.heads: int = self.given["num_heads"]
        weight = self.layers.parameter(self.given["out_proj_weight"])
        assert weight is not None
        self.width = weight.shape[1]
        self.owner = self._owner()

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_method(name, args, kwargs)

    def run(self, weights_wanted: bool) -> None:
        query, key, value = (self._batched(self.given[k]) for k in ("query", "key", "value"))
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        mask, causal = self._mask(weights_wanted)
        weights = None
        if weights_wanted:
            attended, weights = self._attend_with_weights(q, k, v, mask)
        else:
            attended = self._attend(q, k, v, mask, causal)
        joined = self.method("flatten", self.method("permute", attended, 2, 0, 1, 3), -2)
        out = self._linear("out_proj", self.given["out_proj_weight"], self.given["out_proj_bias"], joined)
        if self.use.rank == 2:
            out = self.method("squeeze", out, 1)
            weights = None if weights is None else self.method("squeeze", weights, 0)
        self._replace(out, weights)

    def _owner(self) -> str:
        source = self.given.get("in_proj_weight") or self.given["q_proj_weight"]
        return str(source.target).rpartition(".")[0]

    def _batched(self, x: fx.Node) -> fx.Node:
        return self.method("unsqueeze", x, 1) if self.use.rank == 2 else x

    def _heads(self, x: fx.Node) -> fx.Node:
        """(L, N, E) -> (N, H, L, D)."""
        parts = self.method("unflatten", x, -1, (self.heads, -1))
        return self.method("permute", parts, 1, 2, 0, 3)

    def _linear(self, name: str, weight: fx.Node, bias: fx.Node | None, x: fx.Node) -> fx.Node:
        tensor = self.layers.parameter(weight)
        assert tensor is not None
        return self.graph.call_module(linear(self.layers, weight, bias, tensor, name), (x,))

    def _project(self, query: fx.Node, key: fx.Node, value: fx.Node) -> tuple[fx.Node, ...]:
        given = self.given
        if given.get("use_separate_proj_weight"):
            weights = (given["q_proj_weight"], given["k_proj_weight"], given["v_proj_weight"])
            pairs = zip(("q_proj", "k_proj", "v_proj"), weights, (query, key, value), strict=True)
            return tuple(self._linear(name, weight, None, x) for name, weight, x in pairs)
        same = given["query"] is given["key"] and given["key"] is given["value"]
        if same:
            packed = self._linear("in_proj", given["in_proj_weight"], given["in_proj_bias"], query)
            return tuple(self._chunks(packed, 3))
        if given["key"] is given["value"]:
            q = self._slice("q_proj", 0, 1, query)
            k, v = self._chunks(self._slice("kv_proj", 1, 3, key), 2)
            return q, k, v
        inputs = {"q_proj": query, "k_proj": key, "v_proj": value}
        return tuple(self._slice(name, i, i + 1, x) for i, (name, x) in enumerate(inputs.items()))

    def _chunks(self, packed: fx.Node, count: int) -> list[fx.Node]:
        parts = self.method("chunk", packed, count, -1)
        return [self.graph.call_function(operator.getitem, (parts, i)) for i in range(count)]

    def _slice(self, name: str, start: int, stop: int, x: fx.Node) -> fx.Node:
        """A linear layer from rows start*E to stop*E of the packed weight, with parameters of its own."""
        weight = self.layers.parameter(self.given["in_proj_weight"])
        bias = self.layers.parameter(self.given["in_proj_bias"])
        assert weight is not None
        rows = slice(start * self.width, stop * self.width)
        module = nn.Linear(weight.shape[1], rows.stop - rows.start, bias=bias is not None, device="meta")
        module.weight = nn.Parameter(weight.detach()[rows].clone(), requires_grad=weight.requires_grad)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach()[rows].clone(), requires_grad=bias.requires_grad)
        module.train(self.layers.gm.training)
        path = self.layers.put(name, {"packed": self.given["in_proj_weight"]}, module, (start, stop))
        return self.graph.call_module(path, (x,))

    def _mask(self, weights_wanted: bool) -> tuple[fx.Node | None, bool]:
        """One additive mask that broadcasts to (N, H, L, S), and whether the kernel may make a causal one itself."""
        mask, padding = self.given.get("attn_mask"), self.given.get("key_padding_mask")
        causal = bool(self.given.get("is_causal", False))
        if causal and padding is None and not weights_wanted and not self.given.get("need_weights", True):
            return None, True
        if mask is not None and self.use.mask_rank == 3:
            mask = self.method("unflatten", mask, 0, (-1, self.heads))
        if padding is not None:
            if self.use.rank == 2:
                padding = self.method("unsqueeze", padding, 0)
            padding = self.method("unsqueeze", self.method("unsqueeze", padding, 1), 1)
            mask = padding if mask is None else self.method("add", mask, padding)
        return mask, False

    def _dropout(self) -> float:
        return float(self.use.probability)

    def _attend(self, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None, causal: bool) -> fx.Node:
        kwargs: dict[str, Any] = {"attn_mask": mask} if mask is not None else {}
        if causal:
            kwargs["is_causal"] = True
        if self._dropout() == 0.0:
            return self.graph.call_function(F.scaled_dot_product_attention, (q, k, v), kwargs)
        path = self._add("attention", ScaledDotProductAttention(self._dropout()))
        return self.graph.call_module(path, (q, k, v), kwargs)

    def _attend_with_weights(self, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None) -> tuple[fx.Node, fx.Node]:
        scaled = self.method("mul", q, math.sqrt(1.0 / (self.width // self.heads)))
        scores = self.method("matmul", scaled, self.method("transpose", k, -2, -1))
        if mask is not None:
            scores = self.method("add", scores, mask)
        weights = self.graph.call_function(torch.softmax, (scores, -1))
        if self._dropout() > 0.0:
            weights = self.graph.call_module(self._add("dropout", nn.Dropout(self._dropout())), (weights,))
        attended = self.method("matmul", weights, v)
        if self.given.get("average_attn_weights", True):
            weights = self.method("mean", weights, 1)
        return attended, weights

    def _add(self, name: str, module: nn.Module) -> str:
        module.train(bool(self.given.get("training", True)))
        return editing.add_module(self.layers.gm, f"{self.owner}.{name}" if self.owner else name, module)

    def _replace(self, out: fx.Node, weights: fx.Node | None) -> None:
        for user in list(self.node.users):
            is_item = user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem"
            if is_item and (user.args[1] == 0 or (user.args[1] == 1 and weights is not None)):
                user.replace_all_uses_with(out if user.args[1] == 0 else weights)  # type: ignore[arg-type]
                self.graph.erase_node(user)
            elif is_item and not user.users:
                self.graph.erase_node(user)
            else:
                user.replace_input_with(self.node, self.graph.call_function(tuple, ((out, weights),)))
        self.graph.erase_node(self.node)
