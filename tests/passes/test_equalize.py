"""Channels that are scaled between layers: which can be, by how much, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import UsageError
from fxcompress.passes.quantization import EqualizeLayers, Quantize
from tests import contract
from tests.networks import Network
from tests.passes.driver import refused
from tests.strategies import networks
from tests.zoo import NETS


class Applied(nn.Module):
    """Layers by name, and how they are applied."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: Any) -> None:
        super().__init__()
        self.how = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Channels of all layers made large and small: what equalisation is for."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            shape = (len(p), *[1] * (p.dim() - 1))
            p.copy_(
                torch.randn(p.shape, generator=generator) * torch.exp(1.5 * torch.randn(shape, generator=generator))
            )
    return model.eval()


IMAGE = (2, 4, 6, 6)
TOKENS = (2, 5, 4)
PROBABILITIES = torch.softmax(torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(3)), -1)


def _attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (t.view(*x.shape[:2], 2, 2).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def _by_hand(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.softmax(x @ x.transpose(1, 2), -1) @ m.a(x))


def _gate(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.b(y * torch.sigmoid(m.up(m.down(y.mean((2, 3), keepdim=True)).relu())))


def _shuffle(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    n, c, h, w = y.shape
    first, second = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).chunk(2, 1)
    return m.b(torch.cat([first, m.c(second)], 1))


def _in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y.relu_()
    z += m.c(z)
    return m.b(y)  # is z


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[str, str]]]] = {
    "pair": (lambda: nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 3)), IMAGE, [("0", "2")]),
    "depthwise": (
        lambda: nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 6, groups=6), nn.ReLU(), conv(6, 3)),
        IMAGE,
        [("0", "2"), ("2", "4")],
    ),
    "grouped": (
        lambda: nn.Sequential(conv(4, 6, groups=2), conv(6, 9, groups=3), conv(9, 2)),
        IMAGE,
        [("0", "1"), ("1", "2")],
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.LeakyReLU(), nn.ConvTranspose2d(6, 2, 2, groups=2)
        ),
        IMAGE,
        [("0", "2")],
    ),
    "prelu, pooling, padding": (
        lambda: nn.Sequential(
            conv(4, 6), nn.PReLU(6), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.Upsample(scale_factor=2), conv(6, 2)
        ),
        IMAGE,
        [("0", "5")],
    ),
    "flatten": (
        lambda: nn.Sequential(conv(4, 6), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(24, 3)),
        IMAGE,
        [("0", "3")],
    ),
    "residual": (
        lambda: Applied(
            lambda m, x: m.d((m.a(x) + m.c(m.b(m.a(x)).relu())).relu().mean((2, 3))),
            a=conv(4, 6),
            b=conv(6, 5),
            c=conv(5, 6),
            d=nn.Linear(6, 2),
        ),
        IMAGE,
        [("a c", "b d"), ("b", "c")],
    ),
    "a layer that reads what it writes": (
        lambda: Applied(lambda m, x: m.b((y := m.a(x)) + m.c(y.relu())), a=conv(4, 6), b=conv(6, 2), c=conv(6, 6)),
        IMAGE,
        [("a c", "b c")],
    ),
    "shared": (
        lambda: Applied(lambda m, x: m.b(m.c(m.c(m.a(x)).relu())), a=conv(4, 6), b=conv(6, 2), c=conv(6, 6)),
        IMAGE,
        [("a c", "b c")],
    ),
    "concatenation": (
        lambda: Applied(
            lambda m, x: m.c(torch.cat([m.a(x).relu(), m.b(x)], 1)), a=conv(4, 2), b=conv(4, 3), c=conv(5, 2)
        ),
        IMAGE,
        [("a b", "c")],
    ),
    "an input in a concatenation": (
        lambda: Applied(lambda m, x: m.b(torch.cat([m.a(x), x], 1)), a=conv(4, 2), b=conv(6, 2)),
        IMAGE,
        [("a", "b")],
    ),
    "shuffle": (lambda: Applied(_shuffle, a=conv(4, 6), b=conv(6, 2), c=conv(3, 3)), IMAGE, [("a c", "b c")]),
    "padded channels": (
        lambda: Applied(
            lambda m, x: m.c(F.pad(m.a(x), (0, 0, 0, 0, 1, 1)) + m.b(x)), a=conv(4, 3), b=conv(4, 5), c=conv(5, 2)
        ),
        IMAGE,
        [("a b", "c")],
    ),
    "gate": (
        lambda: Applied(_gate, a=conv(4, 6), b=conv(6, 2), down=conv(6, 3, 1), up=conv(3, 6, 1)),
        IMAGE,
        [("a", "b down"), ("down", "up")],
    ),
    "in place": (lambda: Applied(_in_place, a=conv(4, 6), b=conv(6, 2), c=conv(6, 6)), IMAGE, [("a c", "b c")]),
    "gated linear unit": (
        lambda: Applied(
            lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), a=nn.Linear(4, 6), b=nn.Linear(4, 6), c=nn.Linear(6, 4)
        ),
        TOKENS,
        [("b", "c")],
    ),
    "attention": (lambda: Applied(_attention, qkv=nn.Linear(4, 12), proj=nn.Linear(4, 4)), TOKENS, [("qkv", "proj")]),
    "attention by hand": (lambda: Applied(_by_hand, a=nn.Linear(4, 6), b=nn.Linear(6, 4)), TOKENS, [("a", "b")]),
    "tokens joined": (
        lambda: Applied(
            lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=nn.Linear(4, 6), b=nn.Linear(4, 6), c=nn.Linear(6, 2)
        ),
        TOKENS,
        [("a b", "c")],
    ),
}


