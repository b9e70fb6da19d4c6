"""Outliers of activations that move into weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.passes.quantization import Quantize, SmoothQuant
from tests import contract
from tests.passes.test_equalize import Applied, conv, draw
from tests.zoo import NETS

TOKENS = (2, 5, 8)
IMAGE = (2, 8, 4, 4)


def with_outliers(model: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters of some size, and two channels of each vector that multiplies fifty times as large."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() > 1 else 1.0))
            if p.dim() == 1 and name.endswith(("norm.weight", "scale")):
                p.abs_().add_(0.3)
                p[1:3] *= 50
    return model.eval()


class RMS(nn.Module):
    """As in Hugging Face's Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor, shifted: bool = False) -> Tensor:
        y = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return y + self.shift if shifted else y


def linears(**others: Any) -> dict[str, Any]:
    return {"a": nn.Linear(8, 6), "b": nn.Linear(8, 4), **others}


def _both(y: Tensor, m: Any) -> Tensor:
    return torch.cat([F.gelu(m.a(y)), m.b(y)], -1)


def _function(m: Any, x: Tensor) -> Tensor:
    return _both(F.layer_norm(x, (8,), m.norm.weight, m.norm.bias), m)


def _tokens_first(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x.permute(0, 2, 3, 1))
    return m.a(y).tanh().permute(0, 3, 1, 2)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "layer norm": (
        lambda: Applied(lambda m, x: _both(m.norm(x), m), **linears(norm=nn.LayerNorm(8))),
        TOKENS,
        ["norm"],
    ),
    "no bias": (
        lambda: Applied(lambda m, x: _both(m.norm(x), m), **linears(norm=nn.LayerNorm(8, bias=False))),
        TOKENS,
        ["norm"],
    ),
    "function": (lambda: Applied(_function, **linears(norm=nn.LayerNorm(8))), TOKENS, ["norm"]),
    "rms norm": (lambda: Applied(lambda m, x: _both(m.norm(x), m), **linears(norm=nn.RMSNorm(8))), TOKENS, ["norm"]),
    "by hand": (lambda: Applied(lambda m, x: _both(m.norm(x), m), **linears(norm=RMS())), TOKENS, ["norm.scale"]),
    "by hand, with a shift": (
        lambda: Applied(lambda m, x: _both(m.norm(x, True), m), **linears(norm=RMS())),
        TOKENS,
        ["norm.scale", "norm.shift"],
    ),
    "group norm": (
        lambda: Applied(lambda m, x: m.a(m.norm(x).relu()), norm=nn.GroupNorm(2, 8), a=conv(8, 4, 1)),
        IMAGE,
        ["norm"],
    ),
    "batch norm": (
        lambda: Applied(lambda m, x: m.a(m.norm(x).relu()), norm=nn.BatchNorm2d(8), a=conv(8, 4, 3)),
        IMAGE,
        ["norm"],
    ),
    "channels last": (lambda: Applied(_tokens_first, **linears(norm=nn.LayerNorm(8))), IMAGE, ["norm"]),
    "carried": (
        lambda: Applied(
            lambda m, x: m.a(m.norm(x).roll(1, 1).reshape(-1, 8).relu()), norm=nn.LayerNorm(8), a=nn.Linear(8, 4)
        ),
        TOKENS,
        ["norm"],
    ),
}


