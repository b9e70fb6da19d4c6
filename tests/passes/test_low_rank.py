"""Pairs of layers, error measures, allocation, and the ALDS passes."""

from __future__ import annotations

import itertools
import math
import unittest.mock
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.analysis.latency import Latency
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.layers import Layer
from fxcompress.modules import GroupedLinear
from fxcompress.passes.low_rank import ERRORS, Alds, AldsPlus, alds, plot_ranks
from fxcompress.passes.low_rank.allocate import Options, Unreachable, constant_ratio, least_maximum, least_sum
from fxcompress.passes.low_rank.errors import Scale
from fxcompress.passes.low_rank.folding import SCHEMES, Choice, Folding, slices_of
from fxcompress.passes.low_rank.moments import observer_of
from fxcompress.passes.low_rank.spectra import factors, spectra
from fxcompress.passes.low_rank.timing import seconds_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@st.composite
def layers(draw: st.DrawFn, transposed: bool | None = None) -> tuple[Layer, Tensor]:
    """A float64 layer of any kind with random weights, and an input."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    space = draw(st.integers(0 if transposed is None else 1, 3))
    bias = draw(st.booleans())
    if not space:
        inputs, outputs = draw(st.sampled_from([2, 4, 6])), draw(st.integers(1, 7))
        return nn.Linear(inputs, outputs, bias=bias).double(), torch.randn(2, 3, inputs).double()
    groups = draw(st.sampled_from([1, 1, 2]))
    inputs, outputs = groups * draw(st.sampled_from([1, 2, 4, 6])), groups * draw(st.integers(1, 5))
    each = {
        "kernel_size": draw(st.tuples(*[st.integers(1, 3)] * space)),
        "stride": draw(st.tuples(*[st.integers(1, 2)] * space)),
        "dilation": draw(st.tuples(*[st.integers(1, 2)] * space)),
    }
    options: dict[str, Any] = {**each, "groups": groups, "bias": bias}
    if draw(st.booleans()) if transposed is None else transposed:
        most = [max(s, d) - 1 for s, d in zip(each["stride"], each["dilation"], strict=True)]
        options["output_padding"] = draw(st.tuples(*[st.integers(0, m) for m in most]))
        options["padding"] = draw(st.tuples(*[st.integers(0, k - 1) for k in each["kernel_size"]]))
        layer: Layer = TRANSPOSED[space - 1](inputs, outputs, **options)
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        options["padding"] = draw(
            st.one_of(st.tuples(*[st.integers(0, 2)] * space), st.sampled_from(["same", "valid"]))
        )
        if options["padding"] == "same":
            options["stride"] = (1,) * space
        layer = CONVOLUTIONS[space - 1](inputs, outputs, **options)
    return layer.double(), torch.randn(2, inputs, *[6] * space).double()


def relative(expected: Tensor, found: Tensor) -> float:
    assert expected.shape == found.shape
    return float((expected - found).detach().abs().max() / expected.detach().abs().max().clamp_min(1e-30))


# --- pairs ---


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(layer_and_input=layers())
def test_at_full_rank_a_pair_is_the_layer(layer_and_input: tuple[Layer, Tensor]) -> None:
    layer, x = layer_and_input
    folding = Folding.of(layer)
    for scheme in SCHEMES:
        for slices in folding.all_slices():
            rank = min(folding.shape(scheme, slices))
            left, right = factors(layer, folding, scheme, slices, rank)
            encoder, decoder = folding.pair(layer, scheme, left, right, layer.bias)
            assert relative(layer(x), decoder(encoder(x))) <= 1e-10
            per_rank = folding.weights_per_rank(scheme, slices)
            assert [encoder.weight.numel(), decoder.weight.numel()] == [rank * n for n in per_rank]


@given(layer_and_input=layers(), data=st.data())
def test_what_a_rank_leaves_out_is_the_tail_of_the_spectrum(
    layer_and_input: tuple[Layer, Tensor], data: st.DataObject
) -> None:
    layer, _ = layer_and_input
    folding = Folding.of(layer)
    scheme, slices = data.draw(st.sampled_from(SCHEMES)), data.draw(st.sampled_from(folding.all_slices()))
    numbers = folding.all_slices()  # which share products
    found = list(spectra(layer, folding, scheme, numbers))[numbers.index(slices)]
    rank = data.draw(st.integers(1, found.rank))
    left, right = factors(layer, folding, scheme, slices, rank)
    matrices = folding.matrices(layer, scheme, slices)
    missing = matrices - left @ right
    size = float(matrices.square().sum())
    assert float(missing.square().sum()) == pytest.approx(float(found.squares[:, rank:].sum()), abs=1e-12 * size)
    exact = torch.linalg.svdvals(matrices)
    assert torch.allclose(found.squares, exact.square(), atol=1e-12 * size)


def test_schemes_by_hand() -> None:
    layer = nn.Conv2d(6, 4, (3, 5), bias=False).double()
    folding = Folding.of(layer)
    w = layer.weight.detach()
    assert torch.equal(folding.matrices(layer, 0, 1)[0], w.reshape(4, -1))
    assert torch.equal(folding.matrices(layer, 1, 1)[0], w.permute(0, 2, 1, 3).reshape(12, 30))
    assert torch.equal(folding.matrices(layer, 2, 1)[0], w.permute(0, 3, 1, 2).reshape(20, 18))
    assert torch.equal(folding.matrices(layer, 3, 1)[0], w.permute(0, 2, 3, 1).reshape(60, 6))
    assert torch.equal(folding.matrices(layer, 0, 3)[1], w[:, 2:4].reshape(4, -1))
    sizes = [folding.weights_per_rank(s, 2) for s in SCHEMES]
    assert sizes == [(6 * 15, 2 * 4), (6 * 5, 2 * 12), (6 * 3, 2 * 20), (6, 2 * 60)]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(4, 4), (0,)),
        (nn.Conv2d(4, 4, 1), (0,)),
        (nn.Conv1d(4, 4, 3), (0, 3)),
        (nn.Conv2d(4, 4, (3, 1)), (0, 3)),
        (nn.Conv2d(4, 4, 3), (0, 1, 2, 3)),
    ],
)
def test_schemes_that_are_the_same_are_tried_once(layer: Layer, expected: tuple[int, ...]) -> None:
    assert Folding.of(layer).distinct(SCHEMES) == expected


@given(
    groups=st.integers(1, 4),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    lead=st.lists(st.integers(1, 3), max_size=3),
)
def test_a_grouped_linear_layer_is_a_grouped_convolution(
    groups: int, inputs: int, outputs: int, lead: list[int]
) -> None:
    layer = GroupedLinear(groups * inputs, groups * outputs, groups).double()
    x = torch.randn(*lead, groups * inputs).double()
    rows = x.reshape(-1, groups * inputs, 1)
    expected = torch.nn.functional.conv1d(rows, layer.weight[:, :, None], groups=groups)
    assert layer(x).shape == (*lead, groups * outputs)
    assert torch.allclose(layer(x).reshape(rows.shape[0], -1, 1), expected)


def test_both_factors_have_the_same_norms() -> None:
    layer = nn.Linear(6, 8).double()
    left, right = factors(layer, Folding.of(layer), 0, 2, 2)
    assert torch.allclose(left.norm(dim=1), right.norm(dim=2))


# --- errors ---


@given(layer_and_input=layers(), data=st.data())
def test_measures_by_definition(layer_and_input: tuple[Layer, Tensor], data: st.DataObject) -> None:
    layer, _ = layer_and_input
    folding = Folding.of(layer)
    scheme, slices = data.draw(st.sampled_from(SCHEMES)), data.draw(st.sampled_from(folding.all_slices()))
    whole, found = spectra(layer, folding, scheme, [1, slices])
    scale = Scale.of(whole)
    ranks = np.arange(1, found.rank + 1)
    curves = {name: m().curve(layer, folding, found, ranks, scale) for name, m in ERRORS.items()}
    matrix = folding.matrices(layer, scheme, 1)
    largest = float(torch.linalg.matrix_norm(matrix, 2).max())
    for i, rank in enumerate(ranks.tolist()):
        left, right = factors(layer, folding, scheme, slices, rank)
        missing = folding.matrices(layer, scheme, slices) - left @ right
        sliced = missing.reshape(folding.groups, slices, *missing.shape[1:]).transpose(1, 2).flatten(2)
        close = {"abs": 2e-7}
        assert curves["residual"][i] == pytest.approx(
            float(torch.linalg.matrix_norm(sliced, 2).max()) / largest, **close
        )
        assert curves["operator"][i] == pytest.approx(
            float(torch.linalg.matrix_norm(missing, 2).max()) / largest, **close
        )
        assert curves["bound"][i] == pytest.approx(math.sqrt(slices) * curves["operator"][i], **close)
        assert curves["frobenius"][i] == pytest.approx(float(missing.norm() / matrix.norm()), **close)
        assert curves["operator"][i] <= curves["residual"][i] + 1e-7 <= curves["bound"][i] + 2e-7
    for curve in curves.values():
        assert (np.diff(curve) <= 1e-12).all()


@given(layer_and_input=layers(transposed=False), data=st.data(), regular=st.booleans())
def test_weighted_spectra_are_those_of_weight_times_root(
    layer_and_input: tuple[Layer, Tensor], data: st.DataObject, regular: bool
) -> None:
    layer, _ = layer_and_input
    folding = Folding.of(layer)
    scheme = data.draw(st.sampled_from(SCHEMES))
    columns = folding.shape(scheme, 1)[1]
    rows = torch.randn(folding.groups, columns + 3 if regular else 1, columns, dtype=torch.float64)
    second = rows.mT @ rows / rows.shape[1]
    for found in spectra(layer, folding, scheme, folding.all_slices(), second):
        values, vectors = torch.linalg.eigh(slices_of(second, found.slices))
        root = vectors * values.clamp_min(0).sqrt()[:, None] @ vectors.mT
        exact = torch.linalg.svdvals(folding.matrices(layer, scheme, found.slices) @ root).square()
        assert torch.allclose(found.squares, exact, rtol=0, atol=1e-11 * float(exact.max()))


@given(layer_and_input=layers(transposed=False), data=st.data())
@settings(deadline=None)
def test_activation_error_is_that_of_the_output(layer_and_input: tuple[Layer, Tensor], data: st.DataObject) -> None:
    """With one slice, a kernel on the encoder and every place looked at, it is the error of the output on the data."""
    layer, x = layer_and_input
    if layer.bias is not None:
        layer.bias.data.zero_()
    folding = Folding.of(layer)
    observer = observer_of(layer, 0)
    observer._generator = torch.Generator()
    if math.prod(layer(x).shape[2:]) > 64:  # then only some places are looked at
        x = x[..., :1] if layer.weight.dim() == 3 else x[:, :, :3, :3]
    try:
        y = layer(x)
    except RuntimeError:  # smaller than the kernel
        return
    if math.prod(y.shape[2:]) > 64:
        return
    observer.update(x)
    second = observer.result().second
    (found,) = spectra(layer, folding, 0, [1], second)
    rank = data.draw(st.integers(1, found.rank))
    left, right = factors(layer, folding, 0, 1, rank, second)
    encoder, decoder = folding.pair(layer, 0, left, right, None)
    z = decoder(encoder(x))
    size = float(y.detach().square().sum())
    count = y.numel() / y.shape[1]
    assert float((y - z).detach().square().sum()) == pytest.approx(
        count * float(found.squares[:, rank:].sum()), abs=1e-9 * size, rel=1e-6
    )


def test_blocks_along_the_diagonal() -> None:
    second = torch.arange(32.0).reshape(2, 4, 4)
    blocks = slices_of(second, 2)
    assert torch.equal(
        blocks, torch.stack([second[0, :2, :2], second[0, 2:, 2:], second[1, :2, :2], second[1, 2:, 2:]])
    )


# --- allocation ---


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Options], int]:
    """A few layers with a few options each, and a budget that some choice meets."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        full = draw(st.integers(2, 40))
        count = draw(st.integers(0, 5))
        sizes = draw(st.lists(st.integers(1, full), min_size=count, max_size=count))
        errors = draw(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0]), min_size=count, max_size=count))
        found.append(Options(np.array([full, *sizes]), np.array([0.0, *errors])))
    least, most = (sum(int(f(o.size)) for o in found) for f in (np.min, lambda s: s[0]))
    return found, draw(st.integers(least, max(least, most)))


