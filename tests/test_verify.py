"""Verification: what each guarantee demands, and planted wrong passes that it must catch."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress import Example, Guarantee, Pass, PassContext, PreconditionError, Refusal, Site, VerificationError
from fxcompress.analysis.outputs import compare, non_finite, relative_error, tensor_leaves
from fxcompress.apply import apply_pass
from fxcompress.calibration import as_batches
from fxcompress.double import double_graph
from fxcompress.editing import private_copy, set_attribute
from fxcompress.verify import Change, Verdict, verify

# ------------------------------------------------------------------------------------------------ outputs of any kind


@dataclasses.dataclass
class Record:
    logits: Any
    note: str = "a"


class Cache:
    def __init__(self, keys: Any) -> None:
        self.keys = keys
        self.itself = self


def test_tensors_in_outputs_of_any_kind() -> None:
    t = [torch.tensor(float(i)) for i in range(6)]
    value = (t[0], [t[1], {"a": t[2], 3: None}], Record(t[3]), Cache([t[4]]), torch.max(t[5].view(1), 0))
    found = dict(tensor_leaves(value))
    assert list(found) == [
        "output[0]",
        "output[1][0]",
        "output[1][1]['a']",
        "output[2].logits",
        "output[3].keys[0]",
        "output[4][0]",
        "output[4][1]",
    ]
    assert all(found[name] is wanted for name, wanted in zip(found, t[:5], strict=False))


def test_relative_error_is_relative_to_the_largest_value() -> None:
    a = torch.tensor([100.0, 1e-6])
    assert relative_error(a, a) == 0.0
    assert relative_error(a, torch.tensor([99.0, 1e-6])) == pytest.approx(0.01)
    assert relative_error(a, torch.tensor([100.0, 0.0])) < 1e-7
    assert relative_error(torch.zeros(2), torch.tensor([0.0, 0.5])) == 0.5
    assert relative_error(torch.ones(0), torch.ones(0)) == 0.0


def test_nan_and_infinity_never_pass() -> None:
    inf, nan = math.inf, math.nan
    assert relative_error(torch.tensor([-inf, 2.0]), torch.tensor([-inf, 1.0])) == 0.5
    for a, b in [
        ([nan, 1], [nan, 1]),
        ([1, 1], [nan, 1]),
        ([inf, 1], [-inf, 1]),
        ([inf, 1], [1, 1]),
        ([1, 1], [inf, 1]),
    ]:
        assert relative_error(torch.tensor(a), torch.tensor(b)) == inf
    assert non_finite([torch.ones(1), {"a": torch.tensor([nan])}]) == "output[1]['a']"
    assert non_finite(torch.tensor([inf])) is None
    assert non_finite(torch.tensor([inf]), infinite=True) == "output"


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (torch.ones(2), torch.ones(3), "output: expected shape (2,), found (3,)"),
        (torch.ones(2), torch.ones(2).double(), "output: expected torch.float32, found torch.float64"),
        ((torch.ones(2),), [torch.ones(2)], "output: expected tuple, found list"),
        ({"a": 1, "b": 2}, {"a": 1}, "output['b'] is missing"),
        ([1], [1, 2], "output[1] is new"),
        (Record(1), Record(1, note="b"), "output.note: expected 'a', found 'b'"),
        (None, torch.ones(1), "output: expected NoneType, found Tensor"),
        (1, True, "output: expected int, found bool"),
    ],
)
def test_structural_differences(a: Any, b: Any, says: str) -> None:
    assert says in compare(a, b).structural
    assert compare(a, copy.deepcopy(a)) == compare(b, copy.deepcopy(b))
    assert not compare(a, copy.deepcopy(a)).structural


def test_discrete_and_worst() -> None:
    a = {"ids": torch.tensor([1, 2]), "mask": torch.tensor([True]), "x": torch.ones(2), "y": torch.ones(2), "f": 2.0}
    b = {**a, "ids": torch.tensor([1, 3]), "x": torch.tensor([1.0, 0.5]), "y": torch.tensor([1.0, 0.9]), "f": 1.5}
    found = compare(a, b)
    assert found.discrete == ("output['ids'] (torch.int64) differs in 1 of 2 elements",)
    assert (found.error, found.where, found.structural) == (0.5, "output['x']", ())


# ----------------------------------------------------------------------------------------------------- passes to judge


@dataclasses.dataclass(frozen=True)
class EachLinear(Pass):
    """Does ``how`` to the linear layer at every site."""

    how: Callable[[nn.Linear], None]
    bound: float | None = None
    name: ClassVar[str] = "each-linear"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        for node in context.gm.graph.nodes:
            if isinstance(context.module(node), nn.Linear):
                yield Site(node)

    def rewrite(self, site: Site) -> Mapping[str, Any] | None:
        owner = site.node.graph.owning_module
        assert owner is not None
        layer = owner.get_submodule(str(site.node.target))
        assert isinstance(layer, nn.Linear)
        self.how(layer)
        return None

    def error_bound(self) -> float | None:
        return self.bound


@dataclasses.dataclass(frozen=True)
class Approximately(EachLinear):
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE


@dataclasses.dataclass(frozen=True)
class ForRetraining(EachLinear):
    guarantee: ClassVar[Guarantee] = Guarantee.RETRAIN


def nothing(layer: nn.Linear) -> None:
    """A right pass: the layer computes what it did."""
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def drop_bias(layer: nn.Linear) -> None:
    layer.bias = None


def scale_a_little(layer: nn.Linear) -> None:
    layer.weight.mul_(1 + 1e-6)


def scale_a_little_where_it_fits(layer: nn.Linear) -> None:
    """Wrong in float64 only."""
    if layer.weight.dtype == torch.float64:
        layer.weight.mul_(1.5)


def scale_in_own_dtype(layer: nn.Linear) -> None:
    """Right in float64, wrong where it counts."""
    if layer.weight.dtype != torch.float64:
        layer.weight.mul_(1.01)


def make_nan(layer: nn.Linear) -> None:
    layer.weight[0, 0] = math.nan


def overflow(layer: nn.Linear) -> None:
    """What folding may do in float16: fine in float64, infinite in the dtype of the model."""
    if layer.weight.dtype == torch.float16:
        layer.weight.fill_(60000).mul_(2)


def drop_a_row(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight[:-1].clone())
    layer.bias = nn.Parameter(layer.bias[:-1].clone())


def to_float64(layer: nn.Linear) -> None:
    layer.double()


def make_infinite(layer: nn.Linear) -> None:
    if layer.out_features == 3:  # the last one
        layer.bias.fill_(math.inf)


def freeze(layer: nn.Linear) -> None:
    layer.weight.requires_grad_(False)


def detach(layer: nn.Linear) -> None:
    layer.register_parameter("extra", nn.Parameter(torch.ones(1)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.b(torch.relu(self.a(x)))}


def judge(model: nn.Module, pass_: Pass, *args: Any, data: list[Any] | None = None) -> Verdict:
    before = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    after = private_copy(before)
    example = Example(args)
    batches = None if data is None else as_batches(data)
    applied = apply_pass(pass_, after, example, batches, lambda event: None)
    state = {k: v.clone() for k, v in after.state_dict().items()}
    random = torch.get_rng_state()
    try:
        return verify(Change(pass_, before, after, tuple(s.node for s in applied.sites), example, batches))
    finally:
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(v.nan_to_num(), state[k].nan_to_num()) for k, v in after.state_dict().items())
        assert all(p.grad is None for p in after.parameters())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


X = torch.linspace(-2, 2, 20).view(5, 4)

# --------------------------------------------------------------------------------------------------------------- exact


def test_a_right_pass_is_proved() -> None:
    verdict = judge(Net(), EachLinear(nothing), X)
    assert verdict.verified
    assert verdict.error == 0.0
    assert verdict.error_in_dtype == 0.0
    assert "the example inputs, fresh inputs, a larger batch" in verdict.how
    assert verdict.warnings == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("defect", [drop_bias, scale_a_little, scale_a_little_where_it_fits])
def test_wrong_passes_are_caught(defect: Callable[[nn.Linear], None], dtype: torch.dtype) -> None:
    with pytest.raises(VerificationError) as caught:
        judge(Net().to(dtype), EachLinear(defect), X.to(dtype))
    message = str(caught.value)
    for part in ("'each-linear' (exact)", "output['logits'] differs by", "on the example inputs", "It rewrote a, b"):
        assert part in message


class Chaos(nn.Module):
    """A linear layer, and the logistic map: what goes in is amplified by 2 in each of so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.linear, self.steps = nn.Linear(4, 6), steps

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.linear(x))
        for _ in range(self.steps):
            x = 4 * x * (1 - x)
        return x


