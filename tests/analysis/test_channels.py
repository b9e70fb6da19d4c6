"""Channel groups of small networks, told by hand; and each of them is cut by its groups to see that they are right."""

from __future__ import annotations

import copy
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
    for seed in range(2):
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


# --- calls in all their forms ---


def modulated(m: Any, y: Tensor) -> Tensor:
    """StyleGAN's: the batch is in the channels of a convolution with as many groups as examples."""
    batch, channels, height, width = y.shape
    weight = m.weight * m.style(y.mean((2, 3)))[:, None, :, None, None]
    flat = y.reshape(1, batch * channels, height, width)
    return F.conv2d(flat, weight.view(batch * 8, channels, 3, 3), padding=1, groups=batch).view(y.shape)


def non_local(m: Any, y: Tensor) -> Tensor:
    query, key, value = (layer(y).flatten(2) for layer in (m.q, m.k, m.v))
    mixed = ((query.mT @ key).softmax(-1) @ value.mT).mT
    return y + m.o(mixed.view(y.shape[0], 4, *y.shape[2:]))


def over_maps(m: Any, y: Tensor) -> Tensor:
    """Attention over places, heads made of channels."""
    query, key, value = (layer(y).flatten(2).unflatten(1, (2, 4)) for layer in (m.q, m.k, m.v))
    return ((query.mT @ key).softmax(-1) @ value.mT).mT.flatten(1, 2).unflatten(2, (8, 8))