def by_brute_force(layers: list[Options], budget: int) -> tuple[float, float]:
    """The smallest largest error and the smallest sum of squares of any choice within the budget."""
    largest = total = math.inf
    for choice in itertools.product(*(range(len(o.size)) for o in layers)):
        if sum(int(o.size[i]) for o, i in zip(layers, choice, strict=True)) <= budget:
            errors = [float(o.error[i]) for o, i in zip(layers, choice, strict=True)]
            largest, total = min(largest, max(errors)), min(total, sum(e * e for e in errors))
    return largest, total


@given(problem=problems())
@settings(max_examples=300)
def test_no_choice_is_better(problem: tuple[list[Options], int]) -> None:
    layers, budget = problem
    largest, total = by_brute_force(layers, budget)
    maximum, least = least_maximum(layers, budget), least_sum(layers, budget)
    assert maximum.value == pytest.approx(largest, abs=1e-12)
    assert least.value == pytest.approx(total, abs=1e-12)
    assert least.bound <= total + 1e-12
    for found in (maximum, least, constant_ratio(layers, budget)):
        assert sum(int(o.size[i]) for o, i in zip(layers, found.choice, strict=True)) <= budget


@given(problem=problems())
def test_a_budget_below_everything_says_what_there_is(problem: tuple[list[Options], int]) -> None:
    layers, _ = problem
    least = sum(int(o.size.min()) for o in layers)
    for solver in (least_maximum, least_sum, constant_ratio):
        with pytest.raises(Unreachable) as caught:
            solver(layers, least - 1)
        assert caught.value.least == least