def compiled(pass_: SmoothQuant, model: nn.Module, shape: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    batches = [draw(shape, seed) for seed in range(3)]
    gm = fxcompress.compile(model, [pass_], batches[0], calibration=batches)
    return gm, fxcompress.report(gm).to_dict()["passes"][-1]


@pytest.mark.parametrize("powers", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_makes_channels(case: str, powers: bool) -> None:
    build, shape, writers = CASES[case]
    model = with_outliers(build())
    gm, record = compiled(SmoothQuant(powers_of_two=powers), model, shape)
    assert [d["writers"] for d in record["details"]] == [writers]
    assert record["verified"]
    for batch in (1, 4):
        x = draw((batch, *shape[1:]), seed=10 + batch)
        with torch.no_grad():
            before, after = model(x), gm(x)
        if powers:
            assert torch.equal(before, after)
        else:
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    batches = [draw(shape, seed) for seed in range(3)]
    again = fxcompress.compile(gm, [SmoothQuant(powers_of_two=powers)], batches[0], calibration=batches)
    assert fxcompress.report(again).to_dict()["passes"][-1]["sites"] == 0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_equation_4(alpha: float) -> None:
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)``, over all data and all readers."""
    model: Any = with_outliers(CASES["layer norm"][0]())
    gm, _ = compiled(SmoothQuant(alpha=alpha, powers_of_two=False), model, TOKENS)
    with torch.no_grad():
        x = torch.stack([model.norm(draw(TOKENS, seed)) for seed in range(3)]).flatten(0, -2).abs().amax(0)
        w = torch.cat([model.a.weight, model.b.weight]).abs().amax(0)
        s = x**alpha / w ** (1 - alpha)
        wanted = {"norm.weight": model.norm.weight / s, "norm.bias": model.norm.bias / s,
                  "a.weight": model.a.weight * s, "b.weight": model.b.weight * s}  # fmt: skip
    found = dict(gm.named_parameters())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=0.011, atol=0)  # what is balanced to 1% stays
    for name in ("a.bias", "b.bias"):
        assert torch.equal(found[name], dict(model.named_parameters())[name])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dynamic", [True, False])
def test_outliers_cost_less(seed: int, dynamic: bool) -> None:
    """The range of the largest channel over that of the smallest shrinks, and with it the error of 8 bits."""
    model: Any = with_outliers(CASES["layer norm"][0](), seed)
    batches = [draw((16, *TOKENS[1:]), s) for s in range(3)]
    smooth: Any = fxcompress.compile(model, [SmoothQuant()], batches[0], calibration=batches)
    spreads, errors = [], []
    with torch.no_grad():
        for gm in (model, smooth):
            largest = gm.norm(batches[0]).flatten(0, -2).abs().amax(0)
            spreads.append(float(largest.max() / largest.min()))
            pass_ = Quantize(dynamic=dynamic, observer="min-max")
            rounded = fxcompress.compile(gm, [pass_], batches[0], calibration=batches)
            x = draw((16, *TOKENS[1:]), 9)
            errors.append(float((rounded(x) - model(x))[..., 6:].norm()))
    assert spreads[1] < spreads[0] / 2
    assert errors[1] < errors[0]


@pytest.mark.parametrize("net", NETS)
def test_named_networks_by_any_number(net: str) -> None:
    contract.check_contract(SmoothQuant(alpha=0.8, powers_of_two=False), NETS[net]())


def _read_elsewhere(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return y + F.pad(m.a(y), (0, 2))


def _in_place(m: Any, x: Tensor) -> Tensor:
    """What is written to is read under its old name."""
    y = torch.sigmoid(x)
    z = y.mul_(m.norm.scale)
    return m.a(z) + m.a(y)


def _tied(m: Any, x: Tensor) -> Tensor:
    return m.a(m.norm(x)) + m.norm.weight.sum()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "read elsewhere": (
        lambda: Applied(_read_elsewhere, norm=nn.LayerNorm(8), a=nn.Linear(8, 6)),
        "what it gives cannot be scaled",
    ),
    "given out": (
        lambda: Applied(lambda m, x: ((y := m.norm(x)), m.a(y)), norm=nn.LayerNorm(8), a=nn.Linear(8, 4)),
        "gives it out",
    ),
    "an activation": (
        lambda: Applied(lambda m, x: m.a(F.gelu(m.norm(x))), norm=nn.LayerNorm(8), a=nn.Linear(8, 4)),
        "gelu",
    ),
    "read as a parameter": (lambda: Applied(_tied, norm=nn.LayerNorm(8), a=nn.Linear(8, 4)), "tied or read elsewhere"),
    "written in place": (lambda: Applied(_in_place, norm=RMS(), a=nn.Linear(8, 4)), "gives it out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    build, reason = REFUSED[case]
    _, record = compiled(SmoothQuant(), with_outliers(build()), TOKENS)
    assert record["sites"] == 0
    assert any(reason in refusal["reason"] for refusal in record["refusals"]), record["refusals"]


def test_layers_too_or_norms_alone() -> None:
    network = NETS["vit-attention"]()
    given = {"example_kwargs": network.kwargs, "calibration": network.calibration()}
    writers = {}
    for layers in (True, False):
        gm = fxcompress.compile(network.module, [SmoothQuant(layers=layers)], network.args, **given)
        details = fxcompress.report(gm).to_dict()["passes"][-1]["details"]
        writers[layers] = {type(gm.get_submodule(w)) for d in details for w in d["writers"]}
    assert nn.Linear in writers[True]
    assert writers[False] == {nn.LayerNorm}


def test_usage() -> None:
    for alpha in (-0.1, 1.1):
        with pytest.raises(UsageError, match="from 0 to 1"):
            SmoothQuant(alpha=alpha)
    model = with_outliers(CASES["layer norm"][0]())
    x = draw(TOKENS)
    with pytest.raises(PreconditionError, match="calibration"):
        fxcompress.compile(model, [SmoothQuant()], x)
    with pytest.raises(PreconditionError, match="not finite"):
        fxcompress.compile(model, [SmoothQuant()], x, calibration=[x, x / 0])
    _, record = compiled(SmoothQuant(exclude=("norm",)), model, TOKENS)
    assert record["sites"] == 0
    with pytest.raises(UsageError, match="no module path matches"):
        compiled(SmoothQuant(only=("nrom",)), model, TOKENS)
