"""Stochastic depth of libraries is taken over bit for bit; what only looks like it is left alone."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.canonical.stochastic_depth import adopt_stochastic_depth
from fxcompress.modules import StochasticDepth


class _Base(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop_prob = p


class ByRow(_Base):
    """As timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * kept.div_(1 - self.drop_prob)


class ByBatch(_Base):
    """As torchvision has it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.empty([1] * x.ndim, dtype=x.dtype).bernoulli_(1.0 - self.drop_prob)
        return x * kept.div_(1.0 - self.drop_prob)


class ByAddition(_Base):
    """As Hugging Face has it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = (1 - self.drop_prob) + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1))
        return x.div(1 - self.drop_prob) * kept.floor_()


class ByElement(_Base):
    """Dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).bernoulli_(1 - self.drop_prob) / (1 - self.drop_prob) if self.training else x


class Doubling(_Base):
    """Not the identity in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0 if not self.training else x * self.drop_prob


def _traced(branch: nn.Module) -> torch.fx.GraphModule:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.branch = nn.Linear(4, 4), branch

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(self.linear(x))

    return fxcompress.trace(Residual().eval(), torch.randn(3, 4))


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 0.9])
@pytest.mark.parametrize(
    ("kind", "whole", "floored"), [(ByRow, False, False), (ByBatch, True, False), (ByAddition, False, True)]
)
def test_taken_over(kind: type[_Base], whole: bool, floored: bool, p: float) -> None:
    gm = _traced(kind(p))
    found = gm.get_submodule("branch")
    assert isinstance(found, StochasticDepth)
    assert (found.p, found.scale, found.whole, found.floored) == (p, True, whole, floored)
    x = torch.randn(16, 4)
    for seed in range(5):
        torch.manual_seed(seed)
        ours = gm.train()(x)
        torch.manual_seed(seed)
        theirs = x + kind(p)(gm.linear(x))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [ByElement, Doubling])
def test_left_alone(kind: type[_Base]) -> None:
    assert not any(isinstance(m, StochasticDepth) for m in _traced(kind(0.3)).modules())


def test_the_modules_of_torchvision_are_taken_over() -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    from tests import torchvision_shim  # noqa: F401  (makes it importable)

    stochastic_depth = importlib.import_module("torchvision.ops.stochastic_depth")
    for mode in ("row", "batch"):
        gm = _traced(stochastic_depth.StochasticDepth(0.2, mode))
        assert any(isinstance(m, StochasticDepth) for m in gm.modules())


def test_removed_for_good_where_it_does_nothing() -> None:
    gm = fxcompress.compile(_traced(ByRow(0.5)), ["remove-identity"], torch.randn(3, 4))
    assert not any(isinstance(m, StochasticDepth) for m in gm.modules())


def test_random_numbers_of_the_caller_are_not_used_up() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Identity()))
    gm.set_submodule("0", ByRow(0.5))
    adopt_stochastic_depth(gm, next(n for n in gm.graph.nodes if n.op == "call_module"))
    assert isinstance(gm.get_submodule("0"), StochasticDepth)
    assert torch.equal(torch.rand(1), expected)
