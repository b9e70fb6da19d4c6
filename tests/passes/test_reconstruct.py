"""``PruneChannels(reconstruct=True)``: exact where it can be, never worse than no refit, against ``lstsq``."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.apply import Applied
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.passes.pruning import PruneChannels
from tests.contract import assert_untouched, snapshot
from tests.passes.driver import apply, error, randomise

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(*shape: int, batches: int = 3) -> list[Tensor]:
    return [draw(*shape, seed=i) for i in range(batches)]


def fits(applied: Applied) -> dict[str, dict[str, Any]]:
    """What was said of each layer that was to be refitted."""
    return {s.target: s.detail for s in applied.sites if "error_after" in s.detail or "not_refitted" in s.detail}


def pruned(model: nn.Module, batches: list[Tensor], **options: Any) -> tuple[nn.Module, nn.Module, Applied]:
    """The pruned graph without and with the refit, and what was done."""
    plain, _ = apply(PruneChannels(**options), model, batches[0], calibration=batches)
    refitted, applied = apply(PruneChannels(reconstruct=True, **options), model, batches[0], calibration=batches)
    return plain, refitted, applied


# --------------------------------------------------------------------------------------------- exact where it can be
def mixing(kind: int | str, bias: bool = True) -> tuple[nn.Module, list[Tensor]]:
    """A layer with small filters that are sums of the large ones, and a layer that reads it."""
    torch.manual_seed(0)
    first: Any
    if kind == "linear":
        first, second, batches = nn.Linear(6, 9, bias=bias), nn.Linear(9, 5, bias=bias), data(40, 6)
    elif kind == "tokens":
        first, second, batches = nn.Linear(6, 9, bias=bias), nn.Linear(9, 5, bias=bias), data(6, 20, 6)
    else:
        rank = int(kind)
        first = CONV[rank](3, 9, 3, padding=1, bias=bias)
        second = CONV[rank](9, 5, 2, stride=2, dilation=2, bias=bias)
        batches = data(12, 3, *(7, 6, 8)[:rank])
    model = nn.Sequential(first, second).double().eval()
    with torch.no_grad():
        mix = 0.05 * draw(3, 6, seed=1)
        first.weight[6:] = torch.tensordot(mix, first.weight[:6], dims=1)
        if bias:
            first.bias[6:] = draw(3, seed=2)
    return model, batches


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "tokens", 1, 2, 3])
def test_channels_that_the_others_make_up_for_are_not_missed(kind: int | str, bias: bool) -> None:
    model, batches = mixing(kind, bias)
    plain, refitted, applied = pruned(model, batches, ratio=1 / 3)
    assert refitted.get_parameter("0.weight").shape[0] == 6
    x = draw(*batches[0].shape, seed=9)
    assert error(model, plain, x) > 1e-2
    assert error(model, refitted, x) < 1e-6
    assert fits(applied)["1"]["error_after"] < 1e-6 < fits(applied)["1"]["error_before"]


def test_exact_through_a_residual_network() -> None:
    """The stream's channels 6 to 8 repeat others; three layers read it, and each has to make up for them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.outer = nn.Conv2d(2, 9, 3), nn.Conv2d(9, 7, 1), nn.Conv2d(7, 9, 1)
            self.head = nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.outer(self.inner(x).relu())
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    net = Net().double().eval()
    with torch.no_grad():
        for layer in (net.stem, net.outer):
            layer.weight[6:] = 0.1 * layer.weight[:3]
            layer.bias[6:] = 0.1 * layer.bias[:3]
    batches = data(30, 2, 9, 9)
    options: dict[str, Any] = {"ratio": 1 / 3, "exclude": ("inner",)}
    plain, refitted, applied = pruned(net, batches, **options)
    assert set(fits(applied)) == {"inner", "head"}
    x = draw(5, 2, 9, 9, seed=9)
    assert error(net, plain, x) > 1e-2
    assert error(net, refitted, x) < 1e-6


