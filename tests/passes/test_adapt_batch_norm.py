"""AdaptBatchNorm: statistics worked out by hand, against one big batch, and against ``update_bn``."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.optim.swa_utils import update_bn

import fxcompress
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.passes.adapt_batch_norm import AdaptBatchNorm, ChannelMoments
from tests.passes.driver import apply, error, randomise, reasons


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomise(
        nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.5),
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4),
        )
    ).double()  # fmt: skip


def data(*sizes: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, 2, 8, 8, dtype=torch.float64) * (i + 1) + i for i, n in enumerate(sizes)]


def test_by_hand() -> None:
    """Channel 0 sees 1, 3 | 8: mean 4, variance ((-3)^2 + (-1)^2 + 4^2) / 2 = 13. Channel 1 sees 0, 0 | 6: 2 and 12."""
    model = nn.Sequential(nn.BatchNorm1d(2, eps=0.0)).eval()
    batches = [torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[8.0, 6.0]])]
    gm, applied = apply(AdaptBatchNorm(), model, batches[0], calibration=batches)
    assert torch.equal(gm.get_buffer("0.running_mean"), torch.tensor([4.0, 2.0]))
    assert torch.equal(gm.get_buffer("0.running_var"), torch.tensor([13.0, 12.0]))
    assert int(gm.get_buffer("0.num_batches_tracked")) == 2
    detail = applied.sites[0].detail  # from mean 0 and variance 1
    assert detail["batch_norm"] == "0"
    assert detail["mean_shift"] == 4.0
    assert (detail["std_ratio_min"], detail["std_ratio_max"]) == (math.sqrt(12), math.sqrt(13))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.floats(-1e6, 1e6))
def test_moments_are_those_of_all_values_at_once(sizes: list[int], offset: float) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(n, 3, 2, dtype=torch.float64) + offset for n in sizes]
    moments = ChannelMoments()
    for part in parts:
        moments.update(part)
    mean, var = moments.result()
    if not sum(sizes):
        assert moments.count == 0
        return
    whole = torch.cat(parts).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, whole.mean(1), rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(var, whole.var(1), rtol=1e-7, atol=1e-9)


def test_sequential_is_what_each_batch_norm_sees_in_evaluation_mode() -> None:
    """The definition, not the algorithm: feed all data through the result and compare every input with the buffers."""
    model, batches = net(), data(3, 5, 1)
    gm, applied = apply(AdaptBatchNorm(), model, calibration=batches)
    assert len(applied.sites) == 3
    seen: dict[str, Tensor] = {}
    for name, module in gm.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))
    with torch.no_grad():
        gm(torch.cat(batches))
    assert len(seen) == 3
    for name, value in seen.items():
        channels = value.transpose(0, 1).flatten(1)
        torch.testing.assert_close(gm.get_buffer(f"{name}.running_mean"), channels.mean(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gm.get_buffer(f"{name}.running_var"), channels.var(1), rtol=1e-12, atol=1e-12)


def test_a_scaled_convolution_is_forgotten() -> None:
    """Halving a convolution before batch norm changes nothing once the statistics are measured again (eps aside)."""
    model, batches = net(), data(4, 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.eps = 0.0
    wanted = apply(AdaptBatchNorm(), model, calibration=batches)[0]
    model[0].weight.data.mul_(0.5)  # type: ignore[index, union-attr, operator]
    model[0].bias.data.mul_(0.5)  # type: ignore[index, union-attr, operator]
    found = apply(AdaptBatchNorm(), model, calibration=batches)[0]
    assert error(wanted, found, batches[0]) < 1e-12
    # the first batch norm as it was sees half of what it remembers
    assert error(wanted, fx.symbolic_trace(model), batches[0]) > 0.1


def test_batch_mode_is_update_bn() -> None:
    model, batches = net(), data(3, 5, 2)
    model[3].p = 0.0  # type: ignore[index, assignment]
    gm, _ = apply(AdaptBatchNorm("batch"), model, calibration=batches)
    wanted = copy.deepcopy(model)
    update_bn(batches, wanted)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(gm.state_dict()[name], value)
    assert not any(module.training for module in gm.modules())


@pytest.mark.parametrize("mode", ["sequential", "batch"])
def test_nothing_else_changes(mode: str) -> None:
    model, batches = net(), data(3, 2)
    gm = fx.symbolic_trace(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = [batch.clone() for batch in batches]
    state = torch.get_rng_state()
    found, _ = apply(AdaptBatchNorm(mode), gm, calibration=batches)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(batches, inputs, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    changed = {name for name, value in found.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    norms = (nn.BatchNorm2d, nn.BatchNorm1d)
    assert [m.momentum for m in found.modules() if isinstance(m, norms)] == [0.1] * 3


@pytest.mark.parametrize("mode", ["sequential", "batch"])
def test_running_again_changes_nothing(mode: str) -> None:
    batches = data(3, 2)
    once, _ = apply(AdaptBatchNorm(mode), net(), calibration=batches)
    twice, _ = apply(AdaptBatchNorm(mode), once, calibration=batches)
    for name, value in once.state_dict().items():
        assert torch.equal(twice.state_dict()[name], value)


def test_dtype_stays() -> None:
    gm, _ = apply(AdaptBatchNorm(), net().bfloat16(), calibration=[batch.bfloat16() for batch in data(3)])
    assert {b.dtype for b in gm.buffers()} == {torch.bfloat16, torch.int64}


class Twice(nn.Module):
    """One batch norm, two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x).relu())


