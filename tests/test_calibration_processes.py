"""Calibration over several processes gives what one process gives."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

import fxcompress
from fxcompress.pass_base import Pass
from fxcompress.passes.adapt_batch_norm import AdaptBatchNorm
from fxcompress.passes.low_rank import Alds
from fxcompress.passes.pruning import PruneChannels
from fxcompress.passes.quantization import Quantize, SmoothQuant
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.observers import OBSERVERS, RangeObserver

PASSES: dict[str, Pass] = {
    "min-max": Quantize(observer="min-max"),
    "moving-average": Quantize(observer="moving-average"),
    "mse": Quantize(observer="mse"),
    "corrected": Quantize(weight_bits=4, correct_bias=True, observer="min-max"),
    "smooth-quant": SmoothQuant(powers_of_two=False),
    "alds": Alds(0.3, error="activation"),
    "activation": PruneChannels(0.3, importance="activation"),
    "pfp": PruneChannels(0.3, importance="pfp"),
    "adapt-batch-norm": AdaptBatchNorm("batch"),
}


class Net(nn.Module):
    """A convolution, a batch norm, a layer norm and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.layer_norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.b(self.a(self.layer_norm(x)).relu())


def results() -> dict[str, dict[str, Tensor]]:
    """What each pass makes of the same network and data."""
    torch.manual_seed(0)
    model, batches = Net().eval(), [torch.randn(4, 3, 8, 8) for _ in range(5)]
    found = {}
    for name, pass_ in PASSES.items():
        gm = fxcompress.compile(model, [pass_], batches[0], calibration=batches, verify=False)
        found[name] = {**gm.state_dict(), "output": gm(batches[0])}
    return found


def work(rank: int, world: int, folder: str) -> None:
    """One process."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results()))
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available() or sys.platform == "win32", reason="needs gloo")
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (2, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    one: Any = results()
    others = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    for name in PASSES:
        for other in others:
            assert other[name].keys() == one[name].keys()
            for key, expected in one[name].items():
                found, bound = other[name][key], 2e-2 if name == "mse" else 1e-5  # bins are of other widths
                if expected.is_floating_point():
                    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max() + 1e-6), name
                else:
                    assert torch.equal(found, expected), name
        for key, value in others[0][name].items():
            assert torch.equal(value, others[1][name][key]), f"{name}: processes disagree"


@pytest.mark.parametrize("method", [m for m in OBSERVERS if m != "moving-average"])
def test_ranges_are_merged(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(200, generator=generator) * scale for scale in (1.0, 0.3, 2.5, 1.7)]
    whole, first, second = (RangeObserver(method) for _ in range(3))
    for index, value in enumerate(values):
        whole.update(value)
        (first, second)[index % 2].update(value)
    first.merge(second)
    first.merge(RangeObserver(method))
    a, b = whole.result(), first.result()
    assert (a.finite, a.count) == (b.finite, b.count)
    grid = Grid.of_activations(8, False)
    assert a.range(grid) == pytest.approx(b.range(grid), rel=0.03)
    assert not hasattr(RangeObserver("moving-average"), "merge")