def test_a_channel_that_never_changes_goes_into_the_bias() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 0, 0.2  # type: ignore[index, operator]
    batches = data(40, 4)
    _, refitted, _ = pruned(model, batches, ratio=1 / 6)
    assert error(model, refitted, draw(7, 4, seed=9)) < 1e-6


def test_linear_after_flatten() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 9, 4)).double().eval()
    with torch.no_grad():
        model[0].weight[4:] = 0.1 * model[0].weight[:2]  # type: ignore[index, operator]
    batches = data(60, 2, 5, 5)
    plain, refitted, applied = pruned(model, batches, ratio=1 / 3)
    assert refitted.get_parameter("2.weight").shape == (4, 36)
    x = draw(5, 2, 5, 5, seed=9)
    assert error(model, plain, x) > 1e-2
    assert error(model, refitted, x) < 1e-5
    assert fits(applied)["2"]["rows"] == 180


# --------------------------------------------------------------------------------------------- never worse
class Blocks(nn.Module):
    """Convolutions of all sorts with batch norms, a residual sum, in-place activations, and a head after a flatten."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        conv, norm = CONV[rank], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        self.stem = nn.Sequential(conv(2, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(inplace=True))
        self.widen = nn.Sequential(conv(8, 12, 1, bias=False), norm(12), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(conv(12, 12, 3, padding="same", groups=12), norm(12), nn.ReLU6())
        self.narrow = conv(12, 8, 3, padding=1, padding_mode="circular", bias=False)
        self.some = conv(8, 8, 3, stride=2, groups=2)
        self.head = nn.Linear(8 * 2**rank, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.narrow(self.deep(self.widen(x)))
        x = self.some(x).relu_()
        return self.head(x.flatten(1))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("attempt", range(2))
def test_no_layer_fits_the_calibration_data_worse(rank: int, attempt: int) -> None:
    torch.manual_seed(attempt)
    net = randomise(Blocks(rank), attempt).double()
    batches = data(16, 2, *(6,) * rank)
    plain, refitted, applied = pruned(net, batches, ratio=0.4)
    found = fits(applied)
    assert set(found) == {"widen.0", "deep.0", "narrow", "some", "head"}
    for detail in found.values():
        assert "not_refitted" in detail or detail["error_after"] <= detail["error_before"]
    assert found["narrow"]["error_after"] < 0.9 * found["narrow"]["error_before"]
    assert plain.state_dict().keys() == refitted.state_dict().keys()
    assert all(plain.state_dict()[k].shape == v.shape for k, v in refitted.state_dict().items())
    x = torch.cat(batches)
    with torch.no_grad():
        assert (refitted(x) - net(x)).norm() < (plain(x) - net(x)).norm()


def test_each_layer_is_fitted_after_the_layers_before_it() -> None:
    """The errors that are claimed are those in the network that comes out, measured before anything in place."""
    torch.manual_seed(0)
    sizes = (4, 12, 10, 12, 3)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU(inplace=True))]
    model = nn.Sequential(*layers[:-1]).double().eval()
    batches = data(40, 4)
    plain, refitted, applied = pruned(model, batches, only=("0", "4"))
    found = fits(applied)
    assert set(found) == {"2", "6"}

    def off(gm: nn.Module, path: str) -> float:
        wanted, now = (_output_of(m, path, torch.cat(batches)) for m in (model, gm))
        return float((now - wanted).norm() / wanted.norm())

    for path in ("2", "6"):
        assert found[path]["error_after"] == pytest.approx(off(refitted, path))
        half = copy.deepcopy(refitted)
        half.get_submodule(path).load_state_dict(plain.get_submodule(path).state_dict())
        assert found[path]["error_before"] == pytest.approx(off(half, path))
    assert found["6"]["error_before"] != pytest.approx(off(plain, "6"), rel=1e-3)


def _output_of(model: nn.Module, path: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda _, args, output: seen.append(output.clone()))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[0]


# --------------------------------------------------------------------------------------------- rows
def test_at_most_64_places_of_a_sample_and_the_same_ones_every_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval()
    batches = data(5, 2, 20, 20)
    state = torch.get_rng_state()
    _, first, applied = pruned(model, batches, ratio=0.5)
    torch.rand(3)
    _, again, _ = pruned(model, batches, ratio=0.5)
    assert fits(applied)["2"]["rows"] == 3 * 5 * 64
    assert torch.equal(first.get_parameter("2.weight"), again.get_parameter("2.weight"))
    torch.set_rng_state(state)


# --------------------------------------------------------------------------------------------- what is left alone
class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(self.shared(self.first(x)).relu()).relu())


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 8), nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).relu(), self.weight)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(4, 8, 1), nn.ConvTranspose1d(8, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x[..., None]).relu()).sum(-1)


@pytest.mark.parametrize(
    ("make", "refitted", "reason"),
    [
        (Twice, {"last"}, "it is called several times, or shares its weights"),
        (Functional, set(), "it is called as a function"),
        (Transposed, set(), "of ConvTranspose1d there is no refit"),
    ],
)
def test_left_alone_with_the_reason(make: Callable[[], nn.Module], refitted: set[str], reason: str) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    batches = data(20, 4)
    gm, applied = apply(PruneChannels(reconstruct=True), model, batches[0], calibration=batches)
    left = [d["not_refitted"] for d in fits(applied).values() if "not_refitted" in d]
    assert reason in left[0]
    assert {name for name, d in fits(applied).items() if "error_after" in d} == refitted
    assert gm(batches[0]).shape == (20, 3)


def test_data_that_say_nothing_leave_a_layer_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    few, more = [draw(3, 4)], draw(40, 4)
    infinite, broken = [more, draw(5, 4) * torch.inf], [draw(4, 4) * torch.nan]  # 4 rows, as many as unknowns
    expected = ((few, "the calibration data have 3 rows"), (infinite, "are not finite"), (broken, "are not finite"))
    for batches, reason in expected:
        plain, refitted, applied = pruned(model, batches)
        assert reason in fits(applied)["2"]["not_refitted"]
        assert torch.equal(plain.get_parameter("2.weight"), refitted.get_parameter("2.weight"))


# --------------------------------------------------------------------------------------------- the contract
def test_missing_calibration_names_the_option_and_the_argument() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(PreconditionError, match=r"reconstruct=True.*`calibration`"):
        fxcompress.compile(model, "prune-channels:reconstruct=True", torch.randn(2, 4))


def test_a_batch_that_does_not_fit_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(UsageError, match="batch 1 of the calibration data"):
        apply(PruneChannels(reconstruct=True), model, torch.randn(2, 4), calibration=[torch.randn(2, 4), ()])


def test_through_compile_with_a_generator_and_the_callers_model_unchanged() -> None:
    torch.manual_seed(0)
    model = randomise(Blocks(2)).train()
    batches = [b.float() for b in data(12, 2, 6, 6)]
    inputs, before = copy.deepcopy(batches), snapshot(model)
    state = torch.get_rng_state()
    passes = ["prune-channels:ratio=0.3,reconstruct=True", "adapt-batch-norm"]
    found = fxcompress.compile(model, passes, batches[0], calibration=(b for b in batches))
    assert torch.equal(state, torch.get_rng_state())
    assert_untouched(before, snapshot(model))
    assert all(torch.equal(a, b) for a, b in zip(batches, inputs, strict=True))
    assert any("error_after" in d for d in fxcompress.report(found).passes[0].details)
    assert all(m.training for m in found.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d))
    assert found.get_parameter("narrow.weight").dtype == torch.float32
    assert all(p.requires_grad for p in found.parameters())


def test_nothing_pruned_nothing_refitted() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [b.float() for b in data(12, 4)]
    _, applied = apply(PruneChannels(ratio=0.0, reconstruct=True), model, batches[0], calibration=batches)
    assert not applied.sites
