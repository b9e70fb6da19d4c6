"""One pass on one graph, without the pipeline around it and so without a verification that could hide a miscompile."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.apply import Applied, apply_pass
from fxcompress.calibration import as_batches
from fxcompress.editing import private_copy
from fxcompress.pass_base import Example, Pass


def apply(
    pass_: Pass, model: nn.Module, *inputs: Any, calibration: Sequence[Any] | None = None
) -> tuple[fx.GraphModule, Applied]:
    """The rewritten graph and what was done; ``model`` stays as it is. No ``inputs``: no example."""
    gm = private_copy(model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model))
    example = Example(tuple(inputs)) if inputs else None
    batches = None if calibration is None else as_batches(calibration)
    return gm, apply_pass(pass_, gm, example, batches, lambda event: None)


def reasons(applied: Applied) -> str:
    return "\n".join(refusal.reason for refusal in applied.refusals)


def refused(pass_: Pass, model: nn.Module, *inputs: Any) -> str:
    """The reasons of ``pass_``, which must have done nothing."""
    gm, applied = apply(pass_, model, *inputs)
    assert not applied.sites
    before = fx.symbolic_trace(model) if not isinstance(model, fx.GraphModule) else model
    assert [n.format_node() for n in gm.graph.nodes] == [n.format_node() for n in before.graph.nodes]
    return reasons(applied)


def error(model: nn.Module, gm: nn.Module, *inputs: Tensor) -> float:
    """Largest relative error over all outputs; copies are fed, so in-place models do not spoil the inputs."""
    with torch.no_grad():
        wanted, found = (m(*copy.deepcopy(inputs)) for m in (model, gm))
    pairs = [(wanted, found)] if isinstance(wanted, Tensor) else list(zip(wanted, found, strict=True))
    worst = 0.0
    for w, f in pairs:
        assert (w.shape, w.dtype) == (f.shape, f.dtype)
        w, f = w.double(), f.double()
        worst = max(worst, float((w - f).abs().max() / w.abs().max().clamp_min(1e-30)))
    return worst


def calls(gm: fx.GraphModule, *types: type[nn.Module]) -> int:
    """How many nodes call a module of one of these types."""
    return sum(n.op == "call_module" and isinstance(gm.get_submodule(str(n.target)), types) for n in gm.graph.nodes)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics and parameters that no fold can get right by accident; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator) * (high - low) + low).to(like)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(draw(module.running_mean, -1, 1))
                module.running_var.copy_(draw(module.running_var, 0.5, 2))
            if module.affine:
                module.weight.data.copy_(draw(module.weight, 0.5, 1.5))
                module.bias.data.copy_(draw(module.bias, -1, 1))
    return model.eval()
