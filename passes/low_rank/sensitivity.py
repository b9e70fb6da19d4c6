"""How much the model's output changes with the error of one layer.

Each layer by itself gets the weight that one of its pairs stands for, with a middling error, and the model runs on one
batch. With y the output and y' the one it then gives, the sensitivity is ``(||y - y'||^2 / ||y||^2) / error^2``: near
to an error of zero the output is linear in it, so this says what a small error of that layer costs. Errors of several
layers are taken to add up like independent ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from fxcompress.analysis.outputs import tensor_leaves
from fxcompress.editing import private_copy
from fxcompress.errors import PreconditionError
from fxcompress.examples import evaluate
from fxcompress.pass_base import Example
from fxcompress.passes.low_rank.layers import Replacement

__all__ = ["MIDDLING", "sensitivities"]

_LEAST = 1e-6
MIDDLING = 0.3
"""An error at which a layer is tried: large enough to be seen in the output, small enough to be near linear."""


def sensitivities(
    gm: fx.GraphModule, example: Example, trials: Sequence[tuple[Replacement, float] | None]
) -> np.ndarray:
    """The sensitivity of the output to each layer.

    Args:
        gm: the graph; it stays as it is.
        example: what it runs on.
        trials: for each layer a pair to try and its error; ``None`` for a layer without one.

    Returns:
        For each layer; not below :data:`_LEAST` of the largest: one batch does not show that a layer is of no use.

    Raises:
        PreconditionError: the output has no floating-point tensor, or nothing finite, to compare by.
    """
    own = private_copy(gm)
    before = _outputs(own, example)
    if not any(bool(torch.isfinite(t).any()) for t in before):
        raise PreconditionError(
            "sensitivity is measured on the output, which has no finite floating-point numbers on this data; set "
            "sensitivity=False"
        )
    size = max(_distance(before, [torch.zeros_like(t) for t in before]), np.finfo(np.float64).tiny)
    found = np.zeros(len(trials))
    for i, trial in enumerate(trials):
        if trial is None:
            continue
        replacement, error = trial
        weight, bias = replacement.stand_in()
        layer = own.get_submodule(replacement.candidate.path)
        kept = {name: p.detach().clone() for name, p in layer.named_parameters()}
        with torch.no_grad():
            layer.get_parameter("weight").copy_(weight)
            if bias is not None:
                layer.get_parameter("bias").copy_(bias)
            after = _outputs(own, example)
            for name, value in kept.items():
                layer.get_parameter(name).copy_(value)
        found[i] = _distance(before, after) / size / error**2
    return np.maximum(found, _LEAST * found.max(initial=0.0)) if found.any() else np.ones(len(trials))


def _distance(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """The sum of squared differences over all that is finite in both."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        both = torch.isfinite(x) & torch.isfinite(y)
        total += float((x[both] - y[both]).square().sum())
    return total


def _outputs(gm: fx.GraphModule, example: Example) -> list[torch.Tensor]:
    return [t.double().cpu() for _, t in tensor_leaves(evaluate(gm, example)) if t.is_floating_point()]
