"""Running a model and its graph alike, and saying how their outputs differ."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.outputs import compare
from fxcompress.analysis.running import undisturbed
from fxcompress.recording import internals
from fxcompress.recording.structure import leaves

__all__ = ["SEED", "difference", "run", "without_state_of_runs"]

SEED = 0x5EED

_EPS_FACTOR = 8
"""A faithful graph makes the same calls in the same order, so it is equal to the last bit wherever kernels are
deterministic; attention written out adds in another order inside one kernel. 8 eps is 9.5e-7 in float32."""


def run(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    fused: bool = False,
    resized: dict[str, torch.Tensor] | None = None,
) -> Any:
    """What ``module`` returns, without gradients, from a fixed seed, and leaving its buffers as they were.

    ``nn.MultiheadAttention`` and ``nn.TransformerEncoder`` do what they do while training, unless ``fused``: in eval
    mode without gradients torch would use kernels that round otherwise, which no graph that can be trained has.
    Buffers to which the run gives another shape are put into ``resized``, by path.
    """
    call = module.forward if isinstance(module, fx.GraphModule) else module  # calling one prints when it fails
    plain = contextlib.nullcontext() if fused else internals.without_fused_encoder()
    with plain, torch.no_grad(), undisturbed(module, (tuple(args), dict(kwargs))):
        torch.manual_seed(SEED)
        before = {path: tuple(b.shape) for path, b in module.named_buffers()}
        output = call(*args, **kwargs)
        if resized is not None:
            after = dict(module.named_buffers())
            resized |= {p: after[p] for p, shape in before.items() if p in after and tuple(after[p].shape) != shape}
        return output


def without_state_of_runs(work: nn.Module) -> nn.Module:
    """A copy of ``work`` that shares its parameters and buffers: what a run leaves in Python attributes stays in it."""
    return copy.deepcopy(work, {id(t): t for t in [*work.parameters(), *work.buffers()]})


def difference(expected: Any, got: Any) -> str | None:
    """How ``got`` is not the output of a faithful graph, in words; ``None`` if it is. A NaN where the model has one is
    right."""
    found = compare(expected, got, equal_nan=True)
    if found.structural:
        return found.structural[0]
    if found.discrete:
        return found.discrete[0]
    if found.error <= _tolerance(expected):
        return None
    if math.isfinite(found.error):
        return f"{found.where} is off by {found.error:.3g} of its largest value"
    return f"{found.where} differs in what is finite"


def _tolerance(output: Any) -> float:
    kinds = {leaf.dtype for _, leaf in leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()}
    return _EPS_FACTOR * max((torch.finfo(k).eps for k in kinds), default=0.0)
