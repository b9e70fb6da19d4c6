"""Quantising, and the integer kernels that stand in for it."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.matching import is_call
from fxcompress.passes.quantization import FakeQuantize, LowerInt8, Quantize
from fxcompress.passes.quantization.grid import Grid
from fxcompress.passes.quantization.kernels import (
    WRONG_KERNEL,
    Int8Conv,
    Int8Layer,
    Int8Linear,
    PostOp,
    to_uint8,
    unavailable,
)
from fxcompress.passes.quantization.kernels_linear import DynamicInt8Linear, WeightOnlyLinear, unfit
from fxcompress.passes.quantization.observers import OBSERVERS, RangeObserver
from fxcompress.passes.quantization.rounding import adaptive
from fxcompress.passes.quantization.vocabulary import PerTensor, dequantize, quantize

needs_kernels = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
GRIDS = [Grid.of_activations(bits, symmetric) for bits in (8, 16) for symmetric in (False, True)]


class Residual(nn.Module):
    """A sum of a convolution and what it read, read again later."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.first = nn.Conv2d(8, 8, 3, 1, 1)
        self.second = nn.Conv2d(8, 8, 3, 1, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = (self.first(x) + x).relu()
        y = y.view(y.shape[0], 8, 8, 8)
        if self.late:
            y = self.second(y) + self.second(x)
        return self.head(F.max_pool2d(y, 2).mean((2, 3)))


def data(count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def compiled(model: nn.Module, passes: list[Any], batches: list[Tensor] | None = None) -> Any:
    batches = data() if batches is None else batches
    return fxcompress.compile(model.eval(), passes, batches[0], calibration=batches)


# --- scales and ranges ---


@given(least=st.floats(-1e4, 0), greatest=st.floats(0, 1e4), grid=st.sampled_from(GRIDS), part=st.floats(0, 1))
def test_rounding_errs_by_at_most_half_a_step(least: float, greatest: float, grid: Grid, part: float) -> None:
    scale, zero_point = grid.scales(*(torch.tensor(v, dtype=torch.float64) for v in (least, greatest)))
    x = torch.tensor(least + part * (greatest - least), dtype=torch.float64)
    integer = grid.round(x, scale, zero_point)
    near = grid.nearest(x, scale, zero_point)
    assert grid.low <= integer <= grid.high
    assert abs(near - x) <= scale * (1 if grid.is_signed else 1.5) / 2 * (1 + 1e-4)  # the zero point is rounded too
    assert grid.nearest(near, scale, zero_point) == near
    assert grid.nearest(torch.zeros_like(x), scale, zero_point) == 0


@pytest.mark.parametrize("method", OBSERVERS)
def test_ranges(method: str) -> None:
    observer = RangeObserver(method)
    values = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 40.0  # one that is far away
    for value in values:
        observer.update(value)
    seen, grid = observer.result(), Grid.of_activations(8, symmetric=False)
    least, greatest = seen.range(grid)
    assert seen.finite
    assert -6 < least < -2
    assert greatest >= 39 if method == "min-max" else greatest > 2
    if method in ("percentile", "mse"):
        assert greatest < 20
    empty = RangeObserver(method)
    empty.update(torch.zeros(0))
    assert empty.result().range(grid) == (0.0, 0.0)
    empty.update(torch.tensor([1.0, float("nan")]))
    assert not empty.result().finite


@pytest.mark.parametrize("method", OBSERVERS)
def test_many_zeros_do_not_narrow_a_range(method: str) -> None:
    observer = RangeObserver(method)
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    observer.update((x - 1).clamp(0, 2))  # as relu6 gives it: five zeros in six
    least, greatest = observer.result().range(Grid.of_activations(8, symmetric=False))
    assert least == 0
    assert greatest > 1.6


def test_a_value_that_is_never_negative_has_no_negative_range() -> None:
    observer = RangeObserver("mse")
    observer.update(torch.rand(1000))
    observer.update(3 * torch.rand(1000))  # the histogram grows
    assert observer.result().range(Grid.of_activations(8, symmetric=False))[0] == 0


# --- the reference graph ---


@given(seed=st.integers(0, 50), bits=st.sampled_from((2, 4, 8)), symmetric=st.booleans(), tensor=st.booleans())
@settings(max_examples=20)
def test_the_error_of_a_layer_is_within_the_bound_of_its_scales(
    seed: int, bits: int, symmetric: bool, tensor: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Sequential(nn.Linear(7, 5))
    layer[0].weight.data.copy_(torch.randn(5, 7, generator=generator))
    x = torch.randn(4, 7, generator=generator)
    pass_ = Quantize(bits, symmetric=symmetric, observer="min-max", correct_bias=False,
                     granularity="tensor" if tensor else "channel")  # fmt: skip
    found = compiled(layer, [pass_], [x])
    by = next(d for d in fxcompress.report(found).passes[-1].details if "scale" in d)
    held = found.get_submodule("0")
    assert held.weight.dtype is torch.int8
    missing = (layer[0].weight - held.weight * held.weight_scale[:, None]).abs()
    bound = by["scale"] * 0.75 * layer[0].weight.abs().sum(1) + (x.abs() + by["scale"]) @ missing.T
    assert ((found(x) - layer(x)).abs() <= bound + 1e-5).all()


def test_what_is_stored_is_small() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 64))
    record = fxcompress.report(compiled(model, [Quantize()])).passes[-1]
    assert record.bytes_after < 0.27 * record.bytes_before
    assert record.parameters_after == record.parameters_before


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic": True}, {"activation_bits": None}, {"activation_bits": 16}, {"granularity": 4}, {"symmetric": True},
        {"activation_bits": None, "overrides": {"first": {"activation_bits": 8}}},
        {"weight_bits": 4, "rounding": "adaptive"}, {"overrides": {"stem": {"weight_bits": 3}}}, {"keep_ends": True},
        {"round_addends": True},
    ],
)  # fmt: skip
def test_options(options: dict[str, Any]) -> None:
    model = Residual(late=False)
    found = compiled(model, [Quantize(**options)])
    x = data(1, seed=5)[0][:1]
    assert float((found(x) - model(x)).norm().detach() / model(x).norm().detach()) < 0.4
    assert (found.get_submodule("stem").weight.dtype is torch.int8) is not options.get("keep_ends", False)


