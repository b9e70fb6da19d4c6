"""FoldBatchNorm: numbers worked out by hand, every refusal, and equality in float64 over random layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

import fxcompress
from fxcompress.pass_base import PassContext, Site
from fxcompress.passes.fold_batch_norm import FoldBatchNorm
from tests.passes.driver import apply, calls, error, randomise, reasons, refused

EXACT = 1e-13
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BATCH_NORM: Any = nn.modules.batchnorm._BatchNorm


def seq(*modules: nn.Module) -> nn.Module:
    return randomise(nn.Sequential(*modules)).double()


def folds(model: nn.Module, *inputs: Tensor, left: int = 0) -> fx.GraphModule:
    """Fold, and check that the function is the same and how many batch norm calls are left."""
    gm, applied = apply(FoldBatchNorm(), model, *inputs)
    assert applied.sites
    assert calls(gm, BATCH_NORM) == left
    assert error(model, gm, *inputs) < EXACT
    return gm


# --- by hand ---


def hand_norm() -> nn.BatchNorm1d:
    """a = 6 / sqrt(8.75 + 0.25) = 2 and s = 1 - 2 * 3 = -5; a = -1 / sqrt(0.25) = -2 and s = 0 - (-2)(0.5) = 1."""
    norm = nn.BatchNorm1d(2, eps=0.25).eval()
    norm.running_mean, norm.running_var = torch.tensor([3.0, 0.5]), torch.tensor([8.75, 0.0])
    norm.weight.data, norm.bias.data = torch.tensor([6.0, -1.0]), torch.tensor([1.0, 0.0])
    return norm


def test_after_by_hand() -> None:
    linear = nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0])
    gm, applied = apply(FoldBatchNorm(), nn.Sequential(linear, hand_norm()), torch.zeros(1, 2))
    folded = gm.get_submodule("0")
    assert torch.equal(folded.weight, torch.tensor([[2.0, 4.0], [-6.0, -8.0]]))  # rows times 2 and -2
    assert torch.equal(folded.bias, torch.tensor([15.0, -39.0]))  # 2 * 10 - 5 and -2 * 20 + 1
    assert applied.sites[0].detail == {"conv": "0", "batch_norm": "1", "direction": "after", "calls": 1}
    assert dict(gm.named_children()).keys() == {"0"}


def test_before_by_hand() -> None:
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    gm, applied = apply(FoldBatchNorm(), nn.Sequential(hand_norm(), linear), torch.zeros(1, 2))
    folded = gm.get_submodule("1")
    assert torch.equal(folded.weight, torch.tensor([[2.0, -4.0], [6.0, -8.0]]))  # columns times 2 and -2
    assert torch.equal(folded.bias, torch.tensor([-3.0, -11.0]))  # 1(-5) + 2(1) and 3(-5) + 4(1)
    assert applied.sites[0].detail["direction"] == "before"
    assert list(gm.state_dict()) == ["1.weight", "1.bias"]


# --- equality over random layers ---


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A convolution of any kind, or a linear layer, and its number of spatial dimensions."""
    dims = draw(st.integers(0, 3))
    bias = draw(st.booleans())
    if dims == 0:
        return nn.Linear(draw(st.integers(1, 5)), draw(st.integers(1, 5)), bias), 0
    groups = draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    if draw(st.booleans()):
        options = {
            "output_padding": draw(st.integers(0, max(stride, dilation) - 1)),
            "padding": draw(st.integers(0, 1)),
        }
        layer: Any = TRANSPOSED[dims - 1]
    else:
        mode = draw(st.sampled_from(("zeros", "reflect", "replicate", "circular")))
        padding = draw(st.sampled_from((0, 1, "valid") + (("same",) if stride == 1 else ())))
        options, layer = {"padding": padding, "padding_mode": mode}, CONVS[dims - 1]
    options |= {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    return layer(inputs, outputs, kernel, **options), dims


def widths(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


@given(layers(), st.booleans(), st.integers(0, 99))
def test_after_any_layer(drawn: tuple[nn.Module, int], affine: bool, seed: int) -> None:
    layer, dims = drawn
    inputs, outputs = widths(layer)
    model = seq(layer, NORMS[max(dims, 1) - 1](outputs, affine=affine, eps=0.1))
    torch.manual_seed(seed)
    gm = folds(randomise(model, seed), torch.randn(2, inputs, *(6,) * dims, dtype=torch.float64))
    assert list(gm.state_dict()) == ["0.weight", "0.bias"]


def spoils_border(layer: Any) -> bool:
    """By trying it: whether a constant input comes out of the layer other than constant, its bias aside."""
    if isinstance(layer, nn.Linear):
        return False
    inputs, dims = widths(layer)[0], layer.weight.dim() - 2
    with torch.no_grad():
        seen = layer.double()(torch.ones(1, inputs, *(9,) * dims, dtype=torch.float64)).flatten(2)
    return bool((seen - seen[..., :1]).abs().max() > 1e-9)


@given(layers(), st.booleans(), st.integers(0, 99))
def test_before_any_layer(drawn: tuple[nn.Module, int], affine: bool, seed: int) -> None:
    layer, dims = drawn
    inputs, _ = widths(layer)
    model = seq(NORMS[max(dims, 1) - 1](inputs, affine=affine, eps=0.1), layer)
    torch.manual_seed(seed)
    x = torch.randn(2, inputs, *(6,) * dims, dtype=torch.float64)
    if spoils_border(layer):
        reason = refused(FoldBatchNorm(), randomise(model, seed), x)
        assert "pads with zeros" in reason or "unevenly" in reason
    else:
        folds(randomise(model, seed), x)


@given(layers(), st.integers(0, 99))
def test_before_without_shift_any_layer(drawn: tuple[nn.Module, int], seed: int) -> None:
    layer, dims = drawn
    norm = NORMS[max(dims, 1) - 1](widths(layer)[0])
    model = randomise(nn.Sequential(norm, layer), seed).double()
    nn.init.zeros_(norm.bias)
    assert norm.running_mean is not None
    norm.running_mean.zero_()
    had_bias = "1.bias" in model.state_dict()
    gm = folds(model, torch.randn(2, widths(layer)[0], *(6,) * dims, dtype=torch.float64))
    assert ("1.bias" in gm.state_dict()) == had_bias


# --- what else must stay right ---


def test_chains_of_batch_norms_fold_from_both_sides() -> None:
    model = seq(
        nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()
    )
    folds(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))).to(dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    gm, applied = apply(FoldBatchNorm(), model, x)
    assert len(applied.sites) == 1
    assert all(p.dtype == dtype for p in gm.parameters())
    # one rounding of the weights, and one each of the outputs of convolution and batch norm
    assert error(model.double(), gm.double(), x.double()) < 4 * torch.finfo(dtype).eps


def test_parameters_keep_their_kind_and_the_old_ones_their_values() -> None:
    model = seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gm = fx.symbolic_trace(model)  # which shares its parameters with the model
    applied = apply(FoldBatchNorm(), gm, torch.randn(1, 3, 8, 8, dtype=torch.float64))[0]
    weight, bias = applied.get_parameter("0.weight"), applied.get_parameter("0.bias")
    assert (weight.requires_grad, bias.requires_grad) == (False, True)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rewriting_a_graph_that_shares_tensors_leaves_them_alone() -> None:
    model = seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gm = fx.symbolic_trace(model)
    tensors = dict(gm.named_parameters())
    for site in FoldBatchNorm().sites(PassContext(gm)):
        assert isinstance(site, Site)
        FoldBatchNorm().rewrite(site)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_layer_takes_the_place_of_a_batch_norm_before_it() -> None:
    class InPlaceBetween(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = self.norm(x)
            x.add_(100)
            return self.conv(y) + x.mean()

    folds(randomise(InPlaceBetween()).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64))


class Shared(nn.Module):
    """conv and norm at several calls; ``plan`` says for each call of conv which norm follows."""

    def __init__(self, plan: tuple[str, ...]) -> None:
        super().__init__()
        self.plan = plan
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.plan:
            x = self.conv(x)
            if norm:
                x = getattr(self, norm)(x)
        return x


def test_shared_layer_with_one_batch_norm_folds_once() -> None:
    model = randomise(Shared(("first", "first", "first"))).double()
    folds(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))


