"""Which functional calls follow the training flag of their module, and with what probability they drop.

``F.dropout(x, p, training=self.training)`` and ``F.dropout(x, p, training=False)`` look the same in one run, and
``scaled_dot_product_attention(..., dropout_p=self.p if self.training else 0.0)`` hides the number. A second run in the
other mode tells: calls are matched by the module that makes them and their order within it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx

from fxcompress.canonical.layers import TrainingUse
from fxcompress.canonical.rules import arguments
from fxcompress.errors import TraceWarning
from fxcompress.recording.session import Session

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
    if any(node.target in _DROPS for node in session.hints):
        other = _in_other_mode(session, record_again)
    own = _by_module(session)
    uses: dict[fx.Node, TrainingUse] = {}
    for key, nodes in own.items():
        twins = other.get(key, [])
        pairs = zip(nodes, twins, strict=True) if len(twins) == len(nodes) else ((n, None) for n in nodes)
        for node, twin in pairs:
            uses[node] = _use(session, node, twin)
    return uses


def _by_module(session: Session) -> dict[tuple[str, Any], list[fx.Node]]:
    result: dict[tuple[str, Any], list[fx.Node]] = {}
    for node, hint in session.hints.items():
        result.setdefault((hint.module, node.target), []).append(node)
    return result


def _in_other_mode(session: Session, record_again: Callable[[], Session]) -> dict[tuple[str, Any], list[fx.Node]]:
    try:
        return _by_module(record_again())
    except Exception as error:  # the mode nobody asked for may not work at all; the graph then keeps its own mode's way
        warnings.warn(
            f"the model does not run in {'eval' if session.model.training else 'training'} mode "
            f"({type(error).__name__}: {error}); in the graph, dropout does what it did in the mode it was traced in",
            TraceWarning,
            stacklevel=6,
        )
        return {}


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
        if seen is not None and node.target in _DROPS:
            follows = follows and bool(seen.get("training", True)) != flag
        source = given if hint.training or seen is None else seen
        probability = float(source.get("p", source.get("dropout_p", 0.5)))
    return TrainingUse(hint.rank, follows, probability, hint.mask_rank, hint.float_masks)