def _is_dequantize(value: Any) -> bool:
    return isinstance(value, fx.Node) and "dequantize_per_tensor" in str(value.target)


@pytest.mark.parametrize("pass_", [Quantize, FakeQuantize])
def test_both_addends_can_be_rounded(pass_: type[Quantize | FakeQuantize]) -> None:
    """By default a sum has one rounded addend, as the layer adds in more digits; with ``round_addends`` two. A sum that
    is not wanted as integers has none."""
    for both in (False, True):
        passes = [pass_(round_addends=both)] if pass_ is Quantize else [pass_(round_addends=both), Quantize()]
        gm = compiled(Residual(late=True), passes)
        sums = [n for n in gm.graph.nodes if is_call(n, ("add",))]
        assert [sum(map(_is_dequantize, n.args)) for n in sums] == [1 + both, 0]


@given(seed=st.integers(0, 100))
@settings(max_examples=30)
def test_adaptive_rounding_is_near_the_best_there_is(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64) @ torch.randn(
        4, 4, generator=generator, dtype=torch.float64
    )
    weighting, scale, grid = (x.mT @ x)[None], torch.tensor(0.7, dtype=torch.float64), Grid.of_weights(3)

    def loss(integers: Tensor) -> Tensor:
        missing = integers * scale - rows
        return ((missing @ weighting[0]) * missing).sum(1)

    found = adaptive(rows, scale, grid, weighting)
    choices = torch.tensor(list(itertools.product(range(grid.low, grid.high + 1), repeat=4)), dtype=torch.float64)
    best = torch.stack([loss_of.min() for loss_of in (_losses(choices, row, weighting[0], scale) for row in rows)])
    assert (loss(found) >= best - 1e-9).all()
    assert loss(found).sum() <= loss(grid.round(rows, scale)).sum() * 1.5 + 1e-9
    for i, j in itertools.product(range(2), range(4)):  # no single change is better
        for step in (-1, 1):
            other = found.clone()
            other[i, j] = (other[i, j] + step).clamp(grid.low, grid.high)
            assert loss(found)[i] <= loss(other)[i] + 1e-9


def _losses(choices: Tensor, row: Tensor, weighting: Tensor, scale: Tensor) -> Tensor:
    missing = choices * scale - row
    return ((missing @ weighting) * missing).sum(1)


