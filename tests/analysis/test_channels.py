"""Channel groups of small networks, told by hand; and each of them is cut by its groups to see that they are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.analysis.channels import ChannelGroups, channel_groups
from fxcompress.errors import UsageError
from tests.analysis.channel_cases import CASES, Net, conv, image, parameter
from tests.analysis.removal import check_removal
from tests.networks import fill

ATTENTION = ("heads", "head_dim")


def told(groups: ChannelGroups) -> tuple[str, ...]:
    """A line a group: how many channels, who makes them, what goes along; '~' before what is not exact."""
    lines = []
    for group in groups.groups:
        along = ", ".join(member.binding.label for member in group.members if not member.produces)
        sign = "" if group.exact else "~"
        lines.append(f"{sign}{group.channels} of {', '.join(group.producers)}: {along}")
    return tuple(lines)


def frozen(groups: ChannelGroups) -> tuple[str, ...]:
    """A line for all that is frozen but the outputs of the layers ``out``."""
    found = [f for f in groups.frozen if not (f.module.startswith("out") and f.reason == "the model's output")]
    return tuple(f"{f.channels} of {f.module}: {f.reason}" for f in found)


def graph_of(model: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    fill(model, seed=0)
    return fxcompress.trace(model.double().eval(), doubled(inputs))


def doubled(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def groups_of(model: nn.Module, *inputs: Tensor, attention: str = "heads") -> ChannelGroups:
    return channel_groups(graph_of(model, inputs), doubled(inputs), attention=attention)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CASES)
def test_groups(name: str, attention: str) -> None:
    case = CASES[name]
    groups = groups_of(case.make(), *case.inputs, attention=attention)
    expected = case.groups if attention == "heads" or case.head_dim is None else case.head_dim
    assert told(groups) == expected
    assert frozen(groups) == case.frozen


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CASES)
def test_removal(name: str, attention: str) -> None:
    """What the groups say can go can go, at other batch sizes too; and where they say so it is exact."""
    case = CASES[name]
    gm = graph_of(case.make(), case.inputs)
    inputs = (doubled(case.inputs), {})
    others = [(tuple(torch.cat([x, x.flip(0)[:1]]) for x in inputs[0]), {})] if case.batches else []
    for seed in range(3):
        for only_exact in (True, False):
            check_removal(gm, inputs, others, attention=attention, seed=seed, only_exact=only_exact)


# --- what is exact ---


def through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.view(y.shape[0], -1).add_(0.5)
    return y


def assigned(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :, 0] = 0.5
    return y


def normalised(norm: nn.Module) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    return lambda m, x: m.b(m.a(x)), {"b": norm}


# Each gives what is summed over the channels of ``a``, so that nothing but zeros there may be left out.
SUMMED: dict[str, tuple[bool, Callable[..., Tensor], dict[str, Any]]] = {
    "nothing": (True, lambda m, x: m.a(x), {}),
    "relu": (True, lambda m, x: m.a(x).relu(), {}),
    "sigmoid": (False, lambda m, x: m.a(x).sigmoid(), {}),
    "softplus": (False, lambda m, x: F.softplus(m.a(x)), {}),
    "clamp": (False, lambda m, x: m.a(x).clamp(0.1, 1), {}),
    "threshold": (False, lambda m, x: F.threshold(m.a(x), 0.1, 0.5), {}),
    "a number added": (False, lambda m, x: m.a(x) + 1, {}),
    "subtracted from a number": (False, lambda m, x: 1 - m.a(x), {}),
    "times a number": (True, lambda m, x: m.a(x) * 2, {}),
    "parameter of each channel added": (True, lambda m, x: m.a(x) + m.p, {"p": parameter(8, 1, 1)}),
    "parameter of each place added": (False, lambda m, x: m.a(x) + m.p, {"p": parameter(1, 8, 8)}),
    "one parameter added": (False, lambda m, x: m.a(x) + m.p, {"p": parameter(1)}),
    "one parameter repeated": (False, lambda m, x: m.a(x) + m.p.expand(8, 1, 1), {"p": parameter(1, 1, 1)}),
    "buffer of each channel added": (False, lambda m, x: m.a(x) + m.p, {"p": torch.rand(8, 1, 1)}),
    "one parameter times sigmoid": (False, lambda m, x: m.a(x).sigmoid() * m.p, {"p": parameter(1)}),
    "parameter of each channel times sigmoid": (True, lambda m, x: m.a(x).sigmoid() * m.p, {"p": parameter(8, 1, 1)}),
    "divided": (True, lambda m, x: m.a(x) / (m.b(x).sigmoid() + 1), {"b": conv(3, 8)}),
    "dividing": (False, lambda m, x: m.p / (m.a(x).sigmoid() + 1), {"p": parameter(1)}),
    "where": (False, lambda m, x: torch.where(m.a(x) > 0, m.a(x), 1.0), {}),
    "filled with a half": (False, lambda m, x: m.a(x).masked_fill(x[:, :1] > 0, 0.5), {}),
    "filled with zero": (True, lambda m, x: m.a(x).masked_fill(x[:, :1] > 0, 0), {}),
    "padded with zero": (True, lambda m, x: F.pad(m.a(x), (1, 1, 1, 1)), {}),
    "padded with a half": (False, lambda m, x: F.pad(m.a(x), (1, 1, 1, 1), value=0.5), {}),
    "reflected": (True, lambda m, x: F.pad(m.a(x), (1, 1, 1, 1), mode="reflect"), {}),
    "padded by a layer": (False, *normalised(nn.ConstantPad2d(1, 0.5))),
    "max pooled": (True, lambda m, x: F.max_pool2d(m.a(x), 2), {}),
    "softmax over places": (False, lambda m, x: m.a(x).flatten(2).softmax(-1), {}),
    "unit length at each place": (True, lambda m, x: F.normalize(m.a(x), dim=1), {}),
    "unit length over places": (True, lambda m, x: F.normalize(m.a(x).flatten(2), dim=2), {}),
    "batch norm": (True, *normalised(nn.BatchNorm2d(8))),
    "batch norm without parameters": (False, *normalised(nn.BatchNorm2d(8, affine=False))),
    "instance norm": (True, *normalised(nn.InstanceNorm2d(8, affine=True))),
    "layer norm over places": (False, *normalised(nn.LayerNorm((8, 8)))),
    "layer norm over channels": (False, *normalised(nn.LayerNorm((8, 8, 8)))),
    "linear over places": (False, *normalised(nn.Linear(8, 6))),
    "linear over places, no bias": (True, *normalised(nn.Linear(8, 6, bias=False))),
    "outer product": (False, lambda m, x: m.a(x).sigmoid()[:, :, None] * m.b(x)[:, None], {"b": conv(3, 4)}),
    "outer product by einsum": (
        False,
        lambda m, x: torch.einsum("bchw,bdhw->bcdhw", m.a(x).sigmoid(), m.b(x)),
        {"b": conv(3, 4)},
    ),
    "written through a view": (False, through_a_view, {}),
    "assigned": (False, assigned, {}),
}


@pytest.mark.parametrize("name", SUMMED)
def test_exact_is_said_of_zeros_only(name: str) -> None:
    exact, forward, parts = SUMMED[name]
    model = Net(lambda m, x: forward(m, x).sum(1), a=conv(3, 8), **parts)
    gm = graph_of(model, image())
    inputs = (doubled(image()), {})
    (group,) = (g for g in channel_groups(gm, *inputs).groups if "a" in g.producers)
    assert group.exact is exact
    for seed in range(3):
        check_removal(gm, inputs, [], attention="heads", seed=seed, only_exact=True)


REDUCED: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "sum": (True, lambda x: x.sum(1)),
    "mean": (False, lambda x: x.mean(1)),
    "maximum": (False, lambda x: x.amax(1)),
    "variance": (False, lambda x: x.var(1)),
    "product": (False, lambda x: x.prod(1)),
    "norm": (True, lambda x: x.norm(dim=1)),
    "norm of order 1": (True, lambda x: x.norm(p=1, dim=1)),
    "smallest": (False, lambda x: x.norm(p=float("-inf"), dim=1)),
    "log of sum of exponentials": (False, lambda x: x.logsumexp(1)),
}


@pytest.mark.parametrize("name", REDUCED)
def test_exact_reductions(name: str) -> None:
    exact, reduce = REDUCED[name]
    gm = graph_of(Net(lambda m, x: reduce(m.a(x)), a=conv(3, 8)), image())
    inputs = (doubled(image()), {})
    (group,) = channel_groups(gm, *inputs).groups
    assert group.exact is exact
    for only_exact in (True, False):
        check_removal(gm, inputs, [], attention="heads", seed=0, only_exact=only_exact)


def test_statistics_of_a_batch_are_exact_too() -> None:
    """In training mode each channel of batch norm is still by itself."""
    model = Net(lambda m, x: m.out(m.b(m.a(x)).relu()), a=conv(3, 8), b=nn.BatchNorm2d(8), out=conv(8, 4))
    gm = graph_of(model, image()).train()
    (group,) = channel_groups(gm, doubled(image())).groups
    assert group.channels == 8
    check_removal(gm, (doubled(image()), {}), [], attention="heads", seed=0, only_exact=group.exact)


# --- the rest ---


def test_members_and_units() -> None:
    """Channel i of the flattened layer is read by 64 columns, one after the other."""
    model = Net(lambda m, x: m.out(m.a(x).flatten(1)), a=conv(3, 8), out=nn.Linear(512, 4))
    groups = groups_of(model, *image())
    (group,) = groups.groups
    members = {member.binding.label: member for member in group.members}
    assert list(members) == ["a.weight[i]", "a.bias[i]", "out.weight[:, i]"]
    assert members["a.weight[i]"].produces
    assert not members["out.weight[:, i]"].produces
    assert members["a.weight[i]"].units.tolist() == list(range(8))
    assert members["out.weight[:, i]"].units.tolist() == [i // 64 for i in range(512)]
    assert group.name == "a"
    assert groups.channels == 8 + 4


def test_channels_are_numbered_as_the_first_layer_has_them() -> None:
    model = Net(lambda m, x: m.out(m.a(x).flip(1)), a=conv(3, 8), out=conv(8, 4))
    (group,) = groups_of(model, *image()).groups
    units = {member.binding.label: member.units.tolist() for member in group.members}
    assert units["a.weight[i]"] == list(range(8))
    assert units["out.weight[:, i]"] == list(range(8))[::-1]


def test_ties_and_names() -> None:
    found = {
        b.label: b
        for b in groups_of(CASES["frozen, tied embedding"].make(), *CASES["frozen, tied embedding"].inputs).bindings
    }
    assert found["embed.weight[:, i]"].names == ("embed.weight", "out.weight")
    assert found["embed.weight[:, i]"].dim == 1


def test_sizes_of_what_stays() -> None:
    model = Net(lambda m, x: m.out(m.a(x).flatten(1)), a=conv(3, 8), out=nn.Linear(512, 4))
    gm = graph_of(model, image())
    groups = channel_groups(gm, doubled(image()))
    kept = torch.ones(groups.classes, dtype=torch.bool).numpy()
    kept[groups.groups[0].classes[[1, 5, 6]]] = False
    sizes = {node.name: groups.sizes(found, kept) for node, found in groups.found.items() if node.op == "call_module"}
    sizes["flatten"] = groups.sizes(next(v for n, v in groups.found.items() if n.name == "flatten"), kept)
    assert sizes == {"a": (2, 5, 8, 8), "flatten": (2, 320), "out": (2, 4)}


def test_it_prints() -> None:
    text = str(groups_of(CASES["residual"].make(), *CASES["residual"].inputs))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == "group channels made by goes with exact".split()
    assert lines[2][:4] == ["a", "8", "a,", "c"]
    assert lines[2][-1] == "yes"
    assert lines[-1] == "out 4 the model's output".split()


def test_long_lists_are_cut_short() -> None:
    text = str(groups_of(CASES["chain"].make(), *CASES["chain"].inputs))
    assert "b.weight[i] and 2 more" in text


def test_a_graph_without_layers() -> None:
    groups = groups_of(Net(lambda m, x: x.relu()), *image())
    assert (groups.groups, groups.frozen, groups.channels) == ((), (), 0)
    assert (
        str(groups).split()
        == "group channels made by goes with exact ------- ---------- --------- ----------- -------".split()
    )


def test_the_graph_stays_as_it_is() -> None:
    model = Net(lambda m, x: m.out(m.b(m.a(x))), a=conv(3, 8), b=nn.BatchNorm2d(8), out=conv(8, 4)).train()
    gm = fxcompress.trace(model, image())
    state, code = {name: t.clone() for name, t in gm.state_dict().items()}, gm.code
    channel_groups(gm, image())
    assert gm.code == code
    assert all(torch.equal(t, state[name]) for name, t in gm.state_dict().items())
    assert gm.training


def test_one_tensor_and_keywords_are_inputs_too() -> None:
    gm = graph_of(CASES["chain"].make(), image())
    (x,) = doubled(image())
    expected = told(channel_groups(gm, (x,)))
    assert told(channel_groups(gm, x)) == expected
    assert told(channel_groups(gm, (), {"inputs_0": x})) == expected


def test_usage() -> None:
    gm = graph_of(CASES["chain"].make(), image())
    with pytest.raises(UsageError, match="attention must be one of heads, head_dim, got 'both'"):
        channel_groups(gm, doubled(image()), attention="both")
    with pytest.raises(UsageError, match="inputs_0"):
        channel_groups(gm, ())
