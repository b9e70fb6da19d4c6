"""CastPrecision: what computes in which dtype, where casts stand, and the traps of mixed precision."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.analysis.shapes import Shapes, shapes
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.pass_base import Example, PassContext, Refusal
from fxcompress.passes.precision import CastPrecision
from fxcompress.passes.quantization import Quantize
from tests import contract
from tests.networks import Network
from tests.passes.driver import apply, error, reasons
from tests.strategies import networks

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = pytest.mark.parametrize("dtype", LOW)


def cast(model: nn.Module, *inputs: Any, **options: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    return fxcompress.compile(model.eval(), [CastPrecision(**options)], inputs)


def close(model: nn.Module, gm: nn.Module, *inputs: Tensor, times: float = 8) -> None:
    """Equal but for a few roundings of the low dtype that ``gm`` has most of its parameters in."""
    dtypes = {p.dtype for p in gm.parameters()} | {n.args[1] for n in casts(gm) if n.args[1:]}
    eps = max(torch.finfo(d).eps for d in dtypes if isinstance(d, torch.dtype) and d.is_floating_point)
    assert error(model, gm, *inputs) < times * eps


def casts(gm: fx.GraphModule, dtype: torch.dtype | None = None) -> list[fx.Node]:
    found = [n for n in gm.graph.nodes if n.op == "call_method" and n.target in ("to", "float")]
    return [n for n in found if dtype is None or n.args[1:] == (dtype,)]


def ran(gm: fx.GraphModule, *inputs: Any) -> tuple[Shapes, dict[str, fx.Node]]:
    return shapes(gm, inputs), {n.name: n for n in gm.graph.nodes}


def dtype_of(gm: fx.GraphModule, name: str, *inputs: Any) -> torch.dtype:
    found, nodes = ran(gm, *inputs)
    return found.dtype(nodes[name])


def record(gm: fx.GraphModule) -> Any:
    return fxcompress.report(gm).passes[-1]


def refusals(gm: fx.GraphModule) -> str:
    return "\n".join(r.reason for r in record(gm).refusals)


# ------------------------------------------------------------------------------------------------- the plain case
@DTYPES
def test_worked_out_by_hand(dtype: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    x = torch.randn(2, 8)
    gm = cast(model, x, dtype=dtype)
    low = LOW[dtype]
    steps = [n.args[1] if n in casts(gm) else n.target for n in gm.graph.nodes if n.target != "check_input"]
    assert steps == ["input", low, "0", torch.float32, "1", low, "2", torch.float32, "output"]
    assert {n: p.dtype for n, p in gm.named_parameters()} == {
        "0.weight": low, "0.bias": low, "1.weight": torch.float32, "1.bias": torch.float32,
        "2.weight": low, "2.bias": low,
    }  # fmt: skip
    first = model[1](F.linear(x.to(low), model[0].weight.to(low), model[0].bias.to(low)).float())
    second = F.linear(first.to(low), model[2].weight.to(low), model[2].bias.to(low)).float()
    assert torch.equal(gm(x), second)
    assert len(record(gm).details) == record(gm).sites == 4
    detail = record(gm).details[0]
    assert detail["computes"] == dtype
    assert detail["parameters"] == ["0.weight", "0.bias"]
    assert detail["casts"] == 1
    assert 0 < detail["weight_error"] < torch.finfo(low).eps
    assert record(gm).bytes_after == record(gm).bytes_before // 2 + 2 * 8 * 2  # the norm stays whole


@DTYPES
@given(network=networks())
def test_drawn_networks_are_close(dtype: str, network: Network) -> None:
    """To those in float32, as close as rounding a few times makes them."""
    gm = contract.compress(CastPrecision(dtype=dtype), network)
    contract.check_equivalence(CastPrecision(dtype=dtype), network, gm)
    contract.check_copies(CastPrecision(dtype=dtype), network, gm)


def test_one_cast_serves_all_readers() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return torch.stack([self.q(x), self.k(x), self.v(x)])

    x = torch.randn(2, 8)
    model = Heads().eval()
    gm = cast(model, x)
    assert len(casts(gm, torch.bfloat16)) == 1
    assert len(casts(gm, torch.float32)) == 1
    close(model, gm, x)


def test_a_cast_comes_before_movement_if_all_that_moves_is_rounded() -> None:
    class Moves(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(4, 4), nn.Linear(4, 4)
            self.first = first

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x).view(2, 2, 4).transpose(0, 1)
            if self.first:
                x = x[:1]  # rounding is for less after this
            return self.a(x) + self.b(x)

    x = torch.randn(2, 8)
    for first, expected in ((False, "norm"), (True, "getitem")):
        gm = cast(Moves(first), x)
        (made,) = casts(gm, torch.bfloat16)
        assert made.args[0].name == expected


def test_no_cast_up_and_down_again() -> None:
    class Back(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).to(torch.float32).view(-1, 8))

    gm = cast(Back(), torch.randn(2, 8))
    assert len(casts(gm)) == 2  # at the borders


def test_sums_between_norms_stay_exact() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for norm, layer in zip(self.norms, self.layers, strict=True):
                x = x + layer(norm(x))
            return x

    x = torch.randn(2, 8)
    gm = cast(Stream(), x)
    assert {dtype_of(gm, name, x) for name in ("add", "add_1", "add_2")} == {torch.float32}
    assert len(casts(gm, torch.float32)) == 1  # of the first layer's output; the sums promote
    assert len(casts(gm)) == 1 + 1 + 3


def test_layers_that_read_integers_are_low() -> None:
    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.place, self.norm = nn.Embedding(9, 8), nn.Embedding(5, 8), nn.LayerNorm(8)

        def forward(self, i: Tensor, at: Tensor) -> Tensor:
            return self.norm(self.word(i) + self.place(at))

    model, inputs = Embeddings().eval(), (torch.randint(9, (2, 5)), torch.arange(5))
    gm = cast(model, *inputs)
    assert gm.word.weight.dtype is gm.place.weight.dtype is torch.bfloat16
    assert [n.args[0].name for n in casts(gm)] == ["word"]  # the sum promotes
    close(model, gm, *inputs)


def test_subclasses_of_layers_stay() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4)).eval()
    graph = fx.Graph()
    graph.output(graph.call_module("1", (graph.call_module("0", (graph.placeholder("x"),)),)))
    gm, applied = apply(CastPrecision(), fx.GraphModule(model, graph), torch.randn(2, 4))
    assert "a Doubled is a subclass" in reasons(applied)
    assert gm.get_submodule("0").weight.dtype is torch.float32


def test_residuals_of_a_convolutional_network_stay_low() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.conv(x))
            y = self.norm(self.conv(x))
            y += x
            return self.fc(self.pool(self.relu(y)).flatten(1))

    model, x = Block().eval(), torch.randn(2, 4, 8, 8)
    gm = cast(model, x)
    assert len(casts(gm)) == 2
    assert gm.norm.weight.dtype is gm.norm.running_mean.dtype is torch.float32
    close(model, gm, x)


def test_softmax_and_mean_are_low_only_between_low_ones() -> None:
    class Net(nn.Module):
        def __init__(self, exact: bool) -> None:
            super().__init__()
            self.a, self.b, self.exact = nn.Linear(8, 8), nn.Linear(8, 8), exact

        def forward(self, x: Tensor) -> Tensor:
            p = self.a(x).softmax(-1)
            return self.b(p) + p.log().mean() if self.exact else self.b(p)

    x = torch.randn(2, 8)
    assert dtype_of(cast(Net(False), x), "softmax", x) is torch.bfloat16
    assert dtype_of(cast(Net(True), x), "softmax", x) is torch.float32


def test_steep_functions_and_sums_are_exact() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.a(x)
            return y.exp(), y.pow(2).sum(-1), y.cumsum(-1), torch.log_softmax(y, -1), 1 / (y + 9), y.norm()

    x = torch.randn(2, 8)
    gm = cast(Steep(), x)
    found, nodes = ran(gm, x)
    for name in ("exp", "pow_1", "sum_1", "cumsum", "log_softmax"):
        assert found.dtype(nodes[name]) is torch.float32, name
    assert len(casts(gm, torch.float32)) == 1


# ------------------------------------------------------------------------------------------------- masks
class Masked(nn.Module):
    """One attention; ``how`` says in which of the usual ways the mask gets in."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv, self.out = how, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        least = torch.finfo(torch.float32).min
        bias = (1.0 - keep[:, None, :].to(torch.float32)) * least
        if self.how == "sdpa":
            return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
        if self.how == "boolean":
            return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, :] > 0))
        scores = q @ k.transpose(-1, -2) / 8**0.5
        if self.how == "add":
            scores = scores + bias
        elif self.how == "add in place":
            scores += bias
        elif self.how == "fill":
            scores = scores.masked_fill(keep[:, None, :] == 0, least)
        elif self.how == "fill in place":
            scores.masked_fill_(keep[:, None, :] == 0, least)
        elif self.how == "where":
            scores = torch.where(keep[:, None, :] > 0, scores, torch.tensor(least))
        return self.out(scores.softmax(-1) @ v)


