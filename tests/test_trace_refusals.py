"""What tracing refuses, and what it says: never a graph that is silently wrong."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from fxcompress.errors import PreconditionError, TraceError, TraceWarning, UsageError
from fxcompress.trace import trace
from tests import recorded_models as models
from tests.test_trace import assert_same, image, rows, tokens


@pytest.mark.parametrize("kind", [models.LooksAtData, models.Swallows, models.ThroughNumpy])
def test_data_reads_are_refused_with_file_and_line(kind: type[nn.Module]) -> None:
    with pytest.raises(TraceError, match=r"recorded_models\.py:\d+.*depends on an input"):
        trace(kind(), (rows(2),))


def test_reading_a_parameter_is_refused_too() -> None:
    class ReadsParameter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale.item()

    with pytest.raises(TraceError, match="depends on a parameter"):
        trace(ReadsParameter(), (rows(2),))


@pytest.mark.parametrize("kind", [models.SizeFromData, models.LoopFromData])
def test_sizes_that_follow_from_values_are_data(kind: type[nn.Module]) -> None:
    with pytest.raises(TraceError, match="values"):
        trace(kind(), (rows(4),))
    gm = trace(nn.Sequential(nn.Linear(4, 4), kind()), (rows(4),), opaque="auto")
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["0", "1"]


def test_sizes_that_python_does_not_see_are_recorded() -> None:
    gm = trace(models.SizeStaysWithTorch(), (rows(4),))
    assert_same(gm, models.SizeStaysWithTorch(), rows(7))


def test_opaque_keeps_the_innermost_module() -> None:
    model = models.AroundLooksAtData()
    gm = trace(model, (rows(2),), opaque="auto")
    calls = [n.target for n in gm.graph.nodes if n.op == "call_module"]
    assert calls == ["inner", "head"]
    assert_same(gm, model, torch.ones(3, 4))
    assert_same(gm, model, -torch.ones(3, 4))
    assert_same(trace(model, (rows(2),), opaque=["inner"]), model, -torch.ones(3, 4))


def test_opaque_keeps_a_method_of_the_model_itself() -> None:
    model = models.LooksInMethod().eval()
    gm = trace(model, (rows(2),), opaque="auto")
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["linear", "methods.select"]
    assert set(gm.state_dict()) == set(model.state_dict())
    for x in (rows(5), -100 * torch.ones(3, 4), 100 * torch.ones(3, 4)):
        assert_same(gm, model, x)
        assert_same(pickle.loads(pickle.dumps(copy.deepcopy(gm))), model, x)


def test_the_model_itself_cannot_be_opaque() -> None:
    with pytest.raises(TraceError, match="the model itself"):
        trace(models.LooksAtData(), (rows(2),), opaque="auto")
    with pytest.raises(UsageError, match="no submodule"):
        trace(models.AroundLooksAtData(), (rows(2),), opaque=["nowhere"])


def test_state_between_runs_is_noticed() -> None:
    with pytest.raises(TraceError, match="run a second time"):
        trace(models.Counts(), (rows(2),))


def test_reading_a_buffer_warns() -> None:
    with pytest.warns(TraceWarning, match="value of a buffer"):
        gm = trace(models.ReadsBuffer(), (rows(2),))
    assert_same(gm, models.ReadsBuffer(), rows(3))


def test_what_only_training_does_is_told() -> None:
    model = models.DropsByHand().eval()
    with pytest.warns(TraceWarning, match=r"in training mode.*recorded_models\.py:\d+"):
        gm = trace(model, (rows(2),))
    assert_same(gm, model, rows(3))


def test_a_loop_over_the_batch_is_refused_or_fixed() -> None:
    with pytest.raises(TraceError, match=r"other things at other input sizes.*dynamic_batch=False"):
        trace(models.LoopsOverBatch(), (rows(2),))
    gm = trace(models.LoopsOverBatch(), (rows(2),), dynamic_batch=False)
    assert_same(gm, models.LoopsOverBatch(), rows(2))
    with pytest.raises(ValueError, match=r"shape \(2, any\)"):
        gm(rows(3))


def test_a_model_of_one_batch_size_is_fixed_with_a_warning() -> None:
    with pytest.warns(TraceWarning, match="no other batch size"):
        gm = trace(models.FixedBatch(), (rows(2),))
    assert_same(gm, models.FixedBatch(), rows(2))


def test_the_models_own_error_stays_visible() -> None:
    with pytest.raises(TraceError, match="itself fails on the example inputs") as caught:
        trace(nn.Linear(3, 4), (rows(2, 5),))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.__cause__.__traceback__ is not None


def test_inputs_that_do_not_fit_the_signature() -> None:
    with pytest.raises(UsageError, match=r"do not fit Linear\.forward"):
        trace(nn.Linear(3, 4), (rows(2), rows(2)))
    with pytest.raises(UsageError, match="example_kwargs"):
        trace(nn.Linear(3, 4), {"input": rows(2, 3)})
    with pytest.raises(UsageError, match="dynamic_dims names 'length'"):
        trace(models.Positions(), (tokens(2),), dynamic_dims={"length": {0: "t"}})
    with pytest.raises(UsageError, match="dimension 4"):
        trace(models.Positions(), (tokens(2),), dynamic_dims={"tokens": {4: "t"}})


def test_what_is_no_model() -> None:
    with pytest.raises(UsageError, match=r"must be a torch\.nn\.Module, found a function"):
        trace(lambda x: x, (rows(2),))
    with pytest.raises(UsageError, match="call it to make one"):
        trace(nn.ReLU, (rows(2),))
    with pytest.raises(PreconditionError, match="meta device"):
        trace(nn.Linear(3, 4, device="meta"), (rows(2, 3),))
    with pytest.raises(PreconditionError, match="uninitialised"):
        trace(nn.LazyLinear(4), (rows(2),))
    with pytest.raises(UsageError, match="TorchScript"):
        trace(torch.jit.script(nn.Linear(3, 4)), (rows(2, 3),))


def test_without_inputs_fx_says_what_it_cannot() -> None:
    with pytest.raises(TraceError, match="give example_inputs"):
        trace(models.LooksAtData())


def test_a_plain_model_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(models.FunctionalConvNorm().eval(), (image(1),))