def test_constant_ratio_by_hand() -> None:
    a = Options(np.array([100, 60, 40]), np.array([0.0, 0.1, 0.2]))
    b = Options(np.array([10, 5, 4]), np.array([0.0, 0.3, 0.4]))
    assert constant_ratio([a, b], 110).choice == (0, 0)
    assert constant_ratio([a, b], 70).choice == (1, 1)
    assert constant_ratio([a, b], 64).choice == (2, 1)  # 60 of 100 and 5 of 10 are 65


# --- the pass ---


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def compress(pass_: Any, model: nn.Module | None = None, **options: Any) -> tuple[fx.GraphModule, Any]:
    found = fxcompress.compile(network() if model is None else model, [pass_], IMAGES, **options)
    return found, fxcompress.report(found).passes[-1]


@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize("solver", ["sum", "minimax", "constant"])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
def test_the_budget_is_met_from_below(ratio: float, solver: Any, measure: Any) -> None:
    _, record = compress(AldsPlus(ratio, solver=solver, measure=measure))
    before, after = (
        (record.parameters_before, record.parameters_after)
        if measure == "params"
        else (record.macs_before, record.macs_after)
    )
    assert after <= (1 - ratio) * before
    if solver != "constant":
        assert after >= (1 - ratio - 0.005) * before


