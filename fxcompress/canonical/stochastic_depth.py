"""Stochastic depth of whatever library becomes this package's, so that graphs do not need that library to be loaded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from fxcompress.modules import StochasticDepth

__all__ = ["adopt_stochastic_depth"]

_FORMS = ((True, False), (True, True), (False, False), (True, False, True))
_PROBES = ((7, 3), (5, 2, 3, 3), (64, 1, 2))


def adopt_stochastic_depth(gm: fx.GraphModule, node: fx.Node) -> None:
    """Put :class:`~fxcompress.modules.StochasticDepth` in the place of the module that ``node`` calls, if it is that.

    Whether it is, is asked of the module and not of its name: it has no parameters, buffers or children; it gives back
    the very tensor in evaluation mode; and in training mode, with the same random numbers, it gives the same bits as
    ours with a probability that is among its attributes, and with another one there.
    """
    module = gm.get_submodule(str(node.target))
    if type(module).__module__.startswith(("torch.", "fxcompress.")) or len(node.args) != 1 or node.kwargs:
        return
    ours = _equal(module)
    if ours is None:
        return
    for path, other in list(gm.named_modules(remove_duplicate=False)):
        if other is module:
            gm.set_submodule(path, ours)


def _equal(module: nn.Module) -> StochasticDepth | None:
    if [*module.parameters(), *module.buffers(), *module.children()] or module._forward_hooks:
        return None
    odds = [(name, v) for name, v in vars(module).items() if type(v) is float and 0.0 <= v < 1.0]
    for name, p in odds:
        for form in _FORMS:
            ours = StochasticDepth(p, *form).train(module.training)
            # Of a small probability few draws tell little, so the same is asked of twins with an even one.
            if _same(module, ours) and _same(_with(module, name), StochasticDepth(0.5, *form)):
                return ours
    return None


def _with(module: nn.Module, name: str) -> nn.Module:
    twin = copy.deepcopy(module)
    setattr(twin, name, 0.5)
    return twin


def _same(module: nn.Module, ours: StochasticDepth) -> bool:
    twins = copy.deepcopy(module), copy.deepcopy(ours)
    with torch.random.fork_rng(devices=()), torch.no_grad():
        for seed, shape in enumerate(_PROBES):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            if _run(twins[0].eval(), x, seed) is not x:
                return False
            outs = [_run(twin.train(), x, seed) for twin in twins]
            if not all(isinstance(out, torch.Tensor) for out in outs) or not torch.equal(*outs):
                return False
    return True


def _run(module: nn.Module, x: torch.Tensor, seed: int) -> Any:
    torch.manual_seed(seed)
    try:
        return module(x)
    except Exception:  # it may want something else than a tensor of such a shape: then it is not what is looked for
        return None