def test_layer_shared_under_another_path_folds_once() -> None:
    model = fx.symbolic_trace(randomise(Shared(("first", "first", "first"))).double())
    model.add_module("alias", model.get_submodule("conv"))
    second = [n for n in model.graph.nodes if n.target == "conv"][1]
    second.target = "alias"
    model.recompile()
    gm = folds(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert gm.get_submodule("conv") is gm.get_submodule("alias")


@pytest.mark.parametrize("plan", [("first", "second"), ("first", ""), ("", "first"), ("first", "first", "")])
def test_shared_layer_with_several_fates_is_refused(plan: tuple[str, ...]) -> None:
    reason = refused(FoldBatchNorm(), randomise(Shared(plan)), torch.randn(1, 3, 8, 8))
    assert f"shared by {len(plan)} calls" in reason


def test_batch_norm_shared_by_two_layers_folds_into_each() -> None:
    norm = nn.BatchNorm2d(4)
    folds(
        seq(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), norm),
        torch.randn(2, 3, 8, 8, dtype=torch.float64),
    )


def test_batch_norm_shared_with_a_place_that_cannot_fold_stays_there() -> None:
    norm = nn.BatchNorm2d(4)
    folds(
        seq(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), norm, nn.ReLU()),
        torch.randn(2, 3, 8, 8, dtype=torch.float64),
        left=1,
    )


