"""Training with rounded weights and activations, and the integers that come of it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import PreconditionError
from fxcompress.passes.quantization import FakeQuantize, Quantize
from fxcompress.passes.quantization.fake_modules import FakeQuantizer, WeightFakeQuantizer
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.kernels import unavailable
from fxcompress.passes.quantization.vocabulary import PerTensor, dequantize, quantize


class Net(nn.Module):
    """Convolutions of several kinds, one of them called twice, a residual sum and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding="same", groups=4)
        self.up, self.down = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), nn.Conv2d(8, 8, 4, 2, 1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.twice(self.twice(x)).relu() + x
        return self.head(self.down(self.up(x)).mean((2, 3)))


def data(count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def faked(model: nn.Module, batches: list[Tensor] | None = None, **options: Any) -> Any:
    batches = data() if batches is None else batches
    return fxcompress.compile(model.eval(), [FakeQuantize(**options)], batches[0], calibration=batches)


def trained(gm: Any, steps: int = 5, rate: float = 0.05) -> Any:
    """A few steps of plain gradient descent towards nothing in particular."""
    gm.train()
    optimiser = torch.optim.SGD(gm.parameters(), lr=rate)
    for i in range(steps):
        (x,) = data(1, seed=i)
        optimiser.zero_grad()
        gm(x).sub(1).square().mean().backward()
        optimiser.step()
    return gm.eval()


OPTIONS = st.fixed_dictionaries(
    {
        "weight_bits": st.sampled_from((2, 4, 8)), "activation_bits": st.sampled_from((8, 16, None)),
        "granularity": st.sampled_from(("channel", "tensor", 4)), "symmetric": st.booleans(), "learned": st.booleans(),
    }
)  # fmt: skip


@given(options=OPTIONS, seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_integers_give_what_training_gave(options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    gm = trained(faked(Net(), **options))
    found = fxcompress.compile(gm, ["quantize"], data(1)[0])
    x = data(1, seed=99)[0][:3]
    with torch.no_grad():
        expected = gm(x)
        assert float((found(x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max() + 1)
    record = fxcompress.report(found).passes[-1]
    assert all(d["converted"] for d in record.details)
    for path, fake in ((p, m) for p, m in gm.named_modules() if isinstance(m, WeightFakeQuantizer)):
        weight = gm.get_parameter(path.replace("weight_fake_quant", "weight"))
        held = found.get_submodule(path.rpartition(".")[0])
        assert held.weight.dtype is torch.int8
        assert torch.equal(held.weight, fake.integers(weight)[0])
        assert int(held.weight.abs().max()) <= fake.grid.high
    assert not any(isinstance(m, (FakeQuantizer, WeightFakeQuantizer)) for m in found.modules())


def test_it_rounds_where_quantize_would() -> None:
    torch.manual_seed(0)
    model = Net()
    fake = fxcompress.report(faked(model)).passes[-1].details
    real = fxcompress.compile(model, [Quantize()], data()[0], calibration=data())
    keys = ("value", "bits", "scale", "zero_point", "module")
    pairs = zip(fake, fxcompress.report(real).passes[-1].details, strict=True)
    assert all({k: a.get(k) for k in keys} == {k: b.get(k) for k in keys} for a, b in pairs)


@given(
    seed=st.integers(0, 100), zero_point=st.integers(0, 255), symmetric=st.booleans(),
    scale=st.floats(0.125, 1024.0, width=32),
)  # fmt: skip
def test_arithmetic_is_that_of_the_operators(seed: int, zero_point: int, symmetric: bool, scale: float) -> None:
    grid = Grid.of_activations(8, symmetric)
    by = PerTensor(scale, 0 if symmetric else zero_point, grid)
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * scale * 200
    for learned in (False, True):
        assert torch.equal(FakeQuantizer(by, learned)(x), dequantize(quantize(x, by), by))


def test_gradients_by_hand() -> None:
    """Scale 0.5, integers -3 to 3: 0.6 is 1 (inside), 2.0 and -5.0 are clipped to 3 and -3."""
    fake = FakeQuantizer(PerTensor(0.5, 0, Grid(-3, 3, torch.int8)), learned=True)
    x = torch.tensor([[0.6, 2.0, -5.0]], requires_grad=True)
    y = fake(x)
    assert torch.equal(y, torch.tensor([[0.5, 1.5, -1.5]]))
    y.backward(torch.tensor([[1.0, 10.0, 100.0]]))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([[1.0, 0.0, 0.0]]))
    step = (1 - 0.6 / 0.5) + 10 * 3 + 100 * -3
    assert float(fake.scale.grad) == pytest.approx(step / (3 * 3) ** 0.5, rel=1e-5)


def test_scales_of_weights_follow_them_unless_they_are_learned() -> None:
    weight = torch.tensor([[0.9, -2.0], [0.0, 0.0]])
    fake = WeightFakeQuantizer(Grid.of_weights(4), torch.ones(2), 0, 0, learned=False)
    assert torch.allclose(fake(weight), weight, atol=0.15)
    assert torch.allclose(fake(10 * weight), 10 * fake(weight))
    learned = WeightFakeQuantizer(Grid.of_weights(4), torch.tensor([0.3, 0.3]), 0, 0, learned=True)
    assert torch.allclose(learned(10 * weight)[0], torch.tensor([2.1, -2.1]))


@pytest.mark.parametrize("learned", [False, True])
def test_it_trains_copies_and_loads(learned: bool) -> None:
    torch.manual_seed(0)
    model, x = Net(), data(1, seed=7)[0]
    fresh = faked(model, learned=learned)
    names = {name for name, _ in model.named_parameters()}
    assert names <= {name for name, _ in fresh.named_parameters()}
    gm = trained(copy.deepcopy(fresh))
    with torch.no_grad():
        expected = gm(x)
        assert not torch.equal(fresh(x), expected)
        for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
            assert torch.equal(other(x), expected)
        buffer = io.BytesIO()
        torch.save(gm.state_dict(), buffer)
        buffer.seek(0)
        fresh.load_state_dict(torch.load(buffer))
        assert torch.equal(fresh(x), expected)
        assert gm(x[:1]).shape == (1, 5)
    changed = dict(gm.named_parameters())
    if learned:
        assert any(name.endswith("scale") for name in changed)


def test_training_brings_back_what_rounding_to_few_bits_lost() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    train, test = slice(0, 1300), slice(1300, None)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip

    def fit(model: Any, epochs: int, rate: float) -> None:
        model.train()
        optimiser = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(epochs):
            for part in torch.randperm(1300).split(64):
                optimiser.zero_grad()
                F.cross_entropy(model(x[train][part]), y[train][part]).backward()
                optimiser.step()
        model.eval()

    def accuracy(model: Any) -> float:
        with torch.no_grad():
            return float((model(x[test]).argmax(1) == y[test]).double().mean())

    fit(net, 15, 3e-3)
    batches = list(x[:256].split(64))
    rounded = accuracy(fxcompress.compile(net, [Quantize(2)], x[:2], calibration=batches))
    recovered = {}
    for learned in (False, True):
        gm = fxcompress.compile(net, [FakeQuantize(2, learned=learned)], x[:2], calibration=batches)
        fit(gm, 15, 2e-3)
        recovered[learned] = accuracy(fxcompress.compile(gm, ["quantize"], x[:2]))
    assert accuracy(net) > 0.9
    assert min(recovered.values()) > rounded + 0.02
    assert min(recovered.values()) > accuracy(net) - 0.04


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_what_was_trained_runs_on_integer_kernels() -> None:
    torch.manual_seed(0)
    gm, x = trained(faked(Net())), data(1, seed=7)[0]
    found = fxcompress.compile(gm, ["quantize", "lower-int8"], data(1)[0])
    with torch.no_grad():
        assert float((found(x) - gm(x)).norm() / gm(x).norm()) < 0.03
    record = fxcompress.report(found).passes[-1]
    assert [d["op"] for d in record.details].count("layer") == 5
    assert "conv_transpose2d" in record.refusals[0].reason


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, bits: int, learned: bool) -> None:
    torch.manual_seed(0)
    batches = [x.to(dtype) for x in data()]
    model = Net().to(dtype)
    gm = faked(model, batches, activation_bits=bits, learned=learned)
    x = batches[0]
    gm(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gm.parameters())
    found = fxcompress.compile(gm, ["quantize"], x)
    assert torch.equal(found(x), gm(x))
    assert found(x).dtype is dtype
    expected = model(x).double()
    assert float((found(x).double() - expected).norm() / expected.norm()) < 0.05


def test_scales_stay_float32_where_the_model_is_cast() -> None:
    gm = faked(Net(), learned=True)
    before = {name: t.clone() for name, t in gm.state_dict().items() if name.endswith("scale")}
    assert gm.bfloat16()(data()[0].bfloat16()).dtype is torch.bfloat16
    assert all(torch.equal(gm.state_dict()[name], t) for name, t in before.items())
    meta = gm.to("meta")
    assert all(t.is_meta for t in meta.state_dict().values())
    assert all(t.device.type == "cpu" for t in meta.to_empty(device="cpu").state_dict().values())


def test_a_scale_that_training_took_across_zero_stays_one() -> None:
    fake = FakeQuantizer(PerTensor(0.5, 0, Grid.of_activations(8, False)), learned=True)
    fake.scale.data.neg_()
    assert fake(torch.tensor([0.6, 1.1])).tolist() == [0.5, 1.0]
    assert fake.by().scale == 0.5
    fake.scale.data.zero_()
    fake(torch.tensor([0.6, 0.0])).sum().backward()
    assert fake.scale.grad.isfinite()


class Overwrites(nn.Module):
    """What a layer reads is written to before anything goes backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.end = nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        y = self.end(self.conv(x) + z)
        z.relu_()
        return y + z[:, :2]


@pytest.mark.parametrize("learned", [False, True])
def test_what_is_rounded_may_be_written_to_afterwards(learned: bool) -> None:
    gm = trained(faked(Overwrites(), learned=learned))
    x = data()[0]
    assert torch.equal(fxcompress.compile(gm, ["quantize"], x)(x), gm(x))


class Branches(nn.Module):
    """Gradients reach ``b`` and what ``frozen`` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.frozen = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = self.a(x)
        return self.frozen(self.b(y)), self.c(x).argmax(1)


def test_scales_that_no_gradient_reaches_and_those_of_frozen_weights_are_not_learned() -> None:
    gm = faked(Branches(), learned=True)
    learned = {n for n, _ in gm.named_parameters() if n.endswith("scale")}
    assert {n for n in learned if "weight" in n} == {"b.weight_fake_quant.scale"}
    assert len(learned) == 3, "and what b reads and gives"
    gm(data()[0])[0].sum().backward()
    assert all(gm.get_parameter(name).grad is not None for name in learned)


@pytest.mark.parametrize("learned", [False, True])
def test_dynamo_takes_the_graph_whole(learned: bool) -> None:
    torch._dynamo.reset()
    gm = faked(Net(), learned=learned).train()
    twin, x = copy.deepcopy(gm), data()[0]
    fast = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for module in (gm, fast):
        module(x).square().sum().backward()
    assert torch.allclose(fast(x), gm(x), atol=1e-5)
    for one, other in zip(gm.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


# --- bad input ---


def test_what_is_refused() -> None:
    model, x = Net(), data(1)[0]
    gm = faked(model)
    with pytest.raises(PreconditionError, match="fake-quantised already"):
        faked(gm)
    with pytest.raises(PreconditionError, match="drop weight_bits, symmetric"):
        fxcompress.compile(gm, [Quantize(4, symmetric=True)], x)
    with pytest.raises(PreconditionError, match=r"model\.eval"):
        fxcompress.compile(copy.deepcopy(gm).train(), ["quantize"], x)
    with pytest.raises(PreconditionError, match=r"model\.eval"):
        fxcompress.compile(Net().train(), ["fake-quantize"], x, calibration=[x])
    with pytest.raises(PreconditionError, match="calibration"):
        fxcompress.compile(Net().eval(), ["fake-quantize"], x)
    with pytest.raises(PreconditionError, match="quantised already"):
        faked(fxcompress.compile(Net().eval(), ["quantize"], x, calibration=[x]))


def test_overrides_and_what_is_left_alone() -> None:
    gm = faked(Net(), overrides={"stem": {"weight_bits": 3}}, exclude=("head",))
    assert gm.get_submodule("stem").weight_fake_quant.grid.bits == 3
    assert type(gm.get_submodule("head")) is nn.Linear
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    record = fxcompress.report(faked(model)).passes[-1]
    assert "fold-batch-norm" in record.refusals[0].reason


def test_constant_activations_and_zero_rows() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    x = torch.ones(2, 4)
    for learned in (False, True):
        gm = faked(model, [x], learned=learned)
        assert torch.allclose(gm(x), model(x))
        found = fxcompress.compile(gm, ["quantize"], x)
        assert torch.allclose(found(x), model(x), atol=1e-6)