def test_the_record_says_what_became_of_each_layer() -> None:
    found, record = compress(Alds(0.4))
    details = {d["module"]: d for d in record.details}
    assert list(details) == ["0", "3", "5", "9", "11"]
    saved = sum(d["parameters_before"] - d["parameters_after"] for d in details.values())
    assert record.parameters_before - record.parameters_after == saved
    for path, d in details.items():
        module = found.get_submodule(path)
        if d["rank"] is None:
            assert d["error"] == 0
            assert d["left_whole"]
            assert d["parameters_after"] == d["parameters_before"] == module.weight.numel()
        else:
            assert 0 < d["error"] < 1
            assert module.encoder.weight.numel() + module.decoder.weight.numel() == d["parameters_after"]
    assert any(d["rank"] is None for d in details.values())
    assert any(d["rank"] is not None for d in details.values())


@pytest.mark.parametrize("measure", ["params", "macs"])
def test_single_layers_have_ratios_of_their_own(measure: Any) -> None:
    ratios = {"3": 0.5, "9": 0.25, "5": 0.0, "11": 0.99}
    gm, record = compress(Alds(per_layer=ratios, measure=measure))
    found = {detail["module"]: detail for detail in record.details}
    assert set(found) == {"3", "9", "11"}  # the others are not looked at
    assert found["11"]["rank"] is None  # no pair has one percent of 640 parameters
    model = network()
    for path in ("3", "9"):
        layer = model.get_submodule(path)
        assert found[path]["parameters_before"] == layer.weight.numel()  # type: ignore[union-attr,operator]
        if measure == "params":
            left = found[path]["parameters_after"] / found[path]["parameters_before"]
            assert 0.9 * (1 - ratios[path]) < left <= 1 - ratios[path]
    assert torch.equal(gm.get_submodule("5").weight, model[5].weight)  # type: ignore[arg-type]