# --- refusals ---


def conv_norm(**norm: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **norm))
    randomise(model)
    return model


X = torch.randn(2, 3, 8, 8)


def test_training_mode_is_refused() -> None:
    assert "training mode" in refused(FoldBatchNorm(), conv_norm().train(), X)


def test_no_running_statistics_is_refused() -> None:
    assert "track_running_stats=False" in refused(FoldBatchNorm(), conv_norm(track_running_stats=False), X)


def test_nan_is_refused() -> None:
    model = conv_norm()
    model[1].running_var[2] = math.nan  # type: ignore[index, union-attr]
    assert "running_var holds NaN" in refused(FoldBatchNorm(), model, X)


def test_zero_variance_folds_with_eps_and_is_refused_without() -> None:
    model = conv_norm().double()
    model[1].running_var.zero_()  # type: ignore[union-attr, operator]
    folds(model, X.double())
    model[1].eps = 0.0  # type: ignore[assignment]
    assert "not positive" in refused(FoldBatchNorm(), model, X.double())


def test_neighbours_that_are_no_layers_are_named() -> None:
    reason = refused(FoldBatchNorm(), seq(nn.ReLU(), nn.BatchNorm2d(3), nn.Sigmoid()), X.double())
    assert "follows ReLU '0'" in reason
    assert "precedes Sigmoid '2'" in reason


class Branch(nn.Module):
    """The convolution's output goes to ``norms`` batch norms and, if asked, on its own."""

    def __init__(self, norms: int, raw: bool) -> None:
        super().__init__()
        self.conv, self.raw = nn.Conv2d(3, 4, 3), raw
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.conv(x)
        return [norm(y) for norm in self.norms] + ([y] if self.raw else [])


@pytest.mark.parametrize(("norms", "raw"), [(1, True), (2, False)])
def test_layer_with_other_readers_is_refused(norms: int, raw: bool) -> None:
    assert "has 2 readers" in refused(FoldBatchNorm(), randomise(Branch(norms, raw)), X)


def test_batch_norm_with_other_readers_is_refused_before_a_layer() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.conv(y) + y

    assert "read by 2 nodes" in refused(FoldBatchNorm(), randomise(Fork()), X)


def test_zero_padding_with_a_shift_is_refused() -> None:
    model = seq(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    assert "pads with zeros" in refused(FoldBatchNorm(), model, X.double())


def test_transposed_layer_with_a_shift_is_refused() -> None:
    model = seq(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3))
    assert "unevenly" in refused(FoldBatchNorm(), model, X.double())


def test_transposed_layer_with_an_output_size_is_refused_before() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(x), [8, 8])

    assert "further arguments" in refused(FoldBatchNorm(), randomise(Sized()), X)


def test_hooks_are_refused() -> None:
    model = conv_norm()
    model[0].register_forward_hook(lambda module, args, output: None)
    assert "Conv2d '0', which has hooks" in refused(FoldBatchNorm(), model, X)
    model = conv_norm()
    model[1].register_forward_pre_hook(lambda module, args: None)
    assert "it has hooks" in refused(FoldBatchNorm(), model, X)


def test_forward_of_its_own_is_refused() -> None:
    gm = fx.symbolic_trace(conv_norm())
    gm.get_submodule("0").forward = torch.nn.functional.relu  # type: ignore[assignment]
    assert "`forward` of its own" in refused(FoldBatchNorm(), gm)


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_parametrizations_are_refused() -> None:
    model = conv_norm()
    parametrizations.weight_norm(model[0])
    gm = fx.GraphModule(model, _leaf_graph(model))
    assert "has parametrizations" in refused(FoldBatchNorm(), gm, X)
    model = conv_norm()
    parametrize.register_parametrization(model[1], "weight", _Double())
    gm = fx.GraphModule(model, _leaf_graph(model))
    assert "subclass" in refused(FoldBatchNorm(), gm, X) or "parametrizations" in refused(FoldBatchNorm(), gm, X)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_weight_norm_is_refused() -> None:
    model = conv_norm()
    torch.nn.utils.weight_norm(model[0])
    with torch.no_grad():
        model(X)  # torch copies no weight that hangs on an autograd graph
    assert "old weight_norm" in refused(FoldBatchNorm(), fx.GraphModule(model, _leaf_graph(model)))


