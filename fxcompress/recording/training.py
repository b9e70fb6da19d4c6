"""Which functional calls follow the training flag of their module, and with what probability they drop.

``F.dropout(x, p, training=self.training)`` and ``F.dropout(x, p, training=False)`` look the same in one run, and
``scaled_dot_product_attention(..., dropout_p=self.p if self.training else 0.0)`` hides the number. A second run in the
other mode tells: calls are matched by the module that makes them and their order within it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxcompress.canonical.layers import TrainingUse
from fxcompress.canonical.rules import arguments
from fxcompress.errors import TraceWarning
from fxcompress.recording.session import Session, is_leaf

__all__ = ["training_uses"]

_DROPS = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    F.scaled_dot_product_attention,
)  # fmt: skip


def training_uses(session: Session, record_again: Callable[[], Session]) -> dict[fx.Node, TrainingUse]:
    """What ``canonicalize`` wants to know of the calls in ``session.hints``.

    Args:
        session: the recording.
        record_again: records another run of the same model in the other mode.
    """
    other: dict[tuple[str, Any], list[fx.Node]] = {}
    if session.hints or _asks_for_mode(session.model):
        twin = _in_other_mode(session, record_again)
        if twin is not None:
            other = _by_module(twin)
            _tell_difference(session, twin)
    own = _by_module(session)
    uses: dict[fx.Node, TrainingUse] = {}
    for key, nodes in own.items():
        twins = other.get(key, [])
        pairs = zip(nodes, twins, strict=True) if len(twins) == len(nodes) else ((n, None) for n in nodes)
        for node, same in pairs:
            uses[node] = _use(session, node, same)
    return uses


def _asks_for_mode(model: nn.Module) -> bool:
    """Whether code of a module that is recorded inside names its training flag."""
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return True
        if is_leaf(module):
            continue
        for kind in type(module).__mro__:
            if kind is nn.Module:
                break
            for function in vars(kind).values():
                if "training" in getattr(getattr(function, "__code__", None), "co_names", ()):
                    return True
    return False


def _tell_difference(session: Session, twin: Session) -> None:
    """Warn if the other mode makes calls that no flag in the graph can stand for."""
    ours, theirs = _calls(session), _calls(twin)
    counts = [{key: len(nodes) for key, nodes in _by_module(s).items()} for s in (session, twin)]
    if counts[0] != counts[1]:  # a dropout that is called in one mode only
        ours, theirs = [*ours, *session.hints], [*theirs, *twin.hints]
    for a, b in itertools.zip_longest(ours, theirs):
        if a is None or b is None or (a.op, a.target) != (b.op, b.target):
            break
        if a not in session.hints and _flags(a) != _flags(b):
            break
    else:
        return
    mode = "eval" if session.model.training else "training"
    fact = twin.ledger.facts[b] if b is not None else session.ledger.facts[a]
    warnings.warn(
        f"in {mode} mode the model does other things, first at {fact.where}; the graph does in both modes what was "
        "recorded, except for dropout and normalisation. Trace the model in the mode in which the graph will run",
        TraceWarning,
        stacklevel=6,
    )


def _flags(node: fx.Node) -> list[bool]:
    return [v for v in (*node.args, *node.kwargs.values()) if isinstance(v, bool)]


def _calls(session: Session) -> list[fx.Node]:
    """The calls that a run made, less what follows the mode by itself: dropout, and counting batches."""
    return [
        node
        for node in session.graph.nodes
        if node.op.startswith("call_")
        and node in session.ledger.facts
        and node.target not in _DROPS
        and node.target != "detach"
        and not any(str(s.target).endswith("num_batches_tracked") for s in node.all_input_nodes)
    ]


def _by_module(session: Session) -> dict[tuple[str, Any], list[fx.Node]]:
    result: dict[tuple[str, Any], list[fx.Node]] = {}
    for node, hint in session.hints.items():
        result.setdefault((hint.module, node.target), []).append(node)
    return result


def _in_other_mode(session: Session, record_again: Callable[[], Session]) -> Session | None:
    try:
        return record_again()
    except Exception as error:  # the mode nobody asked for may not work at all; the graph then keeps its own mode's way
        warnings.warn(
            f"the model does not run in {'eval' if session.model.training else 'training'} mode "
            f"({type(error).__name__}: {error}); in the graph, dropout does what it did in the mode it was traced in",
            TraceWarning,
            stacklevel=6,
        )
        return None


def _use(session: Session, node: fx.Node, twin: fx.Node | None) -> TrainingUse:
    hint = session.hints[node]
    given = arguments(node) or {}
    seen = None if twin is None else (arguments(twin) or {})
    if node.target is F.scaled_dot_product_attention:
        here = float(given.get("dropout_p", 0.0))
        there = float(seen.get("dropout_p", 0.0)) if seen is not None else 0.0
        follows = here != there
        probability = here if hint.training else there
    else:
        flag = bool(given.get("training", node.target in _DROPS))
        follows = flag == hint.training
        source = given if hint.training or seen is None else seen
        probability = float(source.get("p", source.get("dropout_p", 0.5)))
        if seen is not None:
            flag_follows = bool(seen.get("training", node.target in _DROPS)) != flag
            follows = (follows and flag_follows) or given.get("p", 0.5) != seen.get("p", 0.5)
    return TrainingUse(hint.rank, follows, hint.training, probability, hint.mask_rank, hint.float_masks)