def test_what_a_search_may_set() -> None:
    gm = fxcompress.trace(network(), torch.randn(2, 3, 16, 16))
    context = fxcompress.PassContext(gm, fxcompress.Example((torch.randn(2, 3, 16, 16),)))
    knobs = list(Alds(exclude=("11",)).knobs(context))
    assert [knob.layer for knob in knobs] == ["0", "3", "5", "9"]
    turned = Alds(error="bound").turned({"3": 0.25})
    assert (turned.error, turned.per_layer) == ("bound", {"3": 0.25})


def test_what_is_excluded_stays() -> None:
    _, record = compress(Alds(0.3, exclude=("5", "1*")))
    assert [d["module"] for d in record.details] == ["0", "3", "9"]
    _, record = compress(Alds(0.1, only=("3",)))
    assert [d["module"] for d in record.details] == ["3"]


@pytest.mark.parametrize("error", sorted(ERRORS))
def test_every_measure_and_the_fixed_number_of_slices(error: str) -> None:
    for options in ({}, {"slices": 2}, {"max_slices": 2}):
        _, record = compress(AldsPlus(0.4, error=error, **options), calibration=[IMAGES])
        slices = {d["slices"] for d in record.details if d["rank"] is not None}
        assert slices <= ({2} if "slices" in options else {1, 2} if options else set(range(1, 65)))


FEW = "scheme 0: 3 rows of calibration data for 16 inputs, so their covariance is singular; see `shrinkage`"


def test_calibration_that_never_reaches_a_layer_is_said() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x).sum(0) + self.b(y).sum(0)

    x = torch.randn(20, 16)
    for count in (20, 3):
        given_ = [(x[:count], x[:0])]
        found = fxcompress.compile(Net(), [Alds(0.3, error="activation")], (x, x), calibration=given_)
        details = {d["module"]: d for d in fxcompress.report(found).passes[-1].details}
        assert "calibration never reaches it" in details["b"]["notes"][0]
        assert details["a"].get("notes", []) == ([] if count == 20 else [FEW])


def test_it_composes_with_folding_and_pruning() -> None:
    passes = ["fold-batch-norm", AldsPlus(0.3), "prune-channels:ratio=0.3"]
    found = fxcompress.compile(network(), passes, IMAGES)
    report = fxcompress.report(found)
    assert [p.verified for p in report.passes] == [True] * 3
    assert report.total.cr_p > 40
    assert found(IMAGES[:1]).shape == (1, 10)


def test_a_shared_layer_is_replaced_everywhere_and_counted_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(32, 32), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.a(self.a(x)))

    x = torch.randn(3, 32)
    found = fxcompress.compile(Net(), [Alds(0.5)], x)
    record = fxcompress.report(found).passes[-1]
    assert record.parameters_after <= 0.5 * record.parameters_before
    calls = [str(n.target) for n in found.graph.nodes if n.op == "call_module"]
    assert calls == ["a.encoder", "a.decoder"] * 2 + ["out"]


