"""Two graphs on all calibration data, node by node: one that is being rewritten, beside the one it came from.

What is alive at one node must fit in memory, of both, beside three copies of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress import matching
from fxcompress.analysis.running import SteppedRun
from fxcompress.editing import private_copy
from fxcompress.pass_base import Example

__all__ = ["Sweep"]


class Sweep:
    """Goes on from layer to layer, so that each is seen with what those before it have become.

    Args:
        original: the graph before.
        gm: as it is now. A copy of it runs; :meth:`until` gives the copy's layer along with the graph's, and what is
            changed in one is to be changed in both.
        was: nodes of ``gm`` to those of ``original``; others are new.
        data: the calibration data.

    Attributes:
        twin: the copy that runs.
    """

    def __init__(
        self, original: fx.GraphModule, gm: fx.GraphModule, was: Mapping[fx.Node, fx.Node], data: list[Example]
    ) -> None:
        self.twin, self._was = private_copy(gm).eval(), was
        self._todo: Iterator[Any] = zip(list(gm.graph.nodes), list(self.twin.graph.nodes), strict=True)
        self._before = [SteppedRun(original, batch.args, batch.kwargs) for batch in data]
        self._now = [SteppedRun(self.twin, batch.args, batch.kwargs) for batch in data]
        self._halted: fx.Node | None = None
        tensors = [*gm.parameters(), *gm.buffers()]
        self.cuda = sorted({t.device.index for t in tensors if t.is_cuda})

    def until(self, wanted: fx.Node) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
        """Go on to the layer that ``wanted``, a node of ``gm`` after those asked for before, calls.

        Returns:
            The layer in the copy that runs, and for each batch what it reads now and what it gave before.
        """
        with torch.no_grad(), torch.random.fork_rng(devices=self.cuda):
            if self._halted is not None:
                self._step(self._halted)
            for node, twin in self._todo:
                before = self._was.get(node)
                if before is not None:
                    for run in self._before:
                        run.step(before)
                if node is wanted:
                    break
                self._step(twin)
        assert before is not None, "a layer that was there before"
        self._halted = twin
        source = matching.tensor_input(twin)
        assert source is not None, "a layer reads a tensor"
        values = [(n.env[source], b.env[before]) for b, n in zip(self._before, self._now, strict=True)]
        return self.twin.get_submodule(str(twin.target)), values

    def _step(self, node: fx.Node) -> None:
        for run in self._now:
            run.step(node)
