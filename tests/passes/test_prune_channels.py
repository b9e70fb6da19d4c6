"""PruneChannels: one network by hand, what is exact in drawn ones, that anything pruned runs and trains, budgets, and
every option and refusal."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.analysis import cost, shapes
from fxcompress.analysis.channels import channel_groups
from fxcompress.editing import private_copy
from fxcompress.errors import FxCompressError, PreconditionError, UsageError
from fxcompress.matching import name_of_call
from fxcompress.passes.pruning import PruneChannels
from fxcompress.passes.pruning.budget import Budget
from fxcompress.passes.pruning.importance import Magnitude
from tests import contract
from tests.analysis.removal import check_removal, drawn, removed
from tests.networks import BLOCKS, Block, Network, Signal, SingleInput, Stack, assemble, run, settle
from tests.networks.base import Options, build, project
from tests.passes.driver import apply
from tests.strategies import networks, signals, stacks
from tests.torchvision_shim import models
from tests.zoo import NETS

ATTENTION = ("heads", "head_dim")


# --- by hand ---


def by_hand() -> nn.Sequential:
    """Squares summed over rows, biases and columns: 9, 1, 4 and 16 + 4."""
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0], [0.0], [0.0], [4.0]]))  # type: ignore[operator, union-attr]
        model[0].bias.copy_(torch.tensor([0.0, 1.0, 0.0, 2.0]))  # type: ignore[operator, union-attr]
        model[2].weight.copy_(torch.tensor([[0.0, 0.0, 2.0, 0.0]]))  # type: ignore[operator, union-attr]
        model[2].bias.copy_(torch.tensor([7.0]))  # type: ignore[operator, union-attr]
    return model.eval()


@pytest.mark.parametrize(
    ("ratio", "left"), [(0.0, [0, 1, 2, 3]), (0.25, [0, 2, 3]), (0.5, [0, 3]), (0.75, [3]), (0.99, [3])]
)
def test_by_hand(ratio: float, left: list[int]) -> None:
    model = by_hand()
    gm = fxcompress.compile(model, PruneChannels(ratio=ratio), torch.ones(2, 1))
    first, last = gm.get_submodule("0"), gm.get_submodule("2")
    assert torch.equal(first.weight, model[0].weight[left])  # type: ignore[index]
    assert torch.equal(first.bias, model[0].bias[left])  # type: ignore[index]
    assert torch.equal(last.weight, model[2].weight[:, left])  # type: ignore[index]
    assert torch.equal(last.bias, model[2].bias)  # type: ignore[arg-type]
    assert (first.out_features, last.in_features) == (len(left), len(left))


def test_the_record_says_what_became_of_each_layer() -> None:
    gm = fxcompress.compile(by_hand(), PruneChannels(), torch.ones(2, 1))
    (record,) = fxcompress.report(gm).to_dict()["passes"]
    assert record["sites"] == 2
    first, last = record["details"]
    assert {"out_features_before": 4, "out_features_after": 2}.items() <= first.items()
    assert {"in_features_before": 4, "in_features_after": 2}.items() <= last.items()
    assert (record["parameters_before"], record["parameters_after"]) == (13, 7)
    assert (record["macs_before"], record["macs_after"]) == (2 * 8, 2 * 4)


# --- what is exact, in drawn networks ---


class Project(Block):
    """A layer before and behind what is drawn, so that less of it is bound to the input and the output."""

    OPTIONS: ClassVar[Options] = {"out": (8, 6, 12)}

    def __init__(self, signal: Signal, out: int) -> None:
        super().__init__(signal.widened(out))
        self.layer = project(signal, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@st.composite
def inner_networks(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Network:
    """A network whose blocks stand between two projections."""
    signal = draw(signals())
    first = build(Project, signal, out=draw(st.sampled_from(Project.OPTIONS["out"])))
    inner = draw(stacks(first.out, BLOCKS, most=4, depth=2))
    last = build(Project, inner.out, out=4)
    stack = Stack(signal, [first, *inner.blocks, last])  # type: ignore[list-item]
    network = assemble(SingleInput, signal, Stack(signal, []), stack, "tensor", draw(st.sampled_from((2, 3, 1))), dtype)
    assume(settle(network, draw(st.integers(0, 999))))
    return network


def check_budget(gm: fx.GraphModule, network: Network, attention: str, seed: int) -> None:
    """What a graph is foretold to cost without some channels is what it costs without them."""
    gm = private_copy(gm)
    groups = channel_groups(gm, network.args, network.kwargs, attention=attention)
    budget = Budget(groups, cost(gm, network.args, network.kwargs))
    # Two at least: an einsum that sums over one term is an elementwise product, which costs no MACs.
    kept = drawn(groups, np.random.default_rng(seed), only_exact=False, least=2)
    foretold = budget.parameters(kept), budget.macs(kept)
    removed(gm, groups, kept)
    found = cost(gm, network.args, network.kwargs)
    assert foretold == (found.parameters, found.macs)


def check_drawn(network: Network, attention: str, seed: int) -> int:
    """Cut by its groups, a network runs and costs what was foretold; and what is said to be exact is.

    Returns:
        How many classes have gone exactly.
    """
    gm = fxcompress.trace(network.module, network.args, example_kwargs=network.kwargs)
    check_budget(gm, network, attention, seed)
    inputs, others = (network.args, network.kwargs), [network.fresh(11), network.fresh(12, network.batch + 2)]
    check_removal(gm, inputs, others, attention=attention, seed=seed, only_exact=False)
    return check_removal(
        gm, inputs, others, attention=attention, seed=seed, only_exact=True, tolerance=network.tolerance
    )


@given(network=inner_networks(torch.float64), attention=st.sampled_from(ATTENTION), seed=st.integers(0, 999))
def test_exact_groups_of_drawn_blocks(network: Network, attention: str, seed: int) -> None:
    event(f"classes removed: {check_drawn(network, attention, seed) > 0}")


@given(network=networks(dtype=torch.float64), attention=st.sampled_from(ATTENTION), seed=st.integers(0, 999))
def test_exact_groups_of_drawn_networks(network: Network, attention: str, seed: int) -> None:
    event(f"classes removed: {check_drawn(network, attention, seed) > 0}")


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("net", NETS)
def test_exact_groups_of_named_networks(net: str, attention: str) -> None:
    check_drawn(NETS[net]().double(), attention, seed=0)


# --- whatever is pruned runs and trains ---


@st.composite
def prunings(draw: st.DrawFn) -> PruneChannels:
    return PruneChannels(
        ratio=draw(st.sampled_from((0.5, 0.25, 0.9))),
        scope=draw(st.sampled_from(("local", "global", "isomorphic"))),
        attention=draw(st.sampled_from(ATTENTION)),
        round_to=draw(st.sampled_from((1, 2, 4))),
        min_channels=draw(st.sampled_from((2, 3))),  # PyTorch refuses a norm over one number
    )


@given(network=inner_networks(), pass_=prunings())
def test_pruned_networks_keep_the_contract(network: Network, pass_: PruneChannels) -> None:
    event(f"sites: {contract.check_contract(pass_, network)}")


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("net", NETS)
def test_named_networks_lose_most_channels(net: str, attention: Any) -> None:
    network = NETS[net]()
    result = contract.compress(PruneChannels(ratio=0.9, scope="global", attention=attention), network)
    contract.check_outputs(network, result)
    contract.check_trains("prune-channels", network, result)


@pytest.mark.parametrize("net", ["resnet", "shufflenet", "vit-attention"])
def test_torch_compile(net: str) -> None:
    network = NETS[net]()
    result = contract.compress("prune-channels", network)
    compiled = torch.compile(result, backend="eager", fullgraph=True)
    for batch in (network.batch, network.batch + 1):
        inputs = network.fresh(3, batch)
        torch.testing.assert_close(run(compiled, inputs), run(result, inputs))


@pytest.mark.parametrize("net", ["resnet", "densenet", "vit-encoder"])
def test_pruned_twice(net: str) -> None:
    network = NETS[net]()
    once = contract.compress(PruneChannels(ratio=0.25), network)
    twice = fxcompress.compile(once, PruneChannels(ratio=0.5), network.args, example_kwargs=network.kwargs)
    contract.check_outputs(network, twice)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (network.module, once, twice)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_other_passes_before_and_after() -> None:
    network = NETS["mobilenet"]()
    passes = ["remove-identity", PruneChannels(), "fold-batch-norm"]
    result = fxcompress.compile(network.module, passes, network.args)
    contract.check_outputs(network, result)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())


def test_a_model_in_training_mode_stays_in_it() -> None:
    network = NETS["resnet"]()
    model = network.module.train()
    before = contract.snapshot(model)
    gm = fxcompress.compile(model, PruneChannels(), network.args)
    contract.assert_untouched(before, contract.snapshot(model))
    assert all(module.training for module in gm.modules() if type(module).forward is not nn.Module.forward)


def test_it_learns() -> None:
    network = NETS["resnet"]()
    gm = contract.compress("prune-channels", network).train()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
    (x,), _ = network.fresh(5, batch=8)
    target = torch.arange(8) % 5
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(gm(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_parameters_stay_frozen() -> None:
    network = NETS["resnet"]()
    frozen = {"conv1.weight", "layer1.0.bn1.weight", "fc.bias"}
    for name in frozen:
        network.module.get_parameter(name).requires_grad_(False)
    gm = contract.compress("prune-channels", network)
    assert {name for name, p in gm.named_parameters() if not p.requires_grad} == frozen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    network = dataclasses.replace(NETS["resnet"](), dtype=dtype)
    gm = contract.compress("prune-channels", network)
    assert {p.dtype for p in gm.parameters()} == {dtype}


def test_layout_in_memory_stays() -> None:
    network = NETS["resnet"]()
    network.module.to(memory_format=torch.channels_last)
    gm = contract.compress("prune-channels", network)
    weight = gm.get_submodule("layer1.0.conv1").weight
    assert isinstance(weight, Tensor)
    assert weight.is_contiguous(memory_format=torch.channels_last)


# --- budgets ---


TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: models.resnet18(),
    "mobilenet_v2": lambda: models.mobilenet_v2(),
}


@functools.cache
def traced(name: str) -> fx.GraphModule:
    """The graph of a model of torchvision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fxcompress.trace(TORCHVISION[name]().eval(), IMAGE)


IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ratio", [0.25, 0.6])
@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize("name", TORCHVISION)
def test_targets_are_met_within_a_percent(name: str, measure: Any, scope: Any, ratio: float) -> None:
    gm, _ = apply(PruneChannels(ratio=ratio, measure=measure, scope=scope), traced(name), IMAGE)
    before, after = cost(traced(name), (IMAGE,)), cost(gm, (IMAGE,))
    whole, left = (getattr(c, {"params": "parameters", "macs": "macs"}[measure]) for c in (before, after))
    assert ratio <= 1 - left / whole <= ratio + 0.01


def test_a_target_with_rounded_channels() -> None:
    gm, _ = apply(PruneChannels(ratio=0.5, measure="macs", round_to=8), traced("resnet18"), IMAGE)
    before, after = cost(traced("resnet18"), (IMAGE,)), cost(gm, (IMAGE,))
    assert before.macs is not None
    assert after.macs is not None
    assert 0.5 <= 1 - after.macs / before.macs <= 0.55  # eight channels of the stream are 3%
    assert all(m.out_channels % 8 == 0 for m in gm.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("measure", ["params", "macs"])
def test_the_best_that_can_be_reached_is_told(measure: Any) -> None:
    """... and it can be."""
    model, x = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 10)), torch.ones(1, 10)
    with pytest.raises(PreconditionError, match="cannot be removed") as caught:
        fxcompress.compile(model, PruneChannels(ratio=0.9, measure=measure), x)
    best = 1 - {"params": 31 / 178, "macs": 20 / 160}[measure]
    assert f"{0.9:.0%} of the {'parameters' if measure == 'params' else 'MACs'}" in str(caught.value) or best > 0.9
    assert f"{best:.1%} are gone" in str(caught.value)
    gm = fxcompress.compile(model, PruneChannels(ratio=math.floor(best * 1000) / 1000, measure=measure), x)
    assert gm.get_submodule("0").out_features == 1