class Leaves(fx.Tracer):
    """Keeps every linear layer as one call, whatever class it is of."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, nn.Linear) or super().is_leaf_module(m, qualified_name)


class Odd(nn.Linear):
    """A subclass, which might do anything."""


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Sequential(Odd(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)), "subclass"),
        (tied, "tied or read elsewhere"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)), nn.Linear(16, 16)),
            "parametrizations",
        ),
    ],
)
def test_refusals(model: Any, reason: str) -> None:
    made = model()
    graph = fx.GraphModule(made, Leaves().trace(made))
    found = fxcompress.compile(graph, [Alds(0.1)], torch.randn(2, 16))
    assert any(reason in r.reason for r in fxcompress.report(found).passes[-1].refusals)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "above 0 and below 1"),
        ({"ratio": 1.0}, "above 0 and below 1"),
        ({"error": "operater"}, "did you mean 'operator'"),
        ({"solver": "best"}, "solver must be one of"),
        ({"measure": "bytes"}, "measure must be one of"),
        ({"schemes": (4,)}, "schemes are some of"),
        ({"schemes": ()}, "schemes are some of"),
        ({"slices": 0}, "slices must be at least 1"),
        ({"per_layer": {"3": 1.0}}, "per_layer.*at least 0 and below 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Alds(**options)


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="near it: 9"):
        compress(Alds(0.3, exclude=("9x",)))
    with pytest.raises(PreconditionError, match=r"cannot be removed.*are gone"):
        compress(Alds(0.99))
    with pytest.raises(PreconditionError, match="pass `calibration`"):
        compress(Alds(0.3, error="activation"))
    broken = network()
    broken[3].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(PreconditionError, match="'3' is not finite"):
        compress(Alds(0.3), broken, verify=False)


@given(layer_and_input=layers(), data=st.data())
def test_matrices_give_the_weight_back(layer_and_input: tuple[Layer, Tensor], data: st.DataObject) -> None:
    layer, _ = layer_and_input
    folding = Folding.of(layer)
    scheme, slices = data.draw(st.sampled_from(SCHEMES)), data.draw(st.sampled_from(folding.all_slices()))
    assert torch.equal(folding.weight_of(layer, scheme, folding.matrices(layer, scheme, slices)), layer.weight)


def test_sensitivity_finds_the_layer_that_matters() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + 0.1 * self.b(x)

    x = torch.randn(64, 32)
    found = fxcompress.compile(Net(), [Alds(0.3, sensitivity=True)], x)
    details = {d["module"]: d for d in fxcompress.report(found).passes[-1].details}
    assert details["a"]["sensitivity"] == pytest.approx(1.0, rel=0.2)
    assert details["b"]["sensitivity"] == pytest.approx(0.01, rel=0.2)
    assert details["a"]["rank"] is None
    assert details["b"]["rank"] is not None


def test_the_ranks_can_be_drawn(tmp_path: Path) -> None:
    found, _ = compress(AldsPlus(0.5))
    plot_ranks(fxcompress.report(found), tmp_path / "ranks.svg")
    text = (tmp_path / "ranks.svg").read_text()
    assert text.startswith("<?xml")
    with pytest.raises(UsageError, match="no low-rank pass"):
        plot_ranks(fxcompress.report(fxcompress.compile(network(), [], IMAGES)), tmp_path / "none.svg")


def test_a_latency_budget_keeps_what_is_not_faster() -> None:
    """With times that are made up: pairs of the layer '3' take longer than it, whatever their rank."""

    def made_up(layer: Any, choices: Any, specs: Any) -> np.ndarray:
        slow = isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)
        times = [1.0 if c is None else 2.0 if slow else 0.1 + c.rank / 100 for c in choices]
        return np.array(times)

    with (
        unittest.mock.patch.object(alds, "seconds_of", made_up),
        unittest.mock.patch.object(alds, "latency", return_value=Latency(6.0, 0.0, 6.0, 1)),
    ):
        _, record = compress(Alds(0.3, measure="latency"))
    details = {d["module"]: d for d in record.details}
    assert details["3"]["rank"] is None
    assert any(d["rank"] is not None for d in details.values())


def test_timings_are_real_and_kept() -> None:
    layer = nn.Linear(64, 64)
    choices = [None, Choice(0, 1, 4), Choice(0, 2, 4)]
    specs = [TensorSpec((2, 64), torch.float32, torch.device("cpu"))]
    first = seconds_of(layer, choices, specs)
    assert first.shape == (3,)
    assert (first > 0).all()
    assert (seconds_of(nn.Linear(64, 64), choices, specs) == first).all()


# --- what a reviewer found ---


@pytest.mark.parametrize("stride", [1, 2])
def test_the_mean_is_no_worse_than_without_data_in_transposed_convolutions(stride: int) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(16, 16, 2, stride=stride)
    x = torch.randn(8, 16, 6, 6) * 0.3 + 2
    errors = {}
    for error in ("frobenius", "activation"):
        pass_ = Alds(0.4, error=error, schemes=(3,), slices=1)
        found = fxcompress.compile(nn.Sequential(layer), [pass_], x, calibration=[x])
        errors[error] = float((found(x) - layer(x)).norm() / layer(x).norm())
    assert errors["activation"] < errors["frobenius"]


def test_no_second_moment_of_very_many_inputs() -> None:
    model, data = nn.Sequential(nn.Linear(12000, 8), nn.Linear(8, 8)).eval(), torch.randn(4, 12000)
    found = fxcompress.compile(model, [Alds(ratio=0.5, error="activation")], data, calibration=[data])
    (record,) = fxcompress.report(found).passes
    assert "second moment of 12000 inputs is too large" in record.details[0]["notes"][0]
    assert record.details[0]["rank"]


def test_data_that_do_not_vary_are_not_used() -> None:
    x = torch.randn(1, 32)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
    found = fxcompress.compile(model, [Alds(0.2, error="activation")], x, calibration=[x])
    record = fxcompress.report(found).passes[-1]
    assert record.parameters_after >= 0.7 * record.parameters_before
    assert all("does not vary" in d["notes"][0] for d in record.details)


class OfIntegers(nn.Sequential):
    """Gives the number of the largest output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)  # type: ignore[no-any-return]