def compiled(pass_: EqualizeLayers, model: nn.Module, x: Tensor) -> tuple[Any, dict[str, Any]]:
    gm = fxcompress.compile(model, [pass_], x)
    return gm, fxcompress.report(gm).to_dict()["passes"][-1]


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("powers", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_streams(case: str, powers: bool) -> None:
    """What hangs together is found, and scaled without a trace: to the bit if scales are powers of two."""
    build, shape, expected = CASES[case]
    model = spread(build())
    gm, record = compiled(EqualizeLayers(powers_of_two=powers), model, draw(shape))
    found = [(" ".join(sorted(d["writers"])), " ".join(sorted(d["readers"]))) for d in record["details"]]
    assert sorted(found) == sorted(expected)
    assert record["verified"]
    for batch in (1, 2, 5):
        x = draw((batch, *shape[1:]), seed=batch)
        with torch.no_grad():
            before, after = model(x.clone()), gm(x.clone())
        if powers:
            assert torch.equal(before, after)
        else:
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    again, record = compiled(EqualizeLayers(powers_of_two=powers), gm, draw(shape))
    assert record["sites"] == 0
    assert again.code == gm.code


@pytest.mark.parametrize("net", NETS)
def test_named_networks_by_any_number(net: str) -> None:
    contract.check_contract(EqualizeLayers(powers_of_two=False), NETS[net]())


# --- how much ---


def two_layers(first: list[list[float]], bias: list[float], second: list[list[float]]) -> nn.Sequential:
    a, b = nn.Linear(len(first[0]), len(first)), nn.Linear(len(second[0]), len(second))
    with torch.no_grad():
        for parameter, value in ((a.weight, first), (a.bias, bias), (b.weight, second)):
            parameter.copy_(torch.tensor(value))
    return nn.Sequential(a, nn.ReLU(), b).eval()


@pytest.mark.parametrize("powers", [True, False])
def test_by_hand(powers: bool) -> None:
    """Channel 0 has 8 and 1/2, so s = sqrt(8 / 0.5) = 4; channel 1 is balanced; channel 2 is never written, 3 never
    read; channel 4 has 1/4 and 4, so s = 1/4."""
    model = two_layers(
        [[8.0, -1.0], [0.5, 1.0], [0.0, 0.0], [3.0, 1.0], [0.25, 0.125]],
        [4.0, 1.0, 5.0, 6.0, 0.5],
        [[0.5, -1.0, 7.0, 0.0, 4.0], [-0.25, 0.75, 1.0, 0.0, -2.0]],
    )
    gm, record = compiled(EqualizeLayers(powers_of_two=powers), model, draw((3, 2)))
    first, second = gm.get_submodule("0"), gm.get_submodule("2")
    assert first.weight.tolist() == [[2.0, -0.25], [0.5, 1.0], [0.0, 0.0], [3.0, 1.0], [1.0, 0.5]]
    assert first.bias.tolist() == [1.0, 1.0, 5.0, 6.0, 2.0]
    assert second.weight.tolist() == [[2.0, -1.0, 7.0, 0.0, 1.0], [-1.0, 0.75, 1.0, 0.0, -0.5]]
    assert second.bias is not None
    (detail,) = record["details"]
    assert (detail["channels"], detail["scaled"], detail["least"], detail["greatest"]) == (5, 2, 0.25, 4.0)


@given(seed=st.integers(0, 10_000), powers=st.booleans())
@settings(max_examples=25, deadline=None)
def test_pairs_are_balanced(seed: int, powers: bool) -> None:
    """Equation 11: both ranges of a channel end at sqrt(r1 r2), to within what is left alone."""
    model = spread(nn.Sequential(conv(3, 7), nn.ReLU(), conv(7, 4)), seed)
    gm, _ = compiled(EqualizeLayers(powers_of_two=powers), model, draw((1, 3, 5, 5)))
    wanted = (ranges(model, "0", 0) * ranges(model, "2", 1)).sqrt()
    for path, dim in (("0", 0), ("2", 1)):
        assert (ranges(gm, path, dim) / wanted).log2().abs().max() <= (0.52 if powers else 0.015)


def ranges(model: nn.Module, path: str, dim: int) -> Tensor:
    weight: Any = model.get_submodule(path).weight.detach()
    return weight.abs().transpose(0, dim).flatten(1).amax(1)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_what_was_badly_scaled_is_as_good_as_what_was_not(seed: int) -> None:
    """The scale that a channel has before makes no difference, so neither does it to the rounding of weights."""
    model = spread(nn.Sequential(conv(3, 7), nn.ReLU(), conv(7, 4)), seed)
    worse = nn.Sequential(conv(3, 7), nn.ReLU(), conv(7, 4)).eval()
    worse.load_state_dict(model.state_dict())
    by = torch.exp2(torch.linspace(-4, 4, 7).round())
    with torch.no_grad():
        worse[0].weight /= by.view(-1, 1, 1, 1)
        worse[0].bias /= by
        worse[2].weight *= by.view(-1, 1, 1)
    x = draw((2, 3, 5, 5))
    found = [
        dict(compiled(EqualizeLayers(powers_of_two=False), which, x)[0].named_parameters()) for which in (model, worse)
    ]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0.025, atol=0)  # 1% on either side is left alone
    assert rounding_error(compiled(EqualizeLayers(), worse, x)[0], x) < rounding_error(worse, x)