def test_a_shared_batch_norm_is_refused_in_sequence_and_averaged_by_batch() -> None:
    model, batches = Twice().double().eval(), data(3, 2)
    assert "called 2 times" in reasons(apply(AdaptBatchNorm(), model, calibration=batches)[1])
    gm, applied = apply(AdaptBatchNorm("batch"), model, calibration=batches)
    assert len(applied.sites) == 1
    update_bn(batches, model)
    torch.testing.assert_close(gm.get_buffer("norm.running_var"), model.norm.running_var)


def test_refusals() -> None:
    def why(model: nn.Module, *batches: Tensor) -> str:
        _, applied = apply(AdaptBatchNorm(), model.eval(), calibration=batches)
        assert not applied.sites
        return reasons(applied)

    rows = torch.randn(4, 2)
    assert "keeps no running statistics" in why(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), rows)
    assert "fewer than two values" in why(nn.Sequential(nn.BatchNorm1d(2)), rows[:1])
    assert "not finite" in why(nn.Sequential(nn.BatchNorm1d(2)), rows / 0)
    hooked = nn.Sequential(nn.BatchNorm1d(2))
    hooked[0].register_forward_hook(lambda module, args, output: None)
    assert "has hooks" in why(hooked, rows)

    graph = fx.Graph()
    graph.output(graph.call_module("whole", (graph.placeholder("x"),)))
    whole = fx.GraphModule({"whole": nn.Sequential(nn.BatchNorm1d(2))}, graph)
    assert "keeps its batch norms out of the graph" in why(whole, rows)

    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, torch.zeros(2), torch.ones(2))

    assert "called as a function" in why(Functional(), rows)


def test_bad_calls() -> None:
    with pytest.raises(UsageError, match="'sequential' or 'batch'"):
        AdaptBatchNorm("quickly")
    with pytest.raises(PreconditionError, match="pass `calibration`"):
        apply(AdaptBatchNorm(), net())
    with pytest.raises(UsageError, match="batch 1 of the calibration data"):
        apply(AdaptBatchNorm(), net(), calibration=[data(2)[0], (data(2)[0], torch.zeros(2))])
    with pytest.raises(UsageError, match="no batches"):
        apply(AdaptBatchNorm(), net(), calibration=[])


@pytest.mark.parametrize("spec", ["adapt-batch-norm", "adapt-batch-norm:mode=batch"])
def test_end_to_end(spec: str) -> None:
    model, batches = net().float(), [batch.float() for batch in data(3, 2)]
    gm = fxcompress.compile(model, [spec], example_inputs=batches[0], calibration=batches)
    record = fxcompress.report(gm).passes[0]
    assert (record.sites, record.verified, record.parameters_before) == (3, True, record.parameters_after)
    assert record.error is not None
    assert record.error > 0