def round_otherwise(layer: nn.Linear) -> None:
    layer.weight.mul_(1 + 4 * torch.finfo(layer.weight.dtype).eps)


def test_rounding_that_a_network_amplifies_is_no_defect_of_a_pass() -> None:
    for steps, least in ((22, 1e-9), (32, 1e-6)):
        verdict = judge(Chaos(steps), EachLinear(round_otherwise), X)
        assert verdict.verified
        assert verdict.error is not None
        assert verdict.error > least
        assert "(at most 1e-09)" not in verdict.how
        with pytest.raises(VerificationError, match="differs by"):
            judge(Chaos(steps), EachLinear(scale_a_little), X)
    with pytest.raises(VerificationError, match="at most 1e-09"):
        judge(Chaos(2), EachLinear(scale_a_little), X)


def test_float32_would_hide_what_float64_shows() -> None:
    model = Net()
    before, after = model(X)["logits"], Net()
    after.load_state_dict(model.state_dict())
    with torch.no_grad():
        scale_a_little(after.b)
    assert relative_error(before, after(X)["logits"]) < 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_pass_that_is_right_in_float64_only(dtype: torch.dtype) -> None:
    def tenfold(layer: nn.Linear) -> None:
        if layer.weight.dtype != torch.float64:
            layer.weight.mul_(10)

    with pytest.raises(VerificationError, match="in the model's own dtype, which is no rounding"):
        judge(Net().to(dtype), EachLinear(tenfold), X.to(dtype))