def test_each_layer_makes_up_for_those_before_it() -> None:
    """Adaptive rounding sees what the rounded layers before give: its error stays below that of rounding each alone."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10),
    )  # fmt: skip
    batches = [F.interpolate(b[..., :3, :3], size=8, mode="bilinear") for b in data(24)]  # neighbours are alike
    batches, x = batches[:16], torch.cat(batches[16:])
    errors = {}
    for rounding in ("nearest", "adaptive"):
        found = compiled(model, [Quantize(3, activation_bits=None, rounding=rounding)], batches)
        errors[rounding] = float((found(x) - model(x)).norm().detach() / model(x).norm().detach())
    assert errors["adaptive"] < 0.8 * errors["nearest"]
    details = [d for d in fxcompress.report(found).passes[-1].details if "module" in d]
    assert [d["rounding"] for d in details] == ["adaptive"] * 4
    with torch.no_grad():
        wanted, now = (_output_of(m, torch.cat(batches)) for m in (model, found))
    assert details[-1]["output_error"] == pytest.approx(float((now - wanted).norm() / wanted.norm()), rel=1e-3)


def _output_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).double()


def test_adaptive_rounding_of_layers_that_are_called_twice_or_transposed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.up, self.last = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.up(self.twice(self.twice(self.first(x)).relu()).relu()).relu())

    torch.manual_seed(0)
    model = Net()
    found = compiled(model, [Quantize(4, rounding="adaptive")], data(8))
    x = data(1, seed=70)[0]
    assert float((found(x) - model(x)).norm().detach() / model(x).norm().detach()) < 0.35
    details = {d["module"]: d["rounding"] for d in fxcompress.report(found).passes[-1].details if "module" in d}
    assert details == {"first": "adaptive", "twice": "adaptive", "up": "nearest", "last": "adaptive"}


def test_bias_correction_takes_up_the_mean() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(16, 8)), [torch.rand(64, 16) + 1 for _ in range(4)]
    errors = {}
    for corrects in (False, True):
        found = compiled(model, [Quantize(3, activation_bits=None, correct_bias=corrects)], batches)
        x = torch.cat(batches)
        errors[corrects] = float((found(x) - model(x)).mean(0).abs().max())
    assert errors[True] < 1e-5 < 0.01 < errors[False]


def test_a_pickle_runs_in_a_new_process(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    found = compiled(model, [Quantize()], [x])
    torch.save((found, x), tmp_path / "graph.pt")
    script = "import sys, torch; gm, x = torch.load(sys.argv[1], weights_only=False); print(float(gm(x).sum()))"
    command = [sys.executable, "-c", script, str(tmp_path / "graph.pt")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(printed) == pytest.approx(float(found(x).sum()), rel=1e-5)


class Text(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16, padding_idx=0, **options), nn.Embedding(8, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.words(x) + self.places(torch.arange(x.shape[1], device=x.device)))


@pytest.mark.parametrize("bits", [8, 4])
def test_embeddings_become_integers(bits: int) -> None:
    torch.manual_seed(0)
    model, batches = Text().eval(), [torch.randint(0, 50, (3, 8)) for _ in range(3)]
    pass_ = Quantize(overrides={"words": {"weight_bits": bits}})
    found = fxcompress.compile(model, [pass_], batches[0], calibration=batches)
    words = found.get_submodule("words")
    assert words.weight.dtype is torch.int8
    assert int(words.weight.abs().max()) == 2 ** (bits - 1) - 1
    assert not words.weight[0].any(), "the padding stays zero"
    missing = (words.weight * words.weight_scale[:, None] - model.words.weight).abs()
    assert (missing <= words.weight_scale[:, None] * (0.5 if bits == 8 else 1.5) + 1e-6).all()
    x = torch.randint(0, 50, (1, 8))
    assert float((found(x) - model(x)).norm().detach() / model(x).norm().detach()) < (0.05 if bits == 8 else 0.3)
    assert fxcompress.report(found).passes[-1].bytes_after < 0.5 * fxcompress.report(found).passes[-1].bytes_before


def test_embeddings_that_are_left_alone() -> None:
    model, batches = Text(max_norm=1.0).eval(), [torch.randint(0, 50, (3, 8))]
    pass_ = Quantize(exclude=("places",))
    record = fxcompress.report(fxcompress.compile(model, [pass_], batches[0], calibration=batches)).passes[-1]
    assert "max_norm" in record.refusals[0].reason
    assert {d.get("module") for d in record.details} == {"last", None}


def test_batch_norms_that_could_be_folded_are_pointed_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    record = fxcompress.report(compiled(model, [Quantize()])).passes[-1]
    assert [(r.target, "fold-batch-norm" in r.reason) for r in record.refusals] == [("1", True)]
    assert not fxcompress.report(compiled(model, ["fold-batch-norm", Quantize()])).passes[-1].refusals


# --- bad input ---


def test_pooling_over_a_border_of_infinities() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.max_pool2d(F.pad(self.stem(x), (0, 1, 0, 1), value=-torch.inf), 3, 2))

    torch.manual_seed(0)
    model, x = Net(), data(1, seed=9)[0]
    for passes in ([Quantize()], [Quantize(), LowerInt8()]):
        found = compiled(model, passes)
        assert {d.get("value") for d in fxcompress.report(found).passes[0].details} == {None, "x", "max_pool2d"}
        assert float((found(x) - model(x)).norm().detach() / model(x).norm().detach()) < 0.05


def test_bad_options_are_refused() -> None:
    for options in (
        {"weight_bits": 9}, {"activation_bits": 4}, {"granularity": "row"}, {"observer": "mean"}, {"only": "a"},
        {"rounding": "up"}, {"dynamic": True, "activation_bits": None}, {"overrides": {"a": {"bits": 3}}},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Quantize(**options)  # type: ignore[arg-type]


def test_bad_models_and_data_are_refused() -> None:
    model, x = Residual(late=False).eval(), data(1)[0]
    with pytest.raises(PreconditionError, match="calibration"):
        fxcompress.compile(model, ["quantize"], x)
    with pytest.raises(PreconditionError, match=r"model\.eval"):
        fxcompress.compile(copy.deepcopy(model).train(), ["quantize"], x, calibration=[x])
    with pytest.raises(PreconditionError, match="not finite"):
        compiled(model, [Quantize()], [x, x * float("inf")])
    with pytest.raises(PreconditionError, match="quantised already"):
        compiled(compiled(model, [Quantize()]), [Quantize()])
    with pytest.raises(UsageError, match="no module path"):
        compiled(model, [Quantize(exclude=("nothing",))])
    record = fxcompress.report(compiled(copy.deepcopy(model).double(), [Quantize()], [x.double()])).passes[-1]
    assert record.sites == 0
    assert "float64" in record.refusals[0].reason


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_of_weights_of_transposed_convolutions_have_a_scale_for_each_channel(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, groups=groups))
    x = torch.randn(2, 8, 5, 5)
    found = compiled(model, [Quantize(activation_bits=None, granularity=4)], [x])
    assert float((found(x) - model(x)).norm().detach() / model(x).norm().detach()) < 0.02


# --- kernels ---


@st.composite
def int8_layers(draw: st.DrawFn) -> tuple[Int8Layer, Tensor, Tensor | None]:
    """A layer on integers, its input, and what it adds."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    linear, adds, real = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    posts = [PostOp(), PostOp("relu")]
    if not adds:
        posts += [PostOp("hardtanh", (0.0, 6.0)), PostOp("hardswish"), PostOp("swish")]
        if linear:
            posts += [PostOp("gelu", (), "none"), PostOp("gelu", (), "tanh"), PostOp("tanh")]
    groups = draw(st.sampled_from((1, 2, 8)))
    holder = nn.Module()
    shape = (16, 8) if linear else (16, 8 // groups, *draw(st.sampled_from(((1, 1), (3, 3), (3, 1)))))
    holder.weight = nn.Parameter(torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8), False)
    if draw(st.booleans()):
        holder.bias = nn.Parameter(torch.randn(16, generator=generator), False)
    holder.register_buffer("weight_scale", torch.rand(16, generator=generator) * 0.01 + 0.001)
    holder.register_buffer("weight_zero_point", torch.zeros(16, dtype=torch.int64))
    unsigned = Grid.of_activations(8, symmetric=False)
    given_, made, other = PerTensor(0.02, 120, unsigned), PerTensor(0.05, 90, unsigned), PerTensor(0.04, 30, unsigned)
    integers_added = adds and not real and not linear
    common = (holder, given_, None if real or (linear and adds) else made, draw(st.sampled_from(posts)), adds,
              other if integers_added else None)  # fmt: skip
    if linear:
        layer: Int8Layer = Int8Linear(*common)
        x = torch.randint(0, 256, (2, 3, 8), generator=generator, dtype=torch.uint8)
    else:
        padding, stride = draw(st.sampled_from(((0, 0), (1, 1), (1, 2)))), draw(st.sampled_from((1, 2)))
        layer = Int8Conv(*common, stride=[stride] * 2, padding=list(padding), dilation=[1, 1], groups=groups)
        x = torch.randint(0, 256, (2, 8, 6, 5), generator=generator, dtype=torch.uint8)
    added = None
    if adds:
        like = layer.reference(x)
        added = torch.randint(0, 256, like.shape, generator=generator, dtype=torch.uint8)
        added = added if integers_added else dequantize(added, other)
    return layer, x, added