def rounding_error(model: nn.Module, x: Tensor) -> float:
    """Relative, of the output, when weights are rounded to 8 bits with one scale a tensor."""
    pass_ = Quantize(activation_bits=None, granularity="tensor", correct_bias=False)
    gm = fxcompress.compile(model, [pass_], x)
    with torch.no_grad():
        expected = model(x)
        return float((gm(x) - expected).norm() / expected.norm())


@given(network=networks())
@settings(max_examples=25, deadline=None)
def test_the_largest_weight_never_grows(network: Network) -> None:
    """Why it ends; weights that it does not touch count too."""
    before = fxcompress.trace(network.module, network.args, example_kwargs=network.kwargs)
    after = contract.compress(EqualizeLayers(), network)
    largest = [
        max((float(p.detach().abs().max()) for p in gm.parameters() if p.dim() > 1), default=0)
        for gm in (before, after)
    ]
    assert largest[1] <= largest[0]


# --- what is refused ---


def _tied() -> nn.Module:
    model = nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4))
    model[2].weight = model[0].weight
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ReLU6": (lambda: nn.Sequential(conv(4, 6), nn.ReLU6(), conv(6, 3)), "ReLU6 '1', which does not carry"),
    "GELU": (lambda: nn.Sequential(conv(4, 6), nn.GELU(), conv(6, 3)), "GELU '1', which does not carry"),
    "output": (lambda: nn.Sequential(conv(4, 6)), "the model gives it out"),
    "constant": (lambda: Applied(lambda m, x: m.b(m.a(x) + 1), a=conv(4, 6), b=conv(6, 2)), "cannot be scaled"),
    "residual of the input": (
        lambda: Applied(lambda m, x: m.b(m.a(x) + x), a=conv(4, 4), b=conv(4, 2)),
        "added to something",
    ),
    "clamp": (lambda: Applied(lambda m, x: m.b(m.a(x).clamp(0, 1)), a=conv(4, 6), b=conv(6, 2)), "bound is not zero"),
    "product": (
        lambda: Applied(lambda m, x: m.b(m.a(x) * m.a(x)), a=conv(4, 6), b=conv(6, 2)),
        "multiplied by something",
    ),
    "division": (lambda: Applied(lambda m, x: m.b(1 / m.a(x)), a=conv(4, 6), b=conv(6, 2)), "divided by it"),
    "norm": (lambda: nn.Sequential(conv(4, 6), nn.GroupNorm(2, 6), conv(6, 3)), "GroupNorm '1'"),
    "padding with ones": (
        lambda: Applied(lambda m, x: m.b(F.pad(m.a(x), (1, 1), value=1.0)), a=conv(4, 6), b=conv(6, 2)),
        "something else than zeros",
    ),
    "written in place": (
        lambda: Applied(lambda m, x: m.b(m.a(x).clone().fill_(2.0)), a=conv(4, 6), b=conv(6, 2)),
        "fill_",
    ),
    "tied": (_tied, "tied"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    build, reason = REFUSED[case]
    model = spread(build())
    gm, record = compiled(EqualizeLayers(), model, draw(IMAGE))
    assert record["sites"] == 0
    assert any(reason in refusal["reason"] for refusal in record["refusals"]), record["refusals"]
    for (name, old), (_, new) in zip(model.named_parameters(), gm.named_parameters(), strict=True):
        assert torch.equal(old, new), name


def test_a_hook_is_refused() -> None:
    model = spread(nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 3)))
    model[0].register_forward_hook(lambda module, args, output: output + 2)
    assert "hooks" in refused(EqualizeLayers(), model, draw(IMAGE))