class Masked(nn.Sequential):
    """Gives minus infinity beside what it works out."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y, torch.full_like(y, -torch.inf)], 1)


def test_sensitivity_of_odd_outputs() -> None:
    layers_ = (nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    x = torch.randn(8, 32)
    with pytest.raises(PreconditionError, match="no finite floating-point"):
        fxcompress.compile(OfIntegers(*layers_), [Alds(0.2, sensitivity=True)], x)
    found = fxcompress.compile(Masked(*layers_), [Alds(0.2, sensitivity=True)], x, verify=False)
    details = fxcompress.report(found).passes[-1].details
    assert all(0 < d["sensitivity"] < 100 for d in details)


def test_layers_without_effect_are_not_given_up() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    nn.init.zeros_(model[2].weight)
    found = fxcompress.compile(model, [Alds(0.2, sensitivity=True)], torch.randn(8, 32))
    record = fxcompress.report(found).passes[-1]
    assert next(d for d in record.details if d["module"] == "0")["rank"] is None


def test_what_is_overwritten_before_it_is_read_is_not_observed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h.relu_()
            return self.b(h)  # type: ignore[no-any-return]

    x = torch.randn(100, 16)
    found = fxcompress.compile(fx.symbolic_trace(Net()), [Alds(0.2, error="activation")], x, calibration=[x])
    notes = {d["module"]: d.get("notes") for d in fxcompress.report(found).passes[-1].details}
    assert notes["a"] is None
    assert "overwritten" in notes["b"][0]


def test_patterns_look_at_every_path_of_a_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.y = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.y(self.x(self.x(x)))  # type: ignore[no-any-return]

    graph = fx.symbolic_trace(Net())
    graph.again = graph.x
    list(graph.graph.nodes)[2].target = "again"
    graph.recompile()
    for pattern in ("x", "again"):
        found = fxcompress.compile(graph, [Alds(0.2, exclude=(pattern,))], torch.randn(3, 32))
        assert [d["module"] for d in fxcompress.report(found).passes[-1].details] == ["y"]
    for option in ("exclude", "only"):
        with pytest.raises(UsageError, match="tuple of patterns"):
            Alds(0.5, **{option: "10"})  # type: ignore[arg-type]


def test_a_stream_of_calibration_data_is_read_as_often_as_needed() -> None:
    stream = (batch for batch in [IMAGES, IMAGES + 1])
    pass_ = Alds(0.3, error="activation", sensitivity=True)
    _, record = compress(pass_, calibration=stream, verify=False)
    assert any(d["rank"] is not None for d in record.details)


def test_calibration_data_that_are_not_finite() -> None:
    with pytest.raises(PreconditionError, match="'0' reads on the calibration data is not finite"):
        compress(Alds(0.3, error="activation"), calibration=[IMAGES * torch.nan])


def test_no_random_numbers_are_drawn() -> None:
    model, layer = network(), nn.Linear(16, 16)
    before = torch.get_rng_state()
    compress(Alds(0.3, error="activation"), model, calibration=[IMAGES])
    seconds_of(layer, [None, Choice(0, 1, 2)], [TensorSpec((3, 16), torch.float32, torch.device("cpu"))])
    assert torch.equal(torch.get_rng_state(), before)