@needs_kernels
@given(case=int8_layers())
@settings(deadline=None)
def test_a_kernel_is_its_reference_within_a_quantum(case: tuple[Int8Layer, Tensor, Tensor | None]) -> None:
    layer, x, added = case
    expected = layer.reference(x, added)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        found = other(x, None if added is None else added.clone())
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        if expected.dtype is torch.uint8:
            assert int((found.int() - expected.int()).abs().max()) <= 1
        else:
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@needs_kernels
@given(
    seed=st.integers(0, 1000), groups=st.sampled_from((1, 2, 3)), inputs=st.sampled_from((1, 3, 16)),
    outputs=st.sampled_from((8, 33, 64, 107)), window=st.sampled_from((1, 3, 8, 11)),
    stride=st.sampled_from((1, 2, 8)), padding=st.integers(0, 2), dilation=st.sampled_from((1, 1, 2)),
    size=st.sampled_from((22, 33)),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_no_kernel_of_a_convolution_is_used_that_is_wrong(
    seed: int, groups: int, inputs: int, outputs: int, window: int, stride: int, padding: int, dilation: int, size: int
) -> None:
    """oneDNN has wrong ones for these sizes, which ones depends on the processor."""
    generator = torch.Generator().manual_seed(seed)
    holder, channels = nn.Module(), groups * outputs
    shape = (channels, inputs, window, window)
    holder.weight = nn.Parameter(torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8), False)
    holder.register_buffer("weight_scale", torch.rand(channels, generator=generator) * 0.01 + 0.001)
    holder.register_buffer("weight_zero_point", torch.zeros(channels, dtype=torch.int64))
    given_ = PerTensor(0.02, 120, Grid.of_activations(8, symmetric=False))
    sizes = {"stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2, "groups": groups}
    layer = Int8Conv(holder, given_, None, PostOp(), **sizes)
    x = torch.randint(0, 256, (2, groups * inputs, size, size), generator=generator, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is computed in real numbers")
        found, expected = layer(x), layer.reference(x)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def _wrong(right: Any) -> Any:
    """A kernel whose first channel is off by one in real numbers."""

    def kernel(*args: Any) -> Tensor:
        result: Tensor = right(*args).clone()
        result[:, 0] += 1
        return result

    return kernel


@needs_kernels
def test_a_wrong_kernel_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2)).eval()
    reference = compiled(model, [Quantize()])
    lowered = compiled(reference, [LowerInt8()])
    grouped = lowered.get_submodule("2")
    assert isinstance(grouped, Int8Conv)
    assert grouped.has_doubtful_kernels
    assert not lowered.get_submodule("0").has_doubtful_kernels
    with monkeypatch.context() as patch:
        patch.setattr(Int8Conv, "kernel", _wrong(Int8Conv.kernel))
        record = fxcompress.report(refused := compiled(reference, [LowerInt8()])).passes[-1]
        assert [r.reason for r in record.refusals].count(WRONG_KERNEL) == 2
        x = data(1, seed=3)[0]
        assert torch.equal(refused(x), reference(x))
        loaded = copy.deepcopy(grouped)  # as if lowered on another machine
        integers = torch.randint(0, 256, (2, 4, 9, 9), dtype=torch.uint8)
        with pytest.warns(UserWarning, match=r"Int8Conv.*in real numbers for inputs of shape \(2, 4, 9, 9\)"):
            assert torch.equal(loaded(integers), loaded.reference(integers))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded(integers)  # which is told once
        with pytest.warns(UserWarning, match=r"\(1, 4, 9, 9\)"):
            loaded(integers[:1])


