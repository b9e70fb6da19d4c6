"""Two graphs on all calibration data, node by node: one that is being rewritten, beside the one it came from.

What is alive at one node must fit in memory, of both, beside three copies of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress import matching
from fxcompress.analysis.running import SteppedRun
from fxcompress.calibration import checked
from fxcompress.editing import private_copy
from fxcompress.pass_base import Example

__all__ = ["Sweep"]


class Sweep:
    """Goes on from layer to layer, so that each is seen with what those before it have become.

    To be made before anything in ``gm`` is changed. A copy of ``gm`` as it is at :meth:`begin` runs; what is changed in
    one of them afterwards is to be changed in both.

    Args:
        gm: the graph.
        batches: the calibration data.

    Raises:
        UsageError: a batch does not fit the graph, or there are none.
    """

    def __init__(self, gm: fx.GraphModule, batches: Iterable[Example]) -> None:
        self._gm, self._data = gm, checked(gm, batches)
        self._original = private_copy(gm).eval()
        self._was = dict(zip(gm.graph.nodes, self._original.graph.nodes, strict=True))
        self._twin: fx.GraphModule | None = None

    def begin(self) -> fx.GraphModule:
        """Copy ``gm``, if that has not been done; :meth:`until` sees to it too.

        Returns:
            The copy that runs.
        """
        if self._twin is None:
            self._twin = private_copy(self._gm).eval()
            self._todo: Iterator[Any] = zip(list(self._gm.graph.nodes), list(self._twin.graph.nodes), strict=True)
            self._before = [SteppedRun(self._original, batch.args, batch.kwargs) for batch in self._data]
            self._now = [SteppedRun(self._twin, batch.args, batch.kwargs) for batch in self._data]
            self._halted: fx.Node | None = None
            tensors = [*self._gm.parameters(), *self._gm.buffers()]
            self._cuda = sorted({t.device.index for t in tensors if t.is_cuda})
        return self._twin

    def until(self, wanted: fx.Node) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
        """Go on to the layer that ``wanted``, a node of ``gm`` after those asked for before, calls.

        Returns:
            The layer in the copy that runs, and for each batch what it reads now and what it gave before.
        """
        running = self.begin()
        with torch.no_grad(), torch.random.fork_rng(devices=self._cuda):
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
        return running.get_submodule(str(twin.target)), values

    def _step(self, node: fx.Node) -> None:
        for run in self._now:
            run.step(node)