@DTYPES
@pytest.mark.parametrize("how", ["sdpa", "add", "add in place", "fill", "fill in place", "where"])
@pytest.mark.parametrize("padded", [True, False])
def test_rows_that_are_masked_out_whole_stay_finite(how: str, padded: bool, dtype: str) -> None:
    model, x = Masked(how).eval(), torch.randn(2, 6, 8)
    keep = torch.ones(2, 6)
    keep[:, 4:] = float(not padded)
    gm = cast(model, x, keep, dtype=dtype)
    nothing = keep.clone()
    nothing[0] = 0
    found = gm(x, nothing)
    assert found.isfinite().all()
    with torch.no_grad():
        expected = model(x, nothing)
    assert (found - expected)[1].abs().max() < 8 * torch.finfo(LOW[dtype]).eps * expected.abs().max()
    close(model, gm, x, keep)


def test_infinite_masks_stay_infinite() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.register_buffer("mask", torch.full((6, 6), float("-inf")).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), attn_mask=self.mask)

    model, x = Causal().eval(), torch.randn(2, 6, 8)
    gm = cast(model, x)
    assert torch.equal(gm(x)[:, :2], gm(torch.cat([x[:, :2], torch.randn(2, 4, 8)], 1))[:, :2])
    close(model, gm, x)