def test_a_percent_is_no_rounding_in_float32() -> None:
    with pytest.raises(VerificationError, match="own dtype"):
        judge(Net(), EachLinear(scale_in_own_dtype), X)


def test_overflow_in_float16() -> None:
    with pytest.raises(VerificationError, match=r"float64 copy|differs by inf|gives NaN"):
        judge(Net().half(), EachLinear(overflow), X.half())


@pytest.mark.parametrize("guarantee", [EachLinear, Approximately, ForRetraining])
def test_nan_passes_nothing(guarantee: type[EachLinear]) -> None:
    with pytest.raises(VerificationError, match=r"gives NaN at output\['logits'\] on the example inputs"):
        judge(Net(), guarantee(make_nan), X)


@pytest.mark.parametrize("guarantee", [EachLinear, Approximately, ForRetraining])
def test_a_reference_with_nan_is_refused(guarantee: type[EachLinear]) -> None:
    with pytest.raises(PreconditionError, match=r"gives NaN at output\['logits'\] .* before pass"):
        judge(Net(), guarantee(nothing), torch.full((2, 4), math.nan))


@pytest.mark.parametrize("guarantee", [EachLinear, Approximately, ForRetraining])
@pytest.mark.parametrize(
    ("defect", "says"),
    [
        (drop_a_row, r"expected shape \(5, 4\), found \(5, 3\)"),
        (to_float64, "fails on the example inputs: RuntimeError"),
    ],
)
def test_other_shapes_and_dtypes(guarantee: type[EachLinear], defect: Any, says: str) -> None:
    with pytest.raises(VerificationError, match=says):
        judge(nn.Sequential(nn.Linear(4, 4)), guarantee(defect), X)


@dataclasses.dataclass(frozen=True)
class Retarget(Pass):
    """Lets every node that calls ``old`` call ``new``."""

    old: Any
    new: Any
    name: ClassVar[str] = "retarget"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        yield from (Site(node) for node in context.gm.graph.nodes if node.target is self.old)

    def rewrite(self, site: Site) -> None:
        site.node.target = self.new


