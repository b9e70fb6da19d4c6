"""Refit the layers that read fewer channels, so that they give what they gave before: reconstruction without training.

As in channel pruning (He, Zhang & Sun 2017, arXiv 1707.06168) and ThiNet (Luo, Wu & Lin 2017, arXiv 1707.06342), each
layer gets the weights that best map what it reads *now*, after the layers before it were refitted, to what the same
layer gave in the *original* network, so that errors do not pile up. The problem and its solution are in
``fxcompress/analysis/refit.py``, the run in ``fxcompress/sweep.py``.

**Batch norm** keeps its statistics, which are those of the outputs that the fits aim at. Estimating them anew in the
sweep, or by ``adapt-batch-norm`` afterwards, scales each channel, with the error in it, to unit variance under layers
that were fitted to it unscaled; see benchmarks/reconstruction.py for what that costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress import matching
from fxcompress.analysis.aliasing import Aliasing, aliasing
from fxcompress.analysis.channels import Labelled
from fxcompress.analysis.moments import as_double
from fxcompress.analysis.patches import READABLE, Readable
from fxcompress.analysis.refit import NotRefitted, Refit, refit
from fxcompress.pass_base import Example, Site
from fxcompress.passes.pruning.sizes import first_input
from fxcompress.passes.pruning.surgery import Surgery
from fxcompress.sweep import Sweep

__all__ = ["Reconstruction"]

_READERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_FUNCTIONS = ("linear", "bilinear", *(f"conv{t}{i}d" for t in ("", "_transpose") for i in (1, 2, 3)))


class Reconstruction:
    """Refits the layers of ``gm`` that read fewer channels once ``surgery`` is done. To be made before it is done.

    :meth:`sites` are the layers and :meth:`operate` refits one of them, in their order: the sweep over the calibration
    data goes on from one to the next.
    """

    def __init__(self, gm: fx.GraphModule, batches: Iterable[Example], surgery: Surgery) -> None:
        self._gm, self._surgery, self._sweep = gm, surgery, Sweep(gm, batches)
        bindings = [b for b in surgery.groups.bindings if b.dim == 0]
        self._kept = {name: torch.from_numpy(surgery.kept[b.classes]) for b in bindings for name in b.names}
        shared = aliasing(gm)
        self._obstacles = {node: _obstacle(gm, node, shared) for node in gm.graph.nodes if self._reads_fewer(node)}

    def sites(self) -> Iterator[Site]:
        """The layers that read fewer channels, in graph order."""
        for node in self._obstacles:
            yield Site(node, self)

    def operate(self, node: fx.Node) -> Mapping[str, Any]:
        """Refit the layer that ``node`` calls; returns what to say of it.

        Returns:
            ``rows``, ``ridge`` (the lambda) and the errors before and after, each the norm of the difference to the
            original output relative to the norm of that output, over all rows; or ``not_refitted``, why.
        """
        if reason := self._obstacles[node]:
            return {"not_refitted": reason}
        twin, values = self._sweep.until(node)
        assert isinstance(twin, READABLE), "else there is an obstacle"
        try:
            found = refit(twin, values, self._kept.get(f"{node.target}.weight"))
        except NotRefitted as reason:
            return {"not_refitted": str(reason)}
        change = found.change()
        if change is None:
            return {"not_refitted": "no change that fits most of the calibration data is better on the rest of it"}
        for layer in (self._gm.get_submodule(str(node.target)), twin):
            _apply(layer, found, change)  # type: ignore[arg-type]
        before, after = found.errors()
        return {"rows": found.rows, "ridge": found.ridge, "error_before": before, "error_after": after}

    def _reads_fewer(self, node: fx.Node) -> bool:
        module = self._gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, _READERS) and not matching.is_call(node, _FUNCTIONS):
            return False
        x = self._surgery.groups.found.get(first_input(node))
        return isinstance(x, Labelled) and self._surgery.new_sizes(x) != tuple(x.shape)


def _obstacle(gm: fx.GraphModule, node: fx.Node, shared: Aliasing) -> str | None:
    """Why the layer at ``node`` cannot be refitted."""
    if node.op != "call_module":
        return "it is called as a function; tracing with example inputs makes it a module"
    module = gm.get_submodule(str(node.target))
    if not isinstance(module, READABLE) or type(module) not in READABLE or module.weight.is_complex():
        return f"of {type(module).__name__} there is no refit, only of real linear layers and convolutions"
    if not shared.is_private(module):
        return "it is called several times, or shares its weights"
    return matching.override_of(module)


def _apply(layer: Readable, found: Refit, change: tuple[Tensor, Tensor]) -> None:
    d, s = change
    with torch.no_grad():
        layer.weight.copy_((found.weight + d).mT.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(as_double(layer.bias) + s.flatten())