# ------------------------------------------------------------------------------------------------- in place
class InPlace(nn.Module):
    """``how`` names what is done to the result of a layer, which is seen through a view as well."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.last = how, nn.Linear(8, 8), nn.Linear(8, 8)
        self.place = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        view = y[:, :4]
        if self.how == "low":
            y.mul_(2).add_(self.layer(x))
        elif self.how == "promotes":
            y += self.place
        elif self.how == "steep":
            y.exp_()
        elif self.how == "view":
            view.cumsum_(-1)
        elif self.how == "set":
            y[:, 2] = x[:, 0]
        elif self.how == "set low":
            y[:, 2:4] = self.layer(x)[:, :2]
        elif self.how == "read between":
            before = y.exp()
            y.mul_(3)
            return self.last(y) + before + y.exp()
        elif self.how == "cast":
            own = y.to(torch.float32)
            own.mul_(2)
        return self.last(y) + F.pad(view, (0, 4)).sin()


@DTYPES
@pytest.mark.parametrize("how", ["low", "promotes", "steep", "view", "set", "set low", "read between", "cast"])
def test_writes_in_place_are_seen_by_all(how: str, dtype: str) -> None:
    torch.manual_seed(1)
    model, x = InPlace(how).eval(), torch.randn(3, 8)
    gm = cast(model, x, dtype=dtype)
    close(model, gm, x)
    assert gm.layer.weight.dtype is LOW[dtype]
    if how in ("promotes", "steep", "view", "cast"):  # the value is float32 from the start
        (raised,) = (n for n in casts(gm, torch.float32) if n.args[0].name == "layer")
        assert list(raised.args[0].users) == [raised]


def test_writes_into_what_the_caller_sees() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(3, 4))

        def forward(self, x: Tensor, out: Tensor, index: Tensor) -> Tensor:
            y = self.layer(x)
            out[:, 1:3] = y[:, :2]
            out[index] = y
            self.seen.add_(y)
            return out.sum() + self.seen.sum()

    torch.manual_seed(0)
    model = Writes().eval()
    inputs = (torch.randn(3, 4), torch.zeros(3, 4), torch.tensor([2, 0, 1]))
    gm = cast(model, *inputs)
    a, b = copy.deepcopy(inputs), copy.deepcopy(inputs)
    model(*a), gm(*b)
    assert b[1].dtype is gm.seen.dtype is torch.float32
    torch.testing.assert_close(b[1], a[1], rtol=0.02, atol=0.02)
    torch.testing.assert_close(gm.seen, model.seen, rtol=0.02, atol=0.02)


# ------------------------------------------------------------------------------------------------- several values
@DTYPES
@pytest.mark.parametrize("module", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_low(module: type[nn.Module], dtype: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = module(4, 8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    model, x = Recurrent().eval(), torch.randn(2, 5, 4)
    gm = cast(model, x, dtype=dtype)
    assert {p.dtype for p in gm.parameters()} == {LOW[dtype]}
    assert {w.dtype for w in gm.rnn._flat_weights} == {LOW[dtype]}
    close(model, gm, torch.randn(4, 5, 4))
    close(model, pickle.loads(pickle.dumps(gm)), x)


def test_tuples_go_out_as_they_did() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Any:
            y = self.layer(x)
            return y.chunk(2, -1), {"top": tuple(y.topk(2)), "size": y.shape[1]}

    model, x = Several().eval(), torch.randn(3, 4)
    gm = cast(model, x)
    expected, found = model(x), gm(x)
    assert found[0][0].dtype is found[1]["top"][0].dtype is torch.float32
    torch.testing.assert_close(found[0], expected[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(found[1]["top"][0], expected[1]["top"][0], rtol=0.02, atol=0.02)
    assert found[1]["size"] == 8


# ------------------------------------------------------------------------------------------------- other code, dtypes
class Opaque(nn.Module):
    """Code that cannot be recorded, and insists on float32."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype is torch.float32
        return x * 2 if float(x.sum()) > 0 else x * 3


