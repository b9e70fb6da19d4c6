"""Every registered pass keeps the contract, on drawn networks, single blocks and named ones; broken passes do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch
from hypothesis import event, given
from torch import nn

import fxcompress
from fxcompress import editing
from fxcompress.errors import VerificationError
from fxcompress.pass_base import Guarantee, Pass, PassContext, Refusal, Site
from tests import contract
from tests.networks import Network, single_blocks
from tests.strategies import networks
from tests.zoo import NETS

PASSES = sorted(fxcompress.registered_passes())
AFTER_OTHERS = ("attach-distillation", "detach-distillation", "lower-int8")
"""Passes that act only on what another one made, or with a teacher; what they do there is tested with that."""
EXACT = [
    name
    for name in PASSES
    if name not in AFTER_OTHERS and fxcompress.registered_passes()[name].guarantee is Guarantee.EXACT
]
SINGLE_BLOCKS = single_blocks(every_kind=False)
ALL_SINGLE_BLOCKS = single_blocks()


@pytest.mark.parametrize("name", PASSES)
@given(network=networks())
def test_drawn_networks(name: str, network: Network) -> None:
    event(f"sites: {contract.check_contract(name, network)}")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", PASSES)
def test_named_networks(name: str, net: str) -> None:
    contract.check_contract(name, NETS[net]())


@pytest.mark.slow
@pytest.mark.parametrize("block", ALL_SINGLE_BLOCKS)
@pytest.mark.parametrize("name", PASSES)
def test_single_blocks(name: str, block: str) -> None:
    contract.check_contract(name, ALL_SINGLE_BLOCKS[block]())


def exact_passes_in_sequence(network: Network) -> None:
    double = network.double()
    given_ = {"example_inputs": double.args, "example_kwargs": double.kwargs, "calibration": double.calibration()}
    result = fxcompress.compile(double.module, EXACT, verify=False, **given_)
    contract.check_outputs(double, result, network.tolerance)
    contract.check_arithmetic(result, double)
    again = fxcompress.compile(result, EXACT, verify=False, **given_)
    contract.check_arithmetic(again, double)
    assert len(fxcompress.report(again).to_dict()["passes"]) == 2 * len(EXACT)


@given(network=networks())
def test_drawn_networks_in_sequence(network: Network) -> None:
    exact_passes_in_sequence(network)


@pytest.mark.parametrize("block", SINGLE_BLOCKS)
def test_single_blocks_in_sequence(block: str) -> None:
    exact_passes_in_sequence(SINGLE_BLOCKS[block]())


def with_a_zero_channel() -> Network:
    """One channel of a batch norm gives nothing: drawn parameters never do that, trained ones may."""
    network = NETS["resnet"]()
    norm = network.module.layer1[0].bn1
    with torch.no_grad():
        norm.weight[0] = norm.bias[0] = 0
    return network


@pytest.mark.parametrize("name", [name for name in PASSES if name not in AFTER_OTHERS])
def test_a_pass_acts_somewhere(name: str) -> None:
    """A pass that never finds a site would keep every promise."""
    candidates = [*(NETS[net]() for net in ("resnet", "mobilenet", "vit-attention")), with_a_zero_channel()]
    compiled = [contract.check_untouched(name, network) for network in candidates]
    sites = [fxcompress.report(gm).to_dict()["passes"][-1]["sites"] for gm in compiled if gm is not None]
    assert sum(sites) > 0


# --- the contract can fail: passes that break one clause each ---


class Broken(Pass):
    """Acts on every ReLU module."""

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        for node in context.gm.graph.nodes:
            if isinstance(context.module(node), nn.ReLU):
                yield Site(node)


@dataclasses.dataclass(frozen=True)
class DropsReLU(Broken):
    """Wrong: not equal over the reals."""

    name: ClassVar[str] = "drops-relu"

    def rewrite(self, site: Site) -> None:
        editing.replace(site.node, site.node.args[0])


@dataclasses.dataclass(frozen=True)
class SlightlyWrong(Broken):
    """Wrong by 1e-6, which float32 cannot tell from rounding."""

    name: ClassVar[str] = "slightly-wrong"

    def rewrite(self, site: Site) -> None:
        with site.node.graph.inserting_before(site.node):
            scaled = site.node.graph.call_function(torch.mul, (site.node.args[0], 1 + 1e-6))
        site.node.update_arg(0, scaled)


@dataclasses.dataclass(frozen=True)
class NeverDone(Broken):
    """Equal, but finds its own result again."""

    name: ClassVar[str] = "never-done"

    def rewrite(self, site: Site) -> None:
        with site.node.graph.inserting_before(site.node):
            again = site.node.graph.call_module(str(site.node.target), site.node.args)
        site.node.update_arg(0, again)


@dataclasses.dataclass(frozen=True)
class CutsGradient(Broken):
    """Equal in value, but what stands before it no longer trains."""

    name: ClassVar[str] = "cuts-gradient"

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        yield from (s for s in super().sites(context) if s.node.args[0].target != "detach")

    def rewrite(self, site: Site) -> None:
        with site.node.graph.inserting_before(site.node):
            cut = site.node.graph.call_method("detach", (site.node.args[0],))
        site.node.update_arg(0, cut)


@pytest.mark.parametrize("broken", [DropsReLU(), SlightlyWrong()])
def test_the_contract_sees_unequal_outputs(broken: Pass) -> None:
    network = NETS["shufflenet"]()
    with pytest.raises(AssertionError, match="off by"):
        contract.check_equivalence(broken, network, contract.compress(broken, network, verify=False))


@pytest.mark.parametrize("broken", [DropsReLU(), SlightlyWrong()])
def test_the_engine_sees_unequal_outputs(broken: Pass) -> None:
    with pytest.raises(VerificationError):
        contract.compress(broken, NETS["shufflenet"]())


def test_the_contract_sees_a_pass_that_is_never_done() -> None:
    with pytest.raises(AssertionError, match="finds sites again"):
        contract.check_idempotence(NeverDone(), NETS["shufflenet"]())


def test_the_contract_sees_parameters_that_no_longer_train() -> None:
    with pytest.raises(AssertionError, match="no gradient any more"):
        contract.check_trains(CutsGradient(), NETS["shufflenet"]())


def _replaces_parameter(model: nn.Module) -> None:
    model.fc.weight = nn.Parameter(model.fc.weight.detach().clone())


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "one number": lambda model: model.fc.weight.data[0, 0].add_(1e-6),
    "a statistic": lambda model: model.bn1.running_mean.add_(1e-6),
    "a counter": lambda model: model.bn1.num_batches_tracked.add_(1),
    "another tensor": _replaces_parameter,
    "training": lambda model: model.layer1[0].bn1.train(),
    "requires_grad": lambda model: model.conv1.weight.requires_grad_(False),
    "a hook": lambda model: model.fc.register_forward_hook(print),
    "a patched forward": lambda model: setattr(model.fc, "forward", model.fc.forward),
    "a new child": lambda model: model.add_module("extra", nn.Identity()),
    "another module": lambda model: setattr(model, "relu", nn.ReLU(inplace=True)),
    "a gradient": lambda model: setattr(model.fc.bias, "grad", torch.zeros_like(model.fc.bias)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_contract_sees_a_change_of_the_callers_model(change: str) -> None:
    model = NETS["resnet"]().module
    before = contract.snapshot(model)
    contract.assert_untouched(before, contract.snapshot(model))
    CHANGES[change](model)
    with pytest.raises(AssertionError, match="the caller's model has another"):
        contract.assert_untouched(before, contract.snapshot(model))