@needs_kernels
@given(
    seed=st.integers(0, 1000), rows=st.sampled_from(((3,), (2, 5), (70,), (0,), ())), bias=st.booleans(),
    group=st.sampled_from((0, 32, 64)), bits=st.sampled_from((4, 8)), scale=st.sampled_from((1e-3, 1.0, 1e3)),
)  # fmt: skip
@settings(deadline=None)
def test_linear_layers_on_real_numbers(
    seed: int, rows: tuple[int, ...], bias: bool, group: int, bits: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    largest = 2 ** (bits - 1) - 1
    holder = nn.Module()
    weight = torch.randint(-largest, largest + 1, (32, 64), generator=generator, dtype=torch.int8)
    holder.weight = nn.Parameter(weight, False)
    if bias:
        holder.bias = nn.Parameter(torch.randn(32, generator=generator), False)
    count = 32 * (64 // group if group else 1)
    holder.register_buffer("weight_scale", torch.rand(count, generator=generator) * 0.01 + 0.001)
    holder.register_buffer("weight_zero_point", torch.zeros(count, dtype=torch.int64))
    x = torch.randn(*rows, 64, generator=generator) * scale
    layers: list[tuple[nn.Module, float]] = []
    if unfit(weight, group) is None:
        layers.append((WeightOnlyLinear(holder, group), 2**-7))
    if not group:
        layers.append((DynamicInt8Linear(holder, Grid(0, 255, torch.uint8), PostOp("relu")), 2**-7))
    for layer, tolerance in layers:
        expected = layer.reference(x)  # type: ignore[operator]
        for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            found = other(x)
            assert found.shape == expected.shape
            assert found.dtype is torch.float32
            if x.numel():
                size = float((x.abs().amax() * (weight.abs().double().norm(dim=1) * 0.011).max()) + 1)
                assert float((found - expected).abs().max()) <= tolerance * size * 8


@needs_kernels
def test_rows_that_the_weight_only_kernel_would_read_beyond_stay() -> None:
    """It ends the process at the end of memory, or reads what is not its own."""
    model, x = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 4)), torch.randn(2, 16)
    lowered = compiled(model, [Quantize(activation_bits=None), LowerInt8()], [x])
    assert type(lowered.get_submodule("0")) is WeightOnlyLinear
    assert "its rows of 24 are no multiple of 16" in fxcompress.report(lowered).passes[-1].refusals[0].reason