def test_opaque_modules_get_float32() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Opaque(), nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    gm = fxcompress.trace(model, x, opaque="auto")
    gm = fxcompress.compile(gm, [CastPrecision()], x)
    assert any(isinstance(m, Opaque) for m in gm.modules())
    close(model, gm, x)


def test_other_dtypes_are_left_alone() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4).half()

        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            y = self.b(self.a(x).half())
            return y.float() + (i * 2) + x.double().sum().float()

    model, inputs = Mixed().eval(), (torch.randn(2, 4), torch.arange(4))
    gm = cast(model, *inputs)
    assert (gm.a.weight.dtype, gm.b.weight.dtype) == (torch.bfloat16, torch.float16)
    close(model, gm, *inputs)


def test_float64_is_refused() -> None:
    with pytest.raises(PreconditionError, match=r"'weight' is float64.*model\.float\(\)"):
        apply(CastPrecision(), fx.symbolic_trace(nn.Linear(2, 2).double()), torch.randn(1, 2, dtype=torch.float64))


def test_numbers_that_the_model_makes_itself_are_exact() -> None:
    class Rotary(nn.Module):
        """Angles of a thousand radians, as a product."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("frequencies", torch.tensor([1.0, 0.7, 0.3, 0.1]))

        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1], device=x.device).float() + 1000
            angles = positions[:, None] @ self.frequencies[None]
            return self.layer(x) * angles.cos()

    model, x = Rotary().eval(), torch.randn(2, 6, 4)
    gm = cast(model, x)
    assert gm.frequencies.dtype is torch.float32
    close(model, gm, x)


def test_dtypes_and_bits_that_are_asked_for_stay_right() -> None:
    class Bits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return (y.view(torch.int32) & 1).float() * 0 + y.type_as(x)

    model, x = Bits().eval(), torch.randn(2, 4)
    close(model, cast(model, x), x)


def test_integer_weights_are_not_touched() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    quantised = Quantize(activation_bits=None, only=("0",))
    gm = fxcompress.compile(model, [quantised, CastPrecision()], x, calibration=[x])
    assert "reads integers" in refusals(gm)
    assert gm.get_submodule("2").weight.dtype is torch.bfloat16
    assert record(gm).error < 0.05


def test_a_low_model_has_no_sites() -> None:
    model, x = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)).eval(), torch.randn(2, 4, 3)
    gm = cast(model, x)
    again = fxcompress.compile(gm, [CastPrecision()], x)
    assert record(again).sites == 0


# ------------------------------------------------------------------------------------------------- parameters
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(i)))


def test_tied_weights_stay_tied() -> None:
    model, i = Tied().eval(), torch.randint(10, (2, 3))
    gm = cast(model, i)
    assert gm.head.weight is gm.embedding.weight
    assert gm.head.weight.dtype is torch.bfloat16
    assert record(gm).parameters_after == record(gm).parameters_before
    assert all(d["weight_error"] > 0 for d in record(gm).details if d["parameters"])
    close(model, gm, i)


def test_what_is_tied_to_a_layer_in_float32_stays_float32() -> None:
    model, i = Tied().eval(), torch.randint(10, (2, 3))
    gm = cast(model, i, exclude=("head",))
    assert gm.embedding.weight is gm.head.weight
    assert gm.head.weight.dtype is torch.float32
    assert "is read in float32 by Linear 'head' as well" in refusals(gm)
    assert error(model, gm, i) == 0


def test_shared_layers_are_cast_once() -> None:
    layer = nn.Linear(4, 4)
    model, x = nn.Sequential(layer, nn.ReLU(), layer).eval(), torch.randn(2, 4)
    gm = cast(model, x)
    assert sum(p.dtype is torch.bfloat16 for p in gm.parameters()) == 2
    close(model, gm, x)


class Direct(nn.Module):
    """A parameter that a product reads, moved or not, and that another operation may read as well."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "einsum":
            return torch.einsum("bi,oi->bo", x, self.weight)
        y = x @ self.weight[:3].reshape(3, 4).t()
        return y + self.weight.exp().sum() if self.how == "both" else y


