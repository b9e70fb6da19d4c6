"""Tracing over drawn networks: equal, in both modes, whatever was drawn."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from torch import nn

from fxcompress.analysis.outputs import compare
from fxcompress.trace import trace
from tests import contract
from tests.networks import Network, single_blocks
from tests.strategies import networks
from tests.zoo import NETS

BLOCKS = single_blocks(every_kind=False)


def check_trace(network: Network) -> None:
    """Equal to the model at several batch sizes in float32, and again after a copy; dropout and norms obey the mode."""
    gm = trace(network.module, network.args, example_kwargs=network.kwargs)
    for seed, batch in ((1, None), (2, 5), (3, 1)):
        args, kwargs = network.fresh(seed, batch)
        expected = network.module(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        found = compare(expected, gm(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        assert not found.structural
        assert not found.discrete
        assert found.error <= 1e-6
    _check_training_mode(network, copy.deepcopy(gm))


def _check_training_mode(network: Network, gm: nn.Module) -> None:
    model = copy.deepcopy(network.module).train()
    gm.train()
    args, kwargs = network.fresh(4, 6)
    outputs = []
    for module in (model, gm):
        torch.manual_seed(0)
        outputs.append(module(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
    found = compare(outputs[0], outputs[1])
    assert not found.structural
    assert found.error <= 1e-5, "random numbers are drawn in the same order, and batches normalised alike"


@given(network=networks())
def test_drawn_networks(network: Network) -> None:
    check_trace(network)


@pytest.mark.parametrize("block", BLOCKS)
def test_single_blocks(block: str) -> None:
    check_trace(BLOCKS[block]())


@pytest.mark.parametrize("net", NETS)
def test_named_networks(net: str) -> None:
    network = NETS[net]()
    gm = trace(network.module, network.args, example_kwargs=network.kwargs)
    contract.check_outputs(network, gm, 1e-6)
