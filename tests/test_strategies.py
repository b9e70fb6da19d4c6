"""The drawn networks are fit to test with: they run, answer to their inputs, and obey the rules of a PyTorch model."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.networks import Network, leaves, relative_error, run, single_blocks, unresponsive_inputs
from tests.strategies import networks
from tests.zoo import NETS

SINGLE_BLOCKS = single_blocks()


def check(network: Network) -> None:
    outputs = run(network.module, network.fresh(1))
    assert all(leaf.isfinite().all() for _, leaf in leaves(outputs) if isinstance(leaf, Tensor))
    assert relative_error(outputs, run(network.module, network.fresh(1))) == 0, "not deterministic in eval mode"
    copy = pickle.loads(pickle.dumps(network.module))
    assert relative_error(outputs, run(copy, network.fresh(1))) == 0, "another model after pickling"
    largest = max(leaf.abs().max().item() for _, leaf in leaves(outputs) if isinstance(leaf, Tensor))
    assert largest < 1e3, "badly conditioned"


def trains(network: Network) -> None:
    args, kwargs = network.fresh(2, batch=4)
    outputs = network.module.train()(*args, **kwargs)
    tensors = [leaf for _, leaf in leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if tensors:
        sum(leaf.square().sum() for leaf in tensors).backward()
    grads = [p.grad for p in network.module.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    network.module.eval().zero_grad()


@given(networks())
def test_a_drawn_network_runs_and_is_deterministic(network: Network) -> None:
    check(network)
    trains(network)


@given(networks(), st.integers(1, 5), st.integers(10, 1000))
def test_a_drawn_network_depends_on_every_input_at_every_batch_size(network: Network, batch: int, seed: int) -> None:
    # One pair of inputs may leave a ReLU shut; eight in a row do not.
    silent = [set(unresponsive_inputs(network, seed + 2 * turn, batch)) for turn in range(8)]
    assert not set.intersection(*silent)
    outputs = run(network.module, network.fresh(seed, batch))
    sizes = {leaf.shape[0] for _, leaf in leaves(outputs) if isinstance(leaf, Tensor)}
    assert sizes == {batch}


@given(networks(dtype=torch.float64, kinds=("2d", "sequence")))
@settings(max_examples=20)
def test_the_dtype_is_an_option(network: Network) -> None:
    outputs = run(network.module, network.fresh(1))
    assert {leaf.dtype for _, leaf in leaves(outputs) if isinstance(leaf, Tensor)} == {torch.float64}


@given(networks())
@settings(max_examples=20)
def test_a_double_is_the_same_network(network: Network) -> None:
    double = network.double()
    expected = run(double.module, double.fresh(3))
    found = run(network.module, network.fresh(3))
    pairs = zip(leaves(expected), leaves(found), strict=True)
    for (_, a), (_, b) in pairs:
        if isinstance(a, Tensor):
            assert (a - b).norm() <= 1e-3 * a.norm(), "float32 arithmetic alone changes this network's outputs"


@pytest.mark.parametrize("name", SINGLE_BLOCKS)
def test_every_block_with_every_option(name: str) -> None:
    network = SINGLE_BLOCKS[name]()
    check(network)
    trains(network)
    assert not unresponsive_inputs(network, seed=5, batch=3)


@pytest.mark.parametrize("name", NETS)
def test_every_named_network(name: str) -> None:
    network = NETS[name]()
    check(network)
    trains(network)
    assert not unresponsive_inputs(network, seed=5, batch=3)
