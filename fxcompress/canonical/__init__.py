"""One vocabulary: functional forms of layers with parameters become the modules that passes know.

``F.linear``, ``addmm`` and ``matmul`` with a parameter, ``F.conv*d`` and ``F.conv_transpose*d``, ``F.batch_norm`` and
the other norms, ``F.embedding``, ``F.prelu``, and ``F.dropout*`` that follows its module's training flag become
``nn.Linear``, ``nn.Conv*d`` and so on; ``F.multi_head_attention_forward`` becomes projections around
``scaled_dot_product_attention``. All of it is exact, down to the last bit where the same kernel runs.

A parameter keeps its name where the module that owned it held just the layer's ``weight`` and ``bias``; a layer whose
parameters had other names, belong to the model itself or are stored transposed (GPT-2's ``Conv1D``) gets a path of its
own below the owner, so that a checkpoint in the old layout cannot be loaded into it by mistake.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import fx

from fxcompress import editing
from fxcompress.canonical.attention import expand_attention
from fxcompress.canonical.layers import Layers, TrainingUse
from fxcompress.canonical.rules import RULES, Rule, arguments, matmul
from fxcompress.canonical.stochastic_depth import adopt_stochastic_depth
from fxcompress.modules import MultiHeadAttentionForward

__all__ = ["TrainingUse", "canonicalize"]


def canonicalize(gm: fx.GraphModule, uses: Mapping[fx.Node, TrainingUse] | None = None) -> None:
    """Rewrite ``gm`` in place into the vocabulary of modules.

    Args:
        gm: the graph; what cannot be rewritten exactly stays as it is.
        uses: what a recording knows of functional calls that have a training flag.
    """
    layers, uses = Layers(gm), uses or {}
    for node in list(gm.graph.nodes):
        use = uses.get(node)
        if node.op == "call_function":
            if node.target is F.multi_head_attention_forward:
                if use is not None and not expand_attention(layers, node, use) and use.follows:
                    _let_follow(layers, node)
                continue
            rule = RULES.get(node.target)
            if rule is not None:
                _apply(layers, node, rule, use)
        elif node.op == "call_method" and node.target == "matmul":
            _apply(layers, node, matmul, use)
        elif node.op == "call_module":
            adopt_stochastic_depth(gm, node)
    editing.clean_up(gm)


def _let_follow(layers: Layers, node: fx.Node) -> None:
    """A call of multi-head attention that cannot be written out at least obeys the training mode."""
    given = arguments(node)
    if given is None:
        return
    module = MultiHeadAttentionForward().train(bool(given.pop("training", True)))
    path = editing.add_module(layers.gm, f"attentions.{node.name}", module)
    with node.graph.inserting_before(node):
        editing.replace(node, node.graph.call_module(path, (), given))


def _apply(layers: Layers, node: fx.Node, rule: Rule, use: TrainingUse | None) -> None:
    given = {"input": node.args[0], "other": node.args[1]} if node.op == "call_method" else arguments(node)
    call = rule(layers, node, given, use) if given is not None else None
    if call is None:
        return
    path, args, kwargs = call
    with node.graph.inserting_before(node):
        new = node.graph.call_module(path, args, kwargs)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
