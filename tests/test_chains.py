"""Chains of passes on drawn networks, and what holds after every step; see ``tests.chains``."""

from __future__ import annotations

import random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import fxcompress
from fxcompress import Pass, UsageError
from fxcompress.order import in_order
from fxcompress.registry import resolve
from tests import chains, contract
from tests.networks import Network
from tests.strategies import networks
from tests.zoo import NETS


def test_every_registered_pass_is_in_the_tables() -> None:
    assert set(chains.OPTIONS) == set(fxcompress.registered_passes())
    for name, options in chains.OPTIONS.items():
        for text in options:
            assert resolve(f"{name}:{text}").name == name


@given(network=networks(most=4, depth=1), specs=chains.chains())
@settings(max_examples=14)
def test_drawn_chains(network: Network, specs: list[str]) -> None:
    event(f"length {len(chains.check_chain(network, specs))}")


USUAL = (
    ["remove-identity", "prune-channels:ratio=0.3,reconstruct=True", "adapt-batch-norm", "fold-batch-norm"],
    ["fold-batch-norm", "prune-channels:ratio=0.3", "alds:ratio=0.2", "quantize", "lower-int8"],
    ["fold-batch-norm", "equalize-layers", "smooth-quant", "fake-quantize", "quantize"],
    ["prune-channels:ratio=0.3", "attach-distillation", "fold-batch-norm", "detach-distillation"],
    ["fold-batch-norm", "quantize", "lower-int8", "cast-precision"],
)


@pytest.mark.parametrize("specs", USUAL, ids=lambda specs: " ".join(s.partition(":")[0] for s in specs))
@pytest.mark.parametrize("net", ["resnet", "vit-attention"])
def test_usual_chains(net: str, specs: list[str]) -> None:
    in_order(specs)
    assert len(chains.check_chain(NETS[net](), specs)) == len(specs)


@pytest.mark.filterwarnings("ignore:pass .*rolled back")
@pytest.mark.parametrize("specs", USUAL[1:3], ids=lambda specs: " ".join(s.partition(":")[0] for s in specs))
def test_usual_chains_where_some_are_rolled_back(specs: list[str]) -> None:
    network = NETS["resnet"]()
    data = network.calibration()
    gm = fxcompress.compile(network.module, specs, network.args, calibration=data, reject_slower=True)
    contract.check_outputs(network, gm)
    contract.check_arithmetic(gm, network)
    contract.check_copies(specs[-1].partition(":")[0], network, gm)
    for record in fxcompress.report(gm).passes:
        assert not (record.rolled_back and record.sites)


@pytest.mark.parametrize("preset", fxcompress.presets())
@pytest.mark.parametrize("net", ["mobilenet", "vit-encoder"])
def test_presets(net: str, preset: str) -> None:
    network = NETS[net]()
    gm = fxcompress.compile(
        network.module,
        preset,
        network.args,
        example_kwargs=network.kwargs,
        calibration=network.calibration(),
    )
    assert len(fxcompress.report(gm).passes) == len(fxcompress.presets()[preset])
    contract.check_outputs(network, gm)


@given(specs=chains.chains(), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_wrong_orders_are_refused_and_right_ones_are_not(specs: list[str], seed: int) -> None:
    shuffled = random.Random(seed).sample(specs, len(specs))
    passes = [resolve(spec) for spec in shuffled]
    wrong = [(early, late) for i, late in enumerate(passes) for early in passes[:i] if _declared(late, early)]
    event(f"wrong: {min(len(wrong), 1)}")
    if wrong:
        with pytest.raises(UsageError, match="The right order: ") as caught:
            in_order(shuffled)
        told = str(caught.value)
        assert any(f"{early.name!r} stands before {late.name!r}" in told for early, late in wrong)
        in_order(told.partition("The right order: ")[2].split(", "))
    else:
        assert [p.name for p in in_order(shuffled)] == [p.name for p in passes]
    best = fxcompress.recommended_order(shuffled)
    in_order(best)
    assert sorted(best) == sorted(shuffled)
    assert fxcompress.recommended_order(best) == best


def _declared(first: Pass, second: Pass) -> bool:
    return second.name in first.before or first.name in second.after


# ------------------------------------------------------------------------------------------------- many, and slowly
@pytest.mark.slow
@given(network=networks(), specs=chains.chains())
@settings(max_examples=400, derandomize=False)
def test_many_chains(network: Network, specs: list[str]) -> None:
    event(f"length {len(chains.check_chain(network, specs, thorough=True))}")


@pytest.mark.slow
@pytest.mark.parametrize("specs", USUAL, ids=lambda specs: " ".join(s.partition(":")[0] for s in specs))
@pytest.mark.parametrize("net", sorted(NETS))
def test_usual_chains_on_all_named_networks(net: str, specs: list[str]) -> None:
    chains.check_chain(NETS[net](), specs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("specs", USUAL[1:3], ids=lambda specs: " ".join(s.partition(":")[0] for s in specs))
@pytest.mark.parametrize("net", ["mobilenet", "vit-attention"])
def test_chains_are_compiled(net: str, specs: list[str], backend: str) -> None:
    network = NETS[net]()
    gm = fxcompress.compile(network.module, specs, network.args, calibration=network.calibration())
    chains.check_compiled(gm, network, backend)
