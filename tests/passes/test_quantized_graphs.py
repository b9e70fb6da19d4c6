"""Drawn networks on integers: what every quantised and every lowered graph owes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import fxcompress
from fxcompress.analysis.running import GraphRunner
from fxcompress.passes.quantization import LowerInt8, Quantize
from fxcompress.passes.quantization.kernels import IntegerLayer, unavailable
from fxcompress.passes.quantization.kernels_linear import WeightOnlyLinear
from fxcompress.passes.quantization.vocabulary import dequantize, is_quantize, per_tensor, quantize
from tests import contract
from tests.networks import Network, relative_error, run
from tests.strategies import networks

needs_kernels = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
STATIC = st.fixed_dictionaries(
    {
        "weight_bits": st.sampled_from((8, 4)), "symmetric": st.booleans(), "activation_bits": st.sampled_from((8, 16)),
        "granularity": st.sampled_from(("channel", "tensor", 2)), "round_addends": st.booleans(),
    }
)  # fmt: skip
WITH_KERNELS = st.builds(
    lambda weight_bits, others: {"weight_bits": weight_bits, **others},
    st.sampled_from((8, 4)),
    st.sampled_from(({}, {"symmetric": True}, {"round_addends": True}, {"dynamic": True}, {"activation_bits": None})),
)
ON_LAYERS = networks(kinds=("2d", "vector", "sequence"))


def quantised(network: Network, **options: Any) -> fx.GraphModule:
    given_ = {"example_inputs": network.args, "example_kwargs": network.kwargs}
    data = network.calibration()
    return fxcompress.compile(network.module, ["fold-batch-norm", Quantize(**options)], calibration=data, **given_)


def lowered(reference: fx.GraphModule, network: Network) -> fx.GraphModule:
    given_ = {"example_inputs": network.args, "example_kwargs": network.kwargs}
    return fxcompress.compile(reference, [LowerInt8()], **given_)


class Watch(GraphRunner):
    """Looks at every value that is rounded to a fixed scale."""

    seen = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if is_quantize(n):
            by, x = per_tensor(n), self.fetch_args_kwargs_from_env(n)[0][0]
            integers = result.int()
            assert result.dtype is by.grid.dtype
            assert by.grid.low <= int(integers.min()) <= int(integers.max()) <= by.grid.high
            reals = dequantize(result, by)
            assert torch.equal(quantize(reals, by).int(), integers), "rounding again changes integers"
            ends = (by.scale * (end - by.zero_point) for end in (by.grid.low, by.grid.high))
            wanted = x.double().clamp(*ends)
            slack = 1e-6 * (wanted.abs() + by.scale * max(1, abs(by.zero_point)))
            assert bool(((reals.double() - wanted).abs() <= by.scale / 2 + slack).all())
            self.seen += 1
        return result


def _is_near_its_reference(layer: Any, args: tuple[Any, ...], found: Tensor) -> None:
    args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    expected = layer.reference(*args)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if found.dtype is torch.uint8:
        assert int((found.int() - expected.int()).abs().max()) <= 1
    else:
        part = 2e-2 if isinstance(layer, WeightOnlyLinear) else 1e-3  # the former multiplies in bfloat16
        assert float((found - expected).abs().max()) <= part * float(expected.abs().max()) + 1e-6


@given(network=networks(), options=STATIC)
@settings(deadline=None)
def test_values_are_on_their_scales(network: Network, options: dict[str, Any]) -> None:
    reference = quantised(network, **options)
    watch = Watch(reference)
    watch.observe(*network.fresh(31, network.batch + 2))
    event(f"values: {min(watch.seen, 5)}")


@given(network=networks(), options=st.one_of(WITH_KERNELS, STATIC))
@settings(deadline=None)
def test_quantised_graphs_are_models(network: Network, options: dict[str, Any]) -> None:
    """Other batch sizes, saved and loaded weights, copies: for both graphs."""
    reference = quantised(network, **options)
    graphs = [reference] if unavailable() else [reference, lowered(reference, network)]
    for gm in graphs:
        contract.check_outputs(network, gm)
        contract.check_state_dict("quantize", network, gm)
        contract.check_copies("quantize", network, gm)


@needs_kernels
@given(network=ON_LAYERS, options=WITH_KERNELS)
@settings(deadline=None)
def test_a_lowered_graph_is_its_reference_within_a_quantum_at_each_kernel(
    network: Network, options: dict[str, Any]
) -> None:
    reference = quantised(network, **options)
    found, inputs = lowered(reference, network), network.fresh(32, network.batch + 2)
    layers = [m for m in found.modules() if isinstance(m, IntegerLayer)]
    event(f"kernels: {min(len(layers), 5)}")
    for layer in layers:
        layer.register_forward_hook(_is_near_its_reference)
    run(found, inputs)
    for layer in layers:
        layer.forward = layer.reference  # type: ignore[method-assign]
    error = relative_error(run(reference, inputs), run(found, inputs))
    assert error < 1e-3, f"the kernels are wired otherwise: {error}"


@given(network=ON_LAYERS, options=WITH_KERNELS)
@settings(deadline=None, max_examples=15)
def test_dynamo_takes_them_whole(network: Network, options: dict[str, Any]) -> None:
    reference, inputs = quantised(network, **options), network.fresh(33, network.batch + 2)
    expected = run(reference, inputs)
    for gm in [reference] if unavailable() else [reference, lowered(reference, network)]:
        torch._dynamo.reset()
        fast = torch.compile(gm, backend="eager", fullgraph=True)  # what follows is not ours
        assert relative_error(expected, run(fast, inputs)) < 1e-3
