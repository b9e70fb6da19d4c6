"""Habits of real models that once led to graphs that were silently wrong, each with the least code that shows it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.errors import TraceError, TraceWarning
from fxcompress.trace import trace
from tests.test_trace import assert_same


class Small(nn.Module):
    """A linear layer and whatever ``body(self, *inputs)`` does with it."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.body = body

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.body(self, *inputs)


def sequences(batch: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randn(batch, length, 8)


def unrolled(m: Small, x: torch.Tensor) -> torch.Tensor:
    h = torch.zeros_like(x[:, 0])
    for t in x.unbind(1):
        h = torch.tanh(m.linear(t) + h)
    return h


@pytest.mark.parametrize(
    "body",
    [
        unrolled,
        lambda m, x: m.linear(x).sum(1) / x.transpose(0, 1).size(0),
        lambda m, x: m.linear(x).sum(1) / len(x[0]),
        lambda m, x: m.linear(x) if x.shape[1] < 7 else -m.linear(x),
    ],
)
def test_sizes_that_python_learns_in_passing_are_guarded(body: Callable[..., Any]) -> None:
    model = Small(body).eval()
    gm = trace(model, (sequences(),))
    assert_same(gm, model, sequences(5))
    with pytest.raises(ValueError, match="recorded for"):
        gm(sequences(2, 9))


def test_the_size_of_a_second_input_is_guarded() -> None:
    model = Small(lambda m, x, memory: m.linear(x).sum((0, 1)) + memory.sum(0) / memory.size(0)).eval()
    gm = trace(model, (sequences(), torch.randn(5, 8)))
    assert_same(gm, model, sequences(3), torch.randn(5, 8))
    with pytest.raises(ValueError, match="recorded for"):
        gm(sequences(), torch.randn(7, 8))


def test_a_batch_that_was_asked_to_be_fixed_is_guarded() -> None:
    gm = trace(Small(lambda m, x: m.linear(x).sum(0) / x.size(0)), (sequences(),), dynamic_batch=False)
    with pytest.raises(ValueError, match="recorded for"):
        gm(sequences(3))


def test_one_tensor_given_twice_is_two_inputs() -> None:
    model = Small(lambda m, q, k: m.linear(q) - 2 * k).eval()
    x = sequences()
    assert_same(trace(model, (x, x)), model, sequences(), sequences())
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    gm = trace(attention, (x, x, x))
    assert_same(gm, attention, sequences(3), sequences(3), sequences(3))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.linear(x).sum(1) / (x.shape[1] * x.shape[1]),
        lambda m, x: m.linear(x)[:, : (x.shape[1] + 1) // 2],
        lambda m, x: m.linear(x)[:, : max(x.shape[1] - 4, 1)],
    ],
)
def test_sizes_by_rules_that_are_not_known_are_refused(body: Callable[..., Any]) -> None:
    model = Small(body).eval()
    with pytest.raises(TraceError, match="length"):
        trace(model, (sequences(2, 8),), dynamic_dims={"inputs_0": {1: "length"}})


def test_named_sizes_in_sums_and_products_are_right_everywhere() -> None:
    model = Small(lambda m, x: m.linear(x)[:, : x.shape[1] - 1].reshape(x.shape[0] * (x.shape[1] - 1), 8)).eval()
    gm = trace(model, (sequences(2, 8),), dynamic_dims={"inputs_0": {1: "length"}})
    for length in (3, 5, 13, 20):
        assert_same(gm, model, sequences(3, length))


def test_a_special_case_for_a_batch_of_one_is_refused() -> None:
    model = Small(lambda m, x: m.linear(x) if x.shape[0] > 1 else m.linear(x) * 0).eval()
    with pytest.raises(TraceError, match="batch 1"):
        trace(model, (sequences(2),))


def test_other_ranks_and_dtypes_are_refused_where_python_asked() -> None:
    by_rank = trace(Small(lambda m, x: m.linear(x) if x.dim() == 2 else m.linear(x).mean(1)), (sequences(),))
    with pytest.raises(ValueError, match="recorded for"):
        by_rank(torch.randn(2, 8))
    by_dtype = trace(Small(lambda m, x: x / 10 if x.dtype == torch.long else x + 1), (sequences(),))
    with pytest.raises(ValueError, match="floating point"):
        by_dtype(torch.ones(2, 6, 8, dtype=torch.long))


def test_weights_made_by_the_trace_ask_for_gradients_as_theirs_did() -> None:
    model = nn.MultiheadAttention(8, 2)
    model.out_proj.bias.requires_grad_(False)
    gm = trace(model, (sequences(), sequences(3), sequences(3)))
    assert {n: p.requires_grad for n, p in gm.named_parameters() if not p.requires_grad} == {"out_proj.bias": False}
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert not any(p.requires_grad for p in trace(frozen, (sequences(), sequences(3), sequences(3))).parameters())