@pytest.mark.parametrize("how", ["einsum", "moved", "both"])
def test_parameters_read_by_products(how: str) -> None:
    model, x = Direct(how).eval(), torch.randn(2, 4)
    gm = cast(model, x)
    (parameter,) = gm.parameters()
    assert parameter.dtype is (torch.float32 if how == "both" else torch.bfloat16)
    close(model, gm, x)


def test_weights_out_of_range_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].weight[0, 0] = 70000
        model[1].weight.mul_(1e-8)
    x = torch.randn(2, 4)
    gm = cast(model, x, dtype="float16")
    assert "numbers up to 7e+04, which torch.float16 cannot hold" in refusals(gm)
    assert "too small for torch.float16" in refusals(gm)
    assert [gm.get_submodule(str(i)).weight.dtype for i in range(3)] == [torch.float32, torch.float32, torch.float16]
    assert not record(cast(model, x)).refusals  # bfloat16 has the range


def test_values_out_of_range_are_found_on_the_example() -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) * 1e6  # an elementwise operation that overflows
            z = self.b(y)  # a layer whose input does
            return self.c(z * 1e-6)

    model, x = Big().eval(), torch.randn(2, 4)
    gm = cast(model, x, dtype="float16")
    assert refusals(gm) == "overflows torch.float16 on the example inputs"
    assert [m.weight.dtype for m in (gm.a, gm.b, gm.c)] == [torch.float16, torch.float32, torch.float16]
    close(model, gm, x)