class Pick(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.argmax(x, 1), x


def test_integer_outputs_must_be_equal() -> None:
    with pytest.raises(VerificationError, match=r"output\[0\] \(torch.int64\) differs in 5 of 5 elements"):
        judge(Pick(), Retarget(torch.argmax, torch.argmin), X)


def test_another_batch_size_shows_what_the_example_hides() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.flatten(x, 1) * x.size(0)

    def five(x: Tensor, dim: int) -> int:
        return 5

    before = fx.symbolic_trace(Flat())
    after = private_copy(before)
    size = next(n for n in after.graph.nodes if n.target == "size")
    size.op, size.target = "call_function", five

    @dataclasses.dataclass(frozen=True)
    class Bake(Pass):
        name: ClassVar[str] = "bake"
        guarantee: ClassVar[Guarantee] = Guarantee.EXACT

        def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
            yield from (Site(node) for node in context.gm.graph.nodes if node.target == "size")

        def rewrite(self, site: Site) -> None:
            site.node.op, site.node.target = "call_function", five

    with pytest.raises(VerificationError, match="on a larger batch"):
        judge(before, Bake(), X)


@pytest.mark.parametrize("given", [Guarantee.APPROXIMATE, Guarantee.RETRAIN])
@pytest.mark.parametrize("sizes", [(5, 2), (5, -1)])
def test_a_batch_size_that_became_fixed(given: Guarantee, sizes: tuple[int, ...]) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).reshape(x.size(0), 2)

    @dataclasses.dataclass(frozen=True)
    class Fix(Pass):
        name: ClassVar[str] = "fix"
        guarantee = given

        def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
            yield from (Site(node) for node in context.gm.graph.nodes if node.target == "reshape")

        def rewrite(self, site: Site) -> None:
            site.node.args = (site.node.args[0], *sizes)

    with pytest.raises(VerificationError, match="on a larger batch"):
        judge(Rows(), Fix(), X)


def test_a_fixed_batch_size_is_no_error() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).view(5, 2)

    for pass_ in (EachLinear(nothing), Approximately(nothing), ForRetraining(nothing)):
        verdict = judge(Fixed(), pass_, X)
        assert verdict.verified
        assert "larger batch" not in verdict.how


def test_dtypes_that_the_graph_names_become_float64() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("scale", torch.full((1,), 1 / 3))

        def forward(self, x: Tensor) -> Any:
            h = self.a(x).half().float().to(torch.float32) * self.scale
            grid = torch.linspace(0.0, 1.0, 4) + torch.arange(4, dtype=torch.float32) / 3
            return torch.softmax(h + grid, -1, dtype=torch.float32), x.to(torch.int32)

    gm = fx.symbolic_trace(Casts())
    copied = double_graph(gm)
    assert {str(n.target) for n in copied.graph.nodes if n.op == "call_method"} == {"double", "to"}
    assert "float32" not in copied.code
    verdict = judge(gm, EachLinear(nothing), X)
    assert verdict.verified
    with pytest.raises(VerificationError, match=r"in float64, .* differs by"):
        judge(gm, EachLinear(scale_a_little), X)