class CachesParameter(nn.Module):
    """As LeViT: what is computed from a parameter is kept from the first run on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.cache: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = self.scale.exp()
        return x * self.cache


def test_caches_do_not_hide_parameters() -> None:
    gm = trace(CachesParameter(), (sequences(),))
    assert list(gm.state_dict()) == ["scale"]
    gm(sequences()).sum().backward()
    assert gm.scale.grad is not None


class ComputedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 4, 3)
        self.raw = nn.Parameter(self.conv.weight.detach().clone())
        del self.conv._parameters["weight"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.conv.weight = self.raw * 2
        return self.conv(x)


def test_weights_computed_in_forward_stay_computed() -> None:
    gm = trace(ComputedWeight(), (sequences(),))
    assert set(gm.state_dict()) == {"raw", "conv.bias"}
    gm(sequences()).sum().backward()
    assert gm.raw.grad is not None


class StolenByHook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seen: dict[str, torch.Tensor] = {}
        self.linear.register_forward_hook(lambda m, i, o: self.seen.__setitem__("a", o))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.linear(x)
        return self.seen["a"]


def test_activations_that_a_closure_steals_are_refused() -> None:
    model = StolenByHook()
    model(sequences())
    with pytest.raises(TraceError, match="hook or a closure"):
        trace(model, (sequences(),))


class ReplacesBuffer(nn.Module):
    """A running mean that is assigned, not changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
        return x - self.mean


def test_replaced_buffers_are_written() -> None:
    model = ReplacesBuffer()
    gm = trace(model, (sequences(),))
    assert torch.equal(gm.mean, torch.zeros(8))
    for _ in range(3):
        x = sequences(3)
        assert torch.allclose(gm(x), model(x), atol=1e-6)
        assert torch.allclose(gm.mean, model.mean, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: F.dropout(m.linear(x), p=0.3 * m.training),
        lambda m, x: m.linear(x) + F.dropout(torch.ones(8), 0.5, m.training),
    ],
)
def test_odd_ways_to_drop_follow_the_mode(body: Callable[..., Any]) -> None:
    model = Small(body).eval()
    gm = trace(model, (sequences(),))
    for training in (True, False):
        assert_same(gm.train(training), model.train(training), sequences(5))


class FixedNorm(nn.Module):
    """A batch norm that never trains, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.norm.running_mean.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False)


def test_a_norm_that_never_trains_does_not_start_to() -> None:
    model = FixedNorm().eval()
    gm = trace(model, (sequences(),))
    for training in (True, False):
        assert_same(gm.train(training), model.train(training), sequences(5))


def test_dropout_of_a_constant_is_not_folded() -> None:
    model = nn.Sequential()
    model.drop = nn.Dropout(0.5)
    small = Small(lambda m, x: m.linear(x) + model.drop(torch.ones(8)))
    small.drop = model.drop
    small.body = lambda m, x: m.linear(x) + m.drop(torch.ones(8))
    gm = trace(small.eval(), (sequences(),))
    assert_same(gm.train(), small.train(), sequences(3))


def test_dropout_in_one_mode_only_is_told() -> None:
    with pytest.warns(TraceWarning, match="in training mode"):
        trace(DropsInTraining().eval(), (sequences(),))


class DropsInTraining(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x * self.weight, 0.3) if self.training else x * self.weight


def test_attention_that_cannot_be_written_out_follows_the_mode() -> None:
    model = nn.MultiheadAttention(8, 2, dropout=0.5, add_zero_attn=True, batch_first=True).eval()
    x = sequences()
    gm = trace(model, (x, x, x))
    assert_same(gm.train(), model.train(), x, x, x)


def test_numpy_numbers_and_indices() -> None:
    model = Small(lambda m, x: (m.linear(x) / np.sqrt(8))[:, np.array([0, 2])]).eval()
    assert_same(trace(model, (sequences(),)), model, sequences(3))


def test_assertions_on_data_do_not_stand_in_the_way() -> None:
    def body(m: Small, x: torch.Tensor) -> torch.Tensor:
        torch._check_tensor_all(x > -1e9)
        return torch.distributions.Normal(m.linear(x), torch.ones(8)).mean

    model = Small(body).eval()
    assert_same(trace(model, (sequences(),)), model, sequences(3))


def test_checkpointed_calls_are_recorded_inside() -> None:
    from torch.utils.checkpoint import checkpoint

    model = Small(lambda m, x: checkpoint(m.linear, x, use_reentrant=True)).eval()
    gm = trace(model, (sequences(),))
    assert isinstance(gm.linear, nn.Linear)


def test_functional_call_uses_the_parameters_it_is_given() -> None:
    def body(m: Small, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(m.linear, {"weight": m.linear.weight * 2, "bias": m.linear.bias}, (x,))

    model = Small(body).eval()
    assert_same(trace(model, (sequences(),)), model, sequences(3))


def test_vmap_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match=r"torch\.func"):
        trace(Small(lambda m, x: torch.vmap(m.linear)(x)), (sequences(),))


@dataclasses.dataclass(frozen=True)
class Batch:
    x: torch.Tensor


class TakesFrozen(nn.Module):
    def forward(self, batch: Batch) -> torch.Tensor:
        return batch.x + 1


def test_frozen_dataclasses_as_inputs() -> None:
    assert_same(trace(TakesFrozen(), (Batch(sequences()),)), TakesFrozen(), Batch(sequences(5)))


class TensorDefault(nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor = torch.tensor(2.0), flag: bool = True) -> torch.Tensor:  # noqa: B008
        return x * scale if flag else x


def test_a_tensor_as_default() -> None:
    gm = trace(TensorDefault(), (sequences(),), example_kwargs={"flag": True})
    assert_same(gm, TensorDefault(), sequences(3), flag=True)


def test_parameters_in_python_lists_are_told() -> None:
    hidden = [nn.Parameter(torch.randn(8))]
    with pytest.warns(TraceWarning, match="not registered"):
        trace(Small(lambda m, x: m.linear(x) * hidden[0]), (sequences(),))