def test_layers_with_hooks_stay() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model.get_submodule("0").register_forward_hook(lambda m, a, y: y * 2)
    gm, applied = apply(CastPrecision(), model, torch.randn(2, 4))
    assert "has hooks" in reasons(applied)
    assert gm.get_submodule("0").weight.dtype is torch.float32
    assert gm.get_submodule("1").weight.dtype is torch.bfloat16


def test_parametrised_layers_stay() -> None:
    inner = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = fx.symbolic_trace(nn.Sequential(inner, nn.Linear(4, 4)))
    _, applied = apply(CastPrecision(), model, torch.randn(2, 4))
    assert "has parametrizations" in reasons(applied)
    assert [site.target for site in applied.sites if site.detail["parameters"]] == ["1"]


def test_overlapping_weights_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach()[:2])
    # Without the engine, whose copy of the model parts the two.
    context = PassContext(fx.symbolic_trace(model), Example((torch.randn(2, 4),)))
    found = [item for item in CastPrecision().sites(context) if isinstance(item, Refusal)]
    assert "its weight overlaps in memory with '1.weight'" in found[0].reason


def test_failing_kernels_fall_back() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.lerp(self.layer(x), x, 0.5) + torch.addcmul(x, self.layer(x), x)

    model, x = Fails().eval(), torch.randn(2, 4)
    close(model, cast(model, x), x)


# ------------------------------------------------------------------------------------------------- options
def test_options() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x))

    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(2, 3, 8)

    def low(**options: Any) -> set[str]:
        details = record(cast(model, x, **options)).details
        return {d["module"] or d["node"] for d in details if d["computes"] == "bfloat16"}

    first = {"0.q", "0.k", "0.v", "0.out", "matmul", "matmul_1"}
    second = {"1.q", "1.k", "1.v", "1.out", "matmul_2", "matmul_3"}
    assert low() == first | second
    assert low(exclude=("0",)) == second
    assert low(only=("1.*", "0.out")) == second | {"0.out"}
    assert low(keep=("matmul",)) == {name for name in first | second if "matmul" not in name}
    assert low(keep=("Linear", "matmul")) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "dtype is 'bfloat16' or 'float16'"),
        ({"dtype": torch.float16}, "as a string"),
        ({"exclude": "a"}, "exclude is a tuple of patterns"),
        ({"keep": "softmax"}, "keep is a tuple"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CastPrecision(**options)


def test_names_that_nothing_has() -> None:
    x = torch.randn(1, 4)
    with pytest.raises(UsageError, match="no operation of this model is called 'Liner'; near it: Linear"):
        cast(nn.Linear(4, 4), x, keep=("Liner",))
    with pytest.raises(UsageError, match="no module path matches 'body'"):
        cast(nn.Sequential(nn.Linear(4, 4)), x, exclude=("body",))


def test_named_on_the_command_line() -> None:
    gm = fxcompress.compile(
        nn.Linear(4, 4).eval(), ["cast-precision:dtype=float16,keep=('Linear',)"], torch.randn(1, 4)
    )
    assert record(gm).sites == 0


# ------------------------------------------------------------------------------------------------- what comes out
def test_the_result_lives_on() -> None:
    model, i = Tied().eval(), torch.randint(10, (2, 3))
    gm = cast(model, i)
    other = torch.randint(10, (5, 3))
    expected = gm(other)
    close(model, gm, other)
    for copied in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(copied(other), expected)
        assert copied.head.weight is copied.embedding.weight
    file = io.BytesIO()
    torch.save(gm.state_dict(), file)
    file.seek(0)
    fresh = cast(Tied(), i)
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(other), expected)
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(other), expected, rtol=1e-2, atol=1e-2)


def test_it_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 1))
    x = torch.randn(64, 8)
    y = x[:, :1] * x[:, 1:2]
    gm = cast(model, x).train()
    optimiser = torch.optim.Adam(gm.parameters(), 0.01)
    losses = []
    for _ in range(100):
        optimiser.zero_grad()
        loss = F.mse_loss(gm(x), y)
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 4