# --- options ---


def widths(gm: nn.Module) -> dict[str, int]:
    return {name: m.out_channels for name, m in gm.named_modules() if isinstance(m, nn.Conv2d)}


@functools.cache
def resnet() -> tuple[Network, fx.GraphModule]:
    network = NETS["resnet"]()
    return network, fxcompress.trace(network.module, network.args)


def pruned_resnet(**options: Any) -> dict[str, int]:
    network, traced = resnet()
    gm, _ = apply(PruneChannels(**options), traced, *network.args)
    contract.check_outputs(network, gm)
    return widths(gm)


WIDTHS = {
    "conv1": 8, "layer1.0.conv1": 8, "layer1.0.conv2": 8, "layer1.1.conv1": 8, "layer1.1.conv2": 8,
    "layer2.0.conv1": 16, "layer2.0.conv2": 16, "layer2.0.downsample.0": 16, "layer2.1.conv1": 16, "layer2.1.conv2": 16,
}  # fmt: skip
STREAM1 = ("conv1", "layer1.0.conv2", "layer1.1.conv2")
STREAM2 = ("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2")


def test_nothing_is_removed_at_ratio_zero() -> None:
    network = NETS["resnet"]()
    plain = fxcompress.compile(network.module, [], network.args)
    gm = fxcompress.compile(network.module, PruneChannels(ratio=0), network.args)
    assert gm.code == plain.code
    contract.assert_untouched({"state_dict": plain.state_dict()}, {"state_dict": gm.state_dict()})
    assert fxcompress.report(gm).to_dict()["passes"][0]["sites"] == 0
    for measure in ("params", "macs"):
        assert pruned_resnet(ratio=0, measure=measure) == WIDTHS