class MyConv(nn.Conv2d):
    """A subclass that squares."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class MyNorm(nn.BatchNorm2d):
    """A subclass with an activation, as timm has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def _leaf_graph(model: nn.Sequential) -> fx.Graph:
    graph = fx.Graph()
    value = graph.placeholder("x")
    for name, _ in model.named_children():
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


@pytest.mark.parametrize(
    ("model", "who"),
    [
        (nn.Sequential(MyConv(3, 4, 3), nn.BatchNorm2d(4)), "MyConv '0', a subclass"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), MyNorm(4)), "MyNorm is a subclass"),
    ],
)
def test_subclasses_are_refused(model: nn.Sequential, who: str) -> None:
    assert who in refused(FoldBatchNorm(), fx.GraphModule(randomise(model), _leaf_graph(model)), X)


def test_tied_weights_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self, read: bool) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)
            self.read = read
            if not read:
                self.other.weight = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.other(self.norm(self.conv(x)).relu())
            return y + self.conv.weight.sum() if self.read else y

    assert "tied or read elsewhere (other.weight" in refused(FoldBatchNorm(), randomise(Tied(False)), X)
    assert "tied or read elsewhere (node" in refused(FoldBatchNorm(), randomise(Tied(True)), X)


def test_complex_weights_are_refused() -> None:
    model = conv_norm()
    model[0].weight = nn.Parameter(model[0].weight.to(torch.complex64))  # type: ignore[union-attr, operator]
    assert "dtype torch.complex64" in refused(FoldBatchNorm(), model)


def test_parameters_that_are_no_parameters_are_refused() -> None:
    model = conv_norm()
    weight = model[0].weight
    del model[0].weight
    model[0].register_buffer("weight", weight.detach())  # type: ignore[arg-type]
    assert "weight of type Tensor" in refused(FoldBatchNorm(), model, X)


def test_overflow_of_float16_is_refused() -> None:
    model = conv_norm().half()
    model[0].weight.data.fill_(1000)  # type: ignore[union-attr, operator]
    model[1].weight.data.fill_(1000)  # type: ignore[union-attr, operator]
    assert "overflow float16" in refused(FoldBatchNorm(), model, X.half())


def test_a_batch_norm_over_another_dimension_is_refused() -> None:
    # (N, L, C): the batch norm runs over L, which is as long as C here
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    assert "sees 3 dimensions" in refused(FoldBatchNorm(), model, torch.randn(2, 4, 4))
    assert "give example inputs" in refused(FoldBatchNorm(), model)
    # an unbatched (C, L), whose dimension 1 is L
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)).eval()
    assert "sees 2 dimensions" in refused(FoldBatchNorm(), model, torch.randn(4, 4))
    # (N, H, W, C): the batch norm runs over H
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(4)).eval()
    assert "sees 4 dimensions" in refused(FoldBatchNorm(), model)


def test_another_number_of_channels_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3)).eval()
    assert "5 channels on this side and the batch norm 3" in refused(FoldBatchNorm(), model, torch.randn(2, 3, 4))


def test_functional_batch_norm_is_refused() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.batch_norm(x, self.norm.running_mean, self.norm.running_var)

    assert "called as a function" in refused(FoldBatchNorm(), Functional().eval(), X)


class Standardised(nn.Conv2d):
    """A convolution of a weight that is normalised in each run, as in ResNets V2."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-8).reshape_as(
            self.weight
        )
        return nn.functional.conv2d(x, weight, self.bias)


def test_the_standardisation_of_weights_is_no_batch_norm() -> None:
    assert "no running statistics" in refused(FoldBatchNorm(), Standardised(3, 4, 3).eval(), X)


def test_folding_needs_no_example_where_the_rank_is_certain() -> None:
    gm, applied = apply(FoldBatchNorm(), conv_norm())
    assert len(applied.sites) == 1
    assert reasons(applied) == ""
    assert calls(gm, BATCH_NORM) == 0


def test_sync_batch_norm_folds() -> None:
    folds(seq(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)), X.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_end_to_end(dtype: torch.dtype) -> None:
    class Functional(nn.Module):
        """Its batch norm is a function until tracing makes it a module."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm
            y = torch.nn.functional.conv1d(x, self.conv.weight)
            return torch.nn.functional.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, self.training)

    model = randomise(Functional()).to(dtype).eval()
    gm = fxcompress.compile(model, ["fold-batch-norm"], example_inputs=torch.randn(2, 3, 8, dtype=dtype))
    record = fxcompress.report(gm).passes[0]
    assert (record.sites, record.verified) == (1, True)
    assert record.error is not None
    assert record.error < EXACT
    assert calls(gm, BATCH_NORM) == 0
    assert {p.dtype for p in gm.parameters()} == {dtype}