# How many of the 8 channels of layer ``a`` can go one by one, and what is done to them before layer ``out`` reads them.
CALLS: dict[str, tuple[int, Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "view, by keyword": (8, lambda m, y: y.flatten(1).view(size=(y.shape[0], 8, 8, 8)), {}),
    "torch.reshape, by keyword": (8, lambda m, y: torch.reshape(y.flatten(1), shape=(y.shape[0], 8, 8, 8)), {}),
    "reshape, a list": (4, lambda m, y: y.reshape([y.shape[0], 2, 4, 8, 8]).reshape((y.shape[0], 8, 8, 8)), {}),
    "reshape, inferred": (8, lambda m, y: y.reshape(y.shape[0], -1).reshape(-1, 8, 8, 8), {}),
    "reshape, all flat": (8, lambda m, y: y.reshape(-1).view(-1, 8, 8, 8), {}),
    "view_as": (8, lambda m, y: y.flatten(1).view_as(y), {}),
    "unflatten, by keyword": (4, lambda m, y: y.unflatten(dim=1, sizes=(2, 4)).flatten(start_dim=1, end_dim=2), {}),
    "unflatten, inferred": (4, lambda m, y: torch.unflatten(y, -3, (2, -1)).flatten(1, 2), {}),
    "nn.Unflatten": (4, lambda m, y: m.b(y).flatten(1, 2), {"b": nn.Unflatten(-3, (4, 2))}),
    "chunks, swapped": (8, lambda m, y: torch.cat(y.chunk(chunks=2, dim=1)[::-1], dim=1), {}),
    "split, by keyword": (8, lambda m, y: torch.cat(y.split(split_size=3, dim=1), dim=1), {}),
    "split, negative": (8, lambda m, y: torch.cat(y.split([2, 6], -3), -3), {}),
    "tensor_split, places": (8, lambda m, y: torch.cat(y.tensor_split([2, 5], dim=1), 1), {}),
    "narrow, by keyword": (8, lambda m, y: torch.narrow(y, dim=1, start=2, length=4), {}),
    "narrow, from behind": (8, lambda m, y: y.narrow(1, -3, 3), {}),
    "slice, open": (8, lambda m, y: y[:, 2:100], {}),
    "slice, from behind": (8, lambda m, y: y[..., 1:-2, :, :], {}),
    "slice of a slice": (8, lambda m, y: y[:, 1:][:, :5][:, 2:], {}),
    "slice with a new dimension": (8, lambda m, y: y[:, None, 1:].squeeze(1), {}),
    "select, from behind": (7, lambda m, y: y.select(1, -2).unsqueeze(1), {}),
    "select, by keyword": (7, lambda m, y: torch.select(y, dim=1, index=2)[:, None], {}),
    "index": (7, lambda m, y: y[:, -2].unsqueeze(1), {}),
    "expand": (8, lambda m, y: y * m.p.expand(-1, 8, 8), {"p": parameter(8, 1, 1)}),
    "expand to a size": (8, lambda m, y: y * m.p.expand(y.size()), {"p": parameter(8, 1, 1)}),
    "expand_as": (8, lambda m, y: y * m.p.expand_as(y), {"p": parameter(1, 8, 1, 1)}),
    "broadcast_to": (8, lambda m, y: y * torch.broadcast_to(m.p, (8, 8, 8)), {"p": parameter(8, 1, 1)}),
    "repeat over the batch": (8, lambda m, y: y * m.p.repeat(y.shape[0], 1, 1, 1), {"p": parameter(1, 8, 1, 1)}),
    "parameters concatenated": (
        8,
        lambda m, y: y + torch.cat([m.p, m.r], 1),
        {"p": parameter(1, 3, 1, 1), "r": parameter(1, 5, 1, 1)},
    ),
    "parameter of several shapes": (
        4,
        lambda m, y: y * m.p.view(8, 1, 1) + m.p.view(2, 4).flatten()[:, None, None],
        {"p": parameter(8)},
    ),
    "zeros beside": (8, lambda m, y: torch.cat([y, y.new_zeros(y.shape[0], 4, 8, 8)], 1), {}),
    "layer_norm, by keyword": (
        8,
        lambda m, y: F.layer_norm(y.permute(0, 2, 3, 1), normalized_shape=(8,), weight=m.p).permute(0, 3, 1, 2),
        {"p": parameter(8)},
    ),
    "layer_norm over all": (8, lambda m, y: F.layer_norm(y, [8, 8, 8], m.p), {"p": parameter(8, 8, 8)}),
    "group_norm, by keyword": (4, lambda m, y: F.group_norm(y, num_groups=4, weight=m.p), {"p": parameter(8)}),
    "batch_norm": (
        8,
        lambda m, y: F.batch_norm(y, m.mean, m.var, m.p),
        {"mean": torch.rand(8), "var": torch.rand(8) + 0.5, "p": parameter(8)},
    ),
    "conv2d, groups by keyword": (4, lambda m, y: F.conv2d(y, m.p, groups=4), {"p": parameter(8, 2, 1, 1)}),
    "conv2d, groups by position": (4, lambda m, y: F.conv2d(y, m.p, None, 1, 1, 1, 2), {"p": parameter(8, 4, 3, 3)}),
    "conv2d, depthwise": (8, lambda m, y: F.conv2d(y, m.p, groups=y.shape[1]), {"p": parameter(8, 1, 1, 1)}),
    "conv2d, a group an example": (8, modulated, {"weight": parameter(8, 8, 3, 3), "style": nn.Linear(8, 8)}),
    "conv_transpose2d, two groups": (
        4,
        lambda m, y: F.conv_transpose2d(y, m.p, groups=2, stride=2),
        {"p": parameter(8, 4, 2, 2)},
    ),
    "conv_transpose2d, depthwise": (
        8,
        lambda m, y: F.conv_transpose2d(y, m.p, groups=8, stride=2),
        {"p": parameter(8, 1, 2, 2)},
    ),
    "groups behind a shuffle": (
        4,
        lambda m, y: m.c(F.channel_shuffle(m.b(y), 2)),
        {"b": conv(8, 8, groups=2), "c": conv(8, 8, groups=2)},
    ),
    "groups in groups": (2, lambda m, y: m.c(m.b(y)), {"b": conv(8, 8, groups=4), "c": conv(8, 8, groups=2)}),
    "groups of two layers": (4, lambda m, y: m.c(torch.cat([y, y], 1)), {"c": conv(16, 8, groups=4)}),
    "einsum, implicit": (
        8,
        lambda m, y: torch.einsum("bchw,dc", y, m.p).permute(0, 3, 1, 2),
        {"p": parameter(8, 8)},
    ),
    "einsum, dots": (8, lambda m, y: torch.einsum("b c ..., d c -> b d ...", y, m.p), {"p": parameter(8, 8)}),
    "product with a vector": (8, lambda m, y: (y.permute(0, 2, 3, 1) @ m.p)[:, None], {"p": parameter(8)}),
    "baddbmm": (
        8,
        lambda m, y: torch.baddbmm(
            m.r.expand(y.shape[0], -1, -1), y.flatten(2).mT, m.p.expand(y.shape[0], -1, -1)
        ).mT.unflatten(2, (8, 8)),
        {"p": parameter(8, 6), "r": parameter(1, 1, 6)},
    ),
    "channels as depth": (0, lambda m, y: m.b(y[:, None]).sum(1), {"b": nn.Conv3d(1, 4, (1, 3, 3))}),
    "attention over channels": (
        8,
        lambda m, y: y + ((f := y.flatten(2)) @ f.mT / 8).softmax(-1).mul(1).matmul(f).view_as(y),
        {},
    ),
    "attention over places": (8, over_maps, {"q": conv(8, 8, 1), "k": conv(8, 8, 1), "v": conv(8, 8, 1)}),
    "non-local block": (8, non_local, {"q": conv(8, 4), "k": conv(8, 4), "v": conv(8, 4), "o": conv(4, 8)}),
    "linear over all, and back": (
        8,
        lambda m, y: y + m.b(y.flatten(1)).view(y.shape[0], 8, 8, 8),
        {"b": nn.Linear(512, 512)},
    ),
}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, attention: str) -> None:
    channels, forward, parts = CALLS[name]
    parts = copy.deepcopy(parts)
    width = forward(Net(forward, **parts), torch.rand(2, 8, 8, 8)).shape[1]
    gm = graph_of(Net(lambda m, x: m.out(forward(m, m.a(x))), a=conv(3, 8), out=conv(width, 2), **parts), image())
    inputs = (doubled(image()), {})
    groups = channel_groups(gm, *inputs, attention=attention)
    assert sum(group.channels for group in groups.groups if "a" in group.producers) == channels
    others = [((torch.cat([inputs[0][0]] * 2)[:3],), {})]
    for seed in range(2):
        for only_exact in (True, False):
            check_removal(gm, inputs, others, attention=attention, seed=seed, only_exact=only_exact)


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
    case = CASES["frozen, tied embedding"]
    found = {binding.label: binding for binding in groups_of(case.make(), *case.inputs).bindings}
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
    assert str(groups).splitlines()[0].split() == "group channels made by goes with exact".split()


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