def test_half_of_every_group() -> None:
    assert pruned_resnet() == {name: width // 2 for name, width in WIDTHS.items()}


def test_exclude() -> None:
    found = pruned_resnet(exclude=("layer1.0.conv1", "layer2.*.conv2"))
    kept = {"layer1.0.conv1", *STREAM2}  # what one layer of a group keeps, all of them keep
    assert found == {name: width if name in kept else width // 2 for name, width in WIDTHS.items()}


def test_only() -> None:
    found = pruned_resnet(only=("layer2.1.conv1", "conv1"))
    lost = {"layer2.1.conv1", *STREAM1}
    assert found == {name: width // 2 if name in lost else width for name, width in WIDTHS.items()}


def test_only_and_exclude() -> None:
    found = pruned_resnet(only=("layer2.*",), exclude=("layer2.0.*",))
    assert found == WIDTHS | {"layer2.1.conv1": 8}


def test_per_layer() -> None:
    found = pruned_resnet(per_layer={"layer1.0.conv1": 0.25, "layer2.*.conv1": 0.0, "conv1": 0.75})
    fixed = {"layer1.0.conv1": 6, "layer2.0.conv1": 16, "layer2.1.conv1": 16, **dict.fromkeys(STREAM1, 2)}
    assert found == {name: width // 2 for name, width in WIDTHS.items()} | fixed


def test_per_layer_ratios_are_rounded_as_others_are() -> None:
    model, x = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 4)), torch.ones(1, 4)
    for options in ({"ratio": 0.29}, {"per_layer": {"0": 0.29}}):  # 0.29 * 100 is 28.999999999999996
        gm = fxcompress.compile(model, PruneChannels(**options), x)  # type: ignore[arg-type]
        assert gm.get_submodule("0").out_features == 71


def test_min_channels() -> None:
    found = pruned_resnet(ratio=0.9, min_channels=5)
    assert set(found.values()) == {5}


@pytest.mark.parametrize("round_to", [2, 3, 4, 8])
def test_round_to(round_to: int) -> None:
    for ratio in (0.3, 0.5, 0.8):
        for scope in ("local", "global"):
            found = pruned_resnet(ratio=ratio, round_to=round_to, scope=scope)
            assert all(width % round_to == 0 or width == WIDTHS[name] for name, width in found.items())
            assert found != WIDTHS or ratio < 0.5  # 12 of 16 are nearer to 16 than to 8


def test_round_to_counts_channels_and_not_heads() -> None:
    """A head of the toy ViT has 4 channels: two of them make 8, and so does one group of 8."""
    network = NETS["vit-attention"]()
    gm = contract.compress(PruneChannels(ratio=0.5, round_to=4), network)
    for name, module in gm.named_modules():
        if isinstance(module, nn.Linear) and "head" not in name:
            assert module.out_features % 4 == 0, name


def test_scopes_rank_differently() -> None:
    """The second layer's weights are a hundred times larger; only 'global' sees that."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        model[4].weight.mul_(100)  # type: ignore[operator, union-attr]

    def left(**options: Any) -> list[int]:
        pass_ = PruneChannels(ratio=0.5, importance=Magnitude(normalize=False), **options)
        gm = fxcompress.compile(model, pass_, torch.ones(1, 4))
        return [gm.get_submodule(name).out_features for name in ("0", "2")]  # type: ignore[misc]

    assert left(scope="local") == [4, 4]
    assert left(scope="global") == [1, 8]
    assert left(scope="isomorphic") == [1, 8]  # both are a layer that makes and one that reads


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_equal_scores_do_not_go_all_at_once(scope: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    gm = fxcompress.compile(model, PruneChannels(ratio=0.5, scope=scope), torch.ones(1, 8))
    left = sum(gm.get_submodule(name).out_features for name in ("0", "2"))  # type: ignore[misc]
    assert left == 8


def test_groups_that_one_layer_makes_are_ranked_each_by_itself() -> None:
    """Both halves of a split come from one layer; local is local all the same."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.left, self.right = nn.Linear(4, 16), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.both(x).chunk(2, -1)
            return self.left(left) + self.right(right)

    model = Halves()
    with torch.no_grad():
        model.left.weight.mul_(100)
    gm = fxcompress.compile(model, PruneChannels(importance=Magnitude(normalize=False)), torch.ones(2, 4))
    assert (gm.get_submodule("left").in_features, gm.get_submodule("right").in_features) == (4, 4)


def test_attention_loses_heads_or_parts_of_them() -> None:
    network = NETS["vit-attention"]()

    def query(attention: Any) -> tuple[int, ...]:
        gm = contract.compress(PruneChannels(ratio=0.5, attention=attention), network)
        found = shapes(gm, network.args)
        (node, *_) = (n for n in gm.graph.nodes if "scaled_dot_product" in name_of_call(n))
        return found.spec(node.args[0]).shape

    batch, heads, tokens, width = query("heads")
    assert (heads, width) == (1, 4)
    assert query("head_dim") == (batch, 2, tokens, 2)


# --- refusals ---


@pytest.mark.parametrize("ratio", [1.0, -0.1, 2.0, math.nan, math.inf])
def test_bad_ratios(ratio: float) -> None:
    with pytest.raises(UsageError, match="a ratio is the fraction to remove, at least 0 and below 1"):
        PruneChannels(ratio=ratio)
    with pytest.raises(UsageError, match="a ratio is the fraction"):
        PruneChannels(per_layer={"conv1": ratio})


@pytest.mark.parametrize("option", ["round_to", "min_channels"])
def test_bad_counts(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} must be at least 1, got 0"):
        PruneChannels(**{option: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(("option", "value"), [("measure", "flops"), ("scope", "everything"), ("attention", "both")])
def test_bad_words(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{option} must be one of .*, got '{value}'"):
        fxcompress.compile(by_hand(), PruneChannels(**{option: value}), torch.ones(2, 1))  # type: ignore[arg-type]


def test_unknown_importance_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"there is no importance 'l3'; did you mean 'l[12]'"):
        PruneChannels(importance="l3")


@pytest.mark.parametrize("option", ["exclude", "only", "per_layer"])
def test_patterns_that_match_nothing_name_the_nearest(option: str) -> None:
    network = NETS["resnet"]()
    value: Any = {"layer1.0.conv3": 0.5} if option == "per_layer" else ("layer1.0.conv3",)
    with pytest.raises(UsageError, match=r"no module path matches 'layer1.0.conv3'; near it: layer1.0.conv"):
        fxcompress.compile(network.module, PruneChannels(**{option: value}), network.args)


@pytest.mark.parametrize("pattern", ["layer1", "relu"])
def test_patterns_that_match_no_layer_with_channels_do_not_pass_in_silence(pattern: str) -> None:
    """A container or an activation makes no channels itself: either all inside stay, or that is said."""
    try:
        found = pruned_resnet(exclude=(pattern,))
    except UsageError:
        return
    inside = {name: width for name, width in found.items() if name.startswith(pattern + ".")}
    assert inside
    assert inside.items() <= WIDTHS.items()


def test_without_inputs() -> None:
    with pytest.raises(PreconditionError, match=r"prune-channels.*example_inputs"):
        fxcompress.compile(by_hand(), PruneChannels())


def test_weights_that_are_not_finite() -> None:
    model = by_hand()
    with torch.no_grad():
        model[0].weight[1] = math.nan  # type: ignore[index, operator]
    with pytest.raises(PreconditionError, match="not finite"):
        fxcompress.compile(model, PruneChannels(), torch.ones(2, 1))
    with pytest.raises(FxCompressError, match="finite"):
        fxcompress.compile(model, PruneChannels(), torch.ones(2, 1), verify=False)


def test_what_may_not_go_is_said() -> None:
    network = NETS["lstm"]()
    gm = contract.compress("prune-channels", network)
    (record,) = fxcompress.report(gm).to_dict()["passes"]
    reasons = [refusal["reason"] for refusal in record["refusals"]]
    assert any("LSTM" in reason for reason in reasons)
    assert any("the model's output" in reason for reason in reasons)


def test_a_floor_is_said() -> None:
    gm = fxcompress.compile(by_hand(), PruneChannels(ratio=0.9, min_channels=3), torch.ones(2, 1))
    (record,) = fxcompress.report(gm).to_dict()["passes"]
    assert "no more of the channels of '0' go: min_channels=3" in [r["reason"] for r in record["refusals"]]
    assert gm.get_submodule("0").out_features == 3


def test_options_in_text() -> None:
    model = by_hand()
    text = "prune-channels:ratio=0.25,scope=global,importance=l1,exclude=('2',)"
    gm = fxcompress.compile(copy.deepcopy(model), text, torch.ones(2, 1))
    assert gm.get_submodule("0").out_features == 3


def test_what_a_search_may_set() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    x = torch.randn(4, 8)
    context = fxcompress.PassContext(fxcompress.trace(model, x), fxcompress.Example((x,)))
    pass_ = PruneChannels(ratio=0.7, measure="params", exclude=("4",))
    assert [knob.layer for knob in pass_.knobs(context)] == ["0", "2"]
    found = fxcompress.compile(model, [pass_.turned({"2": 0.25})], x)
    assert [tuple(p.shape) for p in found.parameters() if p.dim() == 2] == [(16, 8), (9, 16), (4, 9)]