def test_some_channels_of_a_layer_may_stay() -> None:
    """One half goes through a function that is not homogeneous."""

    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = m.a(x).chunk(2, 1)
        return m.b(torch.cat([torch.sigmoid(first), second], 1))

    model = spread(Applied(forward, a=conv(4, 6), b=conv(6, 2)))
    gm, record = compiled(EqualizeLayers(), model, draw(IMAGE))
    assert [d["channels"] for d in record["details"]] == [3]
    assert torch.equal(gm.a.weight[:3], model.a.weight[:3])
    assert not torch.equal(gm.a.weight[3:], model.a.weight[3:])


def test_what_would_overflow_is_refused() -> None:
    model = two_layers([[2.0**-6, 2.0**-6], [1.0, 1.0]], [3e4, 0.0], [[4.0, 1.0]]).half()
    with torch.no_grad():
        model[2].weight[0, 0] = 0.25
        model[0].weight[0] = 2.0**-8
        model[2].weight[0, 0] = 4.0
    _, record = compiled(EqualizeLayers(), model, draw((3, 2)).half())
    assert record["sites"] == 0
    assert "overflow" in record["refusals"][0]["reason"]


def test_options() -> None:
    model = spread(nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 6), nn.ReLU(), conv(6, 3)))
    x = draw(IMAGE)
    assert compiled(EqualizeLayers(), model, x)[1]["sites"] == 2
    for pass_ in (EqualizeLayers(exclude=("0",)), EqualizeLayers(only=("2", "4"))):
        (detail,) = compiled(pass_, model, x)[1]["details"]
        assert (detail["writers"], detail["readers"]) == (["2"], ["4"])
    with pytest.raises(UsageError, match="at least 1"):
        EqualizeLayers(iterations=0)
    with pytest.raises(UsageError, match="no module path matches"):
        compiled(EqualizeLayers(exclude=("conv",)), model, x)
    with pytest.raises(UsageError, match="a tuple of patterns"):
        EqualizeLayers(only="0")  # type: ignore[arg-type]