class OwnPrecision(nn.Module):
    """A leaf with a dtype of its own inside, as some normalisations of third parties have."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() / 3).to(x.dtype)


class LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, OwnPrecision) or super().is_leaf_module(m, module_qualified_name)


def with_leaf(leaf: nn.Module) -> fx.GraphModule:
    model = nn.Sequential(nn.Linear(4, 4), leaf, nn.Linear(4, 2))
    return fx.GraphModule(model, LeafTracer().trace(model))


def test_a_leaf_that_leaves_float64_is_said_to() -> None:
    def scale_by_less_than_float32_sees(layer: nn.Linear) -> None:
        layer.weight.mul_(1 + 1e-8)

    verdict = judge(with_leaf(OwnPrecision()), EachLinear(scale_by_less_than_float32_sees), X)
    assert not verdict.verified
    assert "not proved: something inside the graph computes in torch.float32" in verdict.how
    assert verdict.error is None
    assert verdict.error_in_dtype is not None
    assert verdict.warnings[-1] == verdict.how
    assert judge(with_leaf(OwnPrecision()), EachLinear(nothing), X).verified
    with pytest.raises(VerificationError, match="own dtype"):
        judge(with_leaf(OwnPrecision()), EachLinear(drop_bias), X)


class Float32Only(OwnPrecision):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return x


def test_a_graph_that_cannot_run_in_float64_is_compared_as_it_is() -> None:
    verdict = judge(with_leaf(Float32Only()), EachLinear(nothing), X)
    assert not verdict.verified
    assert "does not run in float64 (TypeError: float32 only)" in verdict.how
    assert (verdict.error, verdict.error_in_dtype) == (None, 0.0)
    with pytest.raises(VerificationError, match="own dtype"):
        judge(with_leaf(Float32Only()), EachLinear(drop_bias), X)


@dataclasses.dataclass(frozen=True)
class NotInFloat64(EachLinear):
    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        for item in super().sites(context):
            if next(context.gm.parameters()).dtype == torch.float32 or item.node.name == "a":
                yield item


def test_a_proof_of_another_rewriting_is_none() -> None:
    with pytest.raises(VerificationError, match="float64 rerun, which is to prove it, leaves b alone"):
        judge(Net(), NotInFloat64(nothing), X)


def test_random_graphs_draw_the_same_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    assert judge(model, EachLinear(nothing), X).verified


def test_minus_infinity_is_a_legitimate_output() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.mask

    assert judge(Masked(), EachLinear(nothing), X).verified
    assert judge(Masked(), ForRetraining(nothing), X).verified


# --------------------------------------------------------------------------------------------------------- approximate


def to_half_and_back(layer: nn.Linear) -> None:
    layer.weight.copy_(layer.weight.half())


def test_an_approximation_is_measured_and_held_to_its_bound() -> None:
    verdict = judge(Net(), Approximately(to_half_and_back, bound=1e-2), X)
    assert verdict.verified
    assert 0 < verdict.error < 1e-2
    assert "at most 1.0e-02 declared" in verdict.how
    with pytest.raises(VerificationError, match=r"declares at most 1.0e-09"):
        judge(Net(), Approximately(to_half_and_back, bound=1e-9), X)
    assert "no bound declared" in judge(Net(), Approximately(drop_bias), X).how


def test_calibration_data_counts_too() -> None:
    easy, hard = torch.zeros(5, 4), torch.full((5, 4), 50.0)

    class Relu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + 1

    alone = judge(Relu(), Approximately(scale_in_own_dtype), easy)
    assert alone.error == 0.0
    assert judge(Relu(), Approximately(scale_in_own_dtype), easy, data=[easy, hard]).error > 1e-3
    with pytest.raises(VerificationError, match="on batch 1 of the calibration data"):
        judge(Relu(), Approximately(scale_in_own_dtype, bound=1e-4), easy, data=[easy, hard])


def test_other_labels_are_told_of_an_approximation() -> None:
    class Label(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.a(x).argmax(1)

    def negate(layer: nn.Linear) -> None:
        layer.weight.neg_()

    verdict = judge(Label(), Approximately(negate), X)
    assert verdict.verified
    assert "torch.int64" in verdict.warnings[0]


# ------------------------------------------------------------------------------------------------------------- retrain


def test_retraining_reports_any_error() -> None:
    verdict = judge(Net(), ForRetraining(drop_bias), X)
    assert verdict.verified
    assert verdict.error > 0.01
    assert "gradients reach every parameter" in verdict.how


@pytest.mark.parametrize(
    ("defect", "says"),
    [
        (make_infinite, "gives an infinity at output"),
        (freeze, "parameter 'a.weight' is frozen and none was before"),
        (detach, "no gradient reaches the parameter 'a.extra'"),
    ],
)
def test_what_cannot_be_retrained(defect: Any, says: str) -> None:
    with pytest.raises(VerificationError, match=says):
        judge(Net(), ForRetraining(defect), X)


def test_parameters_that_were_frozen_or_unreached_may_stay_so() -> None:
    model = Net()
    model.a.weight.requires_grad_(False)
    model.a.register_parameter("unused", nn.Parameter(torch.ones(1)))
    assert "gradients reach" in judge(model, ForRetraining(drop_bias), X).how
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert "gradients not checked" in judge(model, ForRetraining(drop_bias), X).how


class Root(nn.Module):
    """sqrt(x + 1e-3), whose gradient at 0 is finite only because of the constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2)
        nn.init.zeros_(self.a.weight)
        nn.init.zeros_(self.a.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(self.a(x) + 1e-3)


@dataclasses.dataclass(frozen=True)
class NoEps(Pass):
    name: ClassVar[str] = "no-eps"
    guarantee: ClassVar[Guarantee] = Guarantee.RETRAIN

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        yield from (Site(node) for node in context.gm.graph.nodes if 1e-3 in node.args)

    def rewrite(self, site: Site) -> None:
        site.node.args = (site.node.args[0], 0.0)


def test_a_gradient_that_is_not_finite() -> None:
    with pytest.raises(VerificationError, match=r"gradient of the parameter 'a.weight' is not finite"):
        judge(Root(), NoEps(), X)


def test_double_graph_keeps_ties_and_the_original() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return F.relu(self.head(self.embed(ids)))

    gm = fx.symbolic_trace(Tied())
    set_attribute(gm, "extra", torch.ones(1))
    copied = double_graph(gm)
    assert copied.head.weight is copied.embed.weight
    assert copied.head.weight.dtype == torch.float64
    assert gm.head.weight.dtype == torch.float32
    assert [n.name for n in copied.graph.nodes] == [n.name for n in gm.graph.nodes]
