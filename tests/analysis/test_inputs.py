"""Binding a call's arguments to placeholders."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import PH

from fxcompress.analysis import GraphRunner, bind_inputs, undisturbed
from fxcompress.errors import UsageError


class Affine(nn.Module):
    def forward(self, x: Tensor, scale: float = 2.0, shift: Tensor | None = None) -> Tensor:
        return x * scale


class Starred(nn.Module):
    def forward(self, x: Tensor, *rest: Tensor, **options: Tensor) -> Tensor:
        return x + rest[0] * options["weight"]


def test_by_position_by_keyword_and_by_default() -> None:
    gm = fx.symbolic_trace(Affine())
    assert bind_inputs(gm, (1, 2, 3)) == [1, 2, 3]
    assert bind_inputs(gm, (1,), {"shift": 3}) == [1, 2.0, 3]
    assert bind_inputs(gm, (), {"x": 1}) == [1, 2.0, None]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing a required argument: 'x'"),
        ((1,), {"sise": 2}, "unexpected keyword argument 'sise'"),
        ((1, 2, 3, 4), {}, "too many positional arguments"),
        ((1,), {"x": 2}, "multiple values for argument 'x'"),
    ],
)
def test_a_misfit_names_the_argument(args: tuple[int, ...], kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bind_inputs(fx.symbolic_trace(Affine()), args, kwargs)


def test_starred_placeholders_get_a_tuple_and_a_dict() -> None:
    gm = fx.symbolic_trace(Starred())
    assert bind_inputs(gm, (1, 2, 3), {"weight": 4}) == [1, (2, 3), {"weight": 4}]
    assert bind_inputs(gm, (1,)) == [1, (), {}]
    x, y, w = torch.randn(3, 2).unbind()
    assert torch.equal(GraphRunner(gm).call((x, y), {"weight": w}), gm(x, y, weight=w))


def test_structured_inputs_are_flattened() -> None:
    class Pair(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], x: Tensor) -> dict[str, Tensor]:
            return {"out": pair[0] * pair[1] + x}

    gm = fx.symbolic_trace(Pair(), concrete_args={"pair": (PH, PH)})
    assert bind_inputs(gm, ((1, 2), 3)) == [1, 2, 3]
    assert bind_inputs(gm, (), {"x": 3, "pair": (1, 2)}) == [1, 2, 3]
    a, b, x = torch.randn(3, 2).unbind()
    assert torch.equal(GraphRunner(gm).call(((a, b), x))["out"], a * b + x)
    with pytest.raises(UsageError, match="flatten to 4 values and the graph has 3"):
        bind_inputs(gm, ((1, 2, 3), 3))


def test_placeholders_count_even_before_recompiling() -> None:
    gm = fx.symbolic_trace(Affine())
    with gm.graph.inserting_after(list(gm.graph.nodes)[2]):
        gm.graph.placeholder("extra", default_value=5)
    assert bind_inputs(gm, (1,)) == [1, 2.0, None, 5]


class Restless(nn.Module):
    """Changes a buffer, its input and the random state, and puts a new buffer in the place of an old one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.full((2,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.data.add_(1)
        x.add_(torch.rand_like(x))
        self.last = x
        return x


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Restless()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class KeepInner(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Restless) or super().is_leaf_module(m, module_qualified_name)


def test_observing_leaves_no_trace() -> None:
    model = Around()
    gm = fx.GraphModule(model, KeepInner().trace(model))
    x = torch.zeros(2, requires_grad=True)
    random_state, last, version = torch.get_rng_state(), gm.inner.last, gm.inner.last._version
    output = GraphRunner(gm).observe((x,))
    assert not output.requires_grad
    assert output.abs().sum() > 0
    assert torch.equal(x, torch.zeros(2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert gm.inner.calls == 0
    assert gm.inner.last is last
    assert last.isnan().all()
    assert version <= last._version


def test_what_did_not_change_is_not_written() -> None:
    norm = nn.BatchNorm1d(3).eval()
    version = norm.running_mean._version
    with undisturbed(norm):
        norm(torch.randn(4, 3))
    assert norm.running_mean._version == version


def test_state_comes_back_after_an_error() -> None:
    norm = nn.BatchNorm1d(3)
    net = nn.Sequential(norm, nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), undisturbed(net):
        net(torch.randn(4, 3))
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))