@needs_kernels
@pytest.mark.parametrize("options", [{"dynamic": True}, {"activation_bits": None}])
def test_lowering_of_linear_layers_on_real_numbers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    batches = [torch.randn(6, 16) for _ in range(3)]
    reference = compiled(model, [Quantize(**options)], batches)
    lowered = compiled(reference, [LowerInt8()], batches)
    record = fxcompress.report(lowered).passes[-1]
    assert record.sites == 2
    assert {d["op"] for d in record.details} == {"dynamic layer" if options.get("dynamic") else "weight-only layer"}
    for x in (batches[0], batches[0][:1], batches[0][None]):
        expected = reference(x)
        for other in (lowered, copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
            assert float((other(x) - expected).norm() / expected.norm()) < 0.01
    changed = {k: torch.zeros_like(v) if k == "2.weight" else v for k, v in lowered.state_dict().items()}
    other = copy.deepcopy(lowered)
    other(batches[0])
    other.load_state_dict(changed)
    assert torch.allclose(other(batches[0]), other.get_parameter("2.bias").expand(6, 8))


class StochasticDepth(nn.Module):
    """As libraries have it: a module of its own that does nothing in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1, 1, 1) > 0.5) if self.training else x


class Padded(nn.Module):
    """A residual block with stochastic depth, and a convolution whose border a module of its own makes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.depth, self.pad = StochasticDepth(), nn.ZeroPad2d((0, 1, 0, 1))
        self.last = nn.Conv2d(8, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.depth(self.block(x))
        return self.last(F.pad(self.pad(x), (1, 0, 1, 0)))


@needs_kernels
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_does_nothing_is_seen_through_and_borders_are_integers(symmetric: bool) -> None:
    torch.manual_seed(0)
    model = Padded()
    reference = compiled(model, [Quantize(symmetric=symmetric)])
    lowered = compiled(reference, [LowerInt8()])
    details = fxcompress.report(lowered).passes[-1].details
    assert [d["op"] for d in details].count("round") == 1, "of the input"
    assert [d["op"] for d in details].count("move") == 2
    assert {d["module"]: d["adds"] for d in details if d["op"] == "layer"}["block"] == "integers"
    x = data(1, seed=7)[0]
    assert float((lowered(x) - reference(x)).norm() / reference(x).norm()) < 0.03


@given(seed=st.integers(0, 100), zero_point=st.integers(0, 255))
def test_rounding_at_the_border(seed: int, zero_point: int) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    expected = quantize(x, PerTensor(0.03, zero_point, Grid(0, 255, torch.uint8)))
    assert int((to_uint8(x, 0.03, zero_point, 0, 255).int() - expected.int()).abs().max()) <= 1


@needs_kernels
def test_inputs_of_another_dtype_are_refused() -> None:
    reference, x = compiled(Residual(late=False), [Quantize()]), data(1)[0]
    lowered = compiled(reference, [LowerInt8()])
    again = pickle.loads(pickle.dumps(lowered))
    assert [str(n.target) for n in again.graph.nodes] == [str(n.target) for n in lowered.graph.nodes]
    for other in (x.double(), (x * 10).to(torch.uint8), x.bfloat16()):
        with pytest.raises(TypeError, match="quantised for float32"):
            lowered(other)
    with pytest.raises(AssertionError, match="dtype"):
        reference(x.double())


@needs_kernels
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_lowering_keeps_what_the_reference_gives(late: bool, symmetric: bool) -> None:
    torch.manual_seed(0)
    model = Residual(late)
    reference = compiled(model, [Quantize(symmetric=symmetric)])
    lowered = compiled(reference, [LowerInt8()])
    for x in (data(1, seed=7)[0], data(1, seed=8)[0][:1]):
        expected = reference(x)
        for other in (lowered, copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
            assert float((other(x) - expected).norm() / expected.norm()) < 0.03
            assert torch.equal(other(x), other(x)), "a call leaves nothing behind"
    layers = [m for m in lowered.modules() if isinstance(m, Int8Layer)]
    assert len(layers) == (5 if late else 3)
    record = fxcompress.report(lowered).passes[-1]
    assert {"integers", None} >= {d["adds"] for d in record.details if d["op"] == "layer"} - {"reals"}


class Joined(nn.Module):
    """Reads what a sum took, and its kernel would write to, again by something that moves integers (as in DLA)."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.join = join
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.first = nn.Conv2d(8, 8, 3, 1, 1)
        self.second = nn.Conv2d(8, 8, 3, 1, 1)
        self.last = nn.Conv2d(16 if join == "cat" else 8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = (self.second(self.first(x).relu()) + x).relu()
        if self.join == "cat":
            return self.last(torch.cat([y, x], 1))
        if self.join == "pool":
            return self.last(y)[:, :, :3, :3] + self.last(F.max_pool2d(x, 2, 1))[:, :, :3, :3]
        return self.last(y) + x.sin()[:, :4, 1:-1, 1:-1]


@needs_kernels
@pytest.mark.parametrize("join", ["cat", "pool", "reals"])
def test_no_kernel_writes_over_what_is_read_later(join: str) -> None:
    torch.manual_seed(0)
    reference = compiled(Joined(join), [Quantize()])
    lowered = compiled(reference, [LowerInt8()])
    adds = {d["module"]: d["adds"] for d in fxcompress.report(lowered).passes[-1].details if d["op"] == "layer"}
    assert adds["second"] == "integers"
    x = data(1, seed=7)[0]
    assert float((lowered(x) - reference(x)).norm() / reference(x).norm()) < 0.03


class Positions(nn.Module):
    """Adds a table that is as large as an example of one, and no larger for more (as in PiT); then a layer of a weight
    that is computed, given by name."""

    def __init__(self, image: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4) if image else nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(1, 8, 2, 2) if image else torch.randn(1, 8, 8))
        self.table_of = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.patches(x) + self.table).relu()
        return F.linear(input=y.flatten(2).mean(2), weight=self.table_of.tanh())


@needs_kernels
@pytest.mark.parametrize("image", [True, False])
def test_what_is_added_to_a_batch_of_one_may_be_smaller_than_other_batches(image: bool) -> None:
    torch.manual_seed(0)
    shape = (3, 8, 8) if image else (8, 8)
    reference = compiled(Positions(image), ["quantize"], [torch.randn(1, *shape) for _ in range(8)])
    lowered = compiled(reference, ["lower-int8"], [torch.randn(1, *shape)])
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape)
        assert float((lowered(x) - reference(x)).norm() / reference(x).norm()) < 0.03


@needs_kernels
@pytest.mark.parametrize("made", [None, PerTensor(0.5, 128, Grid(0, 255, torch.uint8))])
def test_what_a_linear_kernel_adds_may_lie_in_memory_in_any_way(made: PerTensor | None) -> None:
    """oneDNN reads a copy that it has given back already; memory that is written to in between shows it."""
    torch.manual_seed(0)
    reference = compiled(nn.Sequential(nn.Linear(16, 8)), [Quantize()], [torch.randn(4, 16)])
    given = PerTensor(0.02, 128, Grid(0, 255, torch.uint8))
    layer = Int8Linear(reference.get_submodule("0"), given, made, PostOp(), adds=True)
    x = torch.randint(0, 256, (64, 7, 16), dtype=torch.uint8)
    for added in (torch.randn(7, 64, 8).transpose(0, 1), torch.randn(64, 8, 7).mT, torch.randn(64, 7, 16)[..., ::2]):
        expected = layer.reference(x, added)
        for _ in range(5):
            found = layer(x, added)
            torch.full((64 * 7 * 8,), float("nan"))
            assert torch.allclose(found.float(), expected.float(), atol=1.0 if made else 1e-3)


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"activation_bits": None}])
def test_integer_kernels_multiply_as_much(options: dict[str, Any]) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(128, 32), nn.Linear(32, 5)
    )
    found = compiled(model, [Quantize(**options), LowerInt8()])
    record = fxcompress.report(found).passes[-1]
    assert record.sites
    assert record.macs_after == record.macs_before > 0


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"activation_bits": None}])
def test_weights_that_are_transposed_in_memory(options: dict[str, Any]) -> None:
    """As in GPT-2, whose layers keep their weights the other way round; and after a change of memory format."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(16, 8), nn.Conv2d(4, 6, 3)
    linear.weight = nn.Parameter(torch.randn(16, 8).T)
    conv.weight = nn.Parameter(torch.randn(4, 6, 3, 3).transpose(0, 1))
    for layer, x in ((linear, torch.randn(5, 16)), (conv, torch.randn(2, 4, 8, 8))):
        reference = compiled(nn.Sequential(layer), [Quantize(**options)], [x])
        lowered = compiled(reference, [LowerInt8()], [x])
        for other in (lowered, copy.deepcopy(lowered).to(memory_format=torch.channels_last)):
            assert float((other(x) - reference(x)).norm() / reference(x).norm()) < 0.01


@needs_kernels
def test_loaded_weights_are_packed_anew() -> None:
    batches = data()
    torch.manual_seed(0)
    first = compiled(Residual(late=False), ["quantize", "lower-int8"], batches)
    first(batches[0])
    changed = {k: torch.zeros_like(v) if k == "stem.weight" else v for k, v in first.state_dict().items()}
    other = copy.deepcopy(first)
    other(batches[0])
    other.load_state_dict(changed)
    assert not torch.equal(other(batches[0]), first(batches[0]))
    assert torch.equal(other(batches[0]), copy.deepcopy(other)(batches[0]))


def test_without_kernels_the_graph_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.passes.quantization.lower_int8.unavailable", lambda: "there are none")
    reference = compiled(Residual(late=False), [Quantize()])
    found = compiled(reference, [LowerInt8()])
    record = fxcompress.report(found).passes[-1]
    assert record.sites == 0
    assert {r.reason for r in record.refusals} == {"there are none"}
    assert found.code == reference.code


@needs_kernels
@pytest.mark.slow
def test_both_roads_to_integer_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.freezing", True)
    reference = compiled(Residual(late=False), [Quantize()])
    lowered, x = compiled(reference, [LowerInt8()]), data(1, seed=7)[0]
    with torch.no_grad():
        for graph in (reference, lowered):
            torch._dynamo.reset()
            assert float((torch.compile(graph)(x) - reference(x)).norm() / reference(x).norm()) < 0.03


def test_what_a_search_may_set() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(4, 8)
    knobs = list(Quantize().knobs(fxcompress.PassContext(fxcompress.trace(model, x), fxcompress.Example((x,)))))
    assert [(k.layer, k.option, k.settings) for k in knobs] == [("0", "bits", (8,)), ("2", "bits", (8,))]
    turned = Quantize(observer="min-max").turned({"2": 8, "0": 4})
    assert (turned.observer, turned.settings(["0"])["weight_bits"], turned.settings(["2"])["weight_bits"]) == (
        "min-max",
        4,
        8,
    )
    one = fxcompress.compile(model, [Quantize().turned({"2": 8})], x, calibration=[x])
    assert [d["module"] for d in fxcompress.report(one).passes[0].details if "module" in d] == ["2"]
