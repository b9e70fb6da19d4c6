"""Tracing: the graph is the model, at every batch size, in both modes, after copying and pickling."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.analysis.outputs import compare
from fxcompress.errors import TraceWarning
from fxcompress.recording import internals, recording
from fxcompress.trace import trace
from tests import recorded_models as models

_TOLERANCE = 1e-6


def assert_same(gm: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Equal outputs, on inputs that neither may change for the other."""
    torch.manual_seed(1)
    expected = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    torch.manual_seed(1)
    found = compare(expected, gm(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
    assert not found.structural
    assert not found.discrete
    assert found.error <= _TOLERANCE


def image(batch: int, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def rows(batch: int, width: int = 4) -> torch.Tensor:
    return torch.randn(batch, width)


def tokens(batch: int, length: int = 5) -> torch.Tensor:
    return torch.randint(0, 10, (batch, length))


CASES: dict[str, tuple[type[nn.Module], Any]] = {
    "dropout": (models.DropoutByFlag, lambda b: rows(b, 8)),
    "attention": (models.AttentionByFlag, lambda b: torch.randn(b, 5, 8)),
    "stochastic depth": (models.WithStochasticDepth, lambda b: rows(b, 8)),
    "functional conv and norm": (models.FunctionalConvNorm, image),
    "in place": (models.InPlace, image),
    "same tensor back": (models.SameTensorBack, rows),
    "tied": (models.Tied, tokens),
    "random": (models.Random, rows),
    "positions": (models.Positions, tokens),
    "constants": (models.ConstantWrittenInPlace, rows),
    "encoder": (models.Encoder, lambda b: torch.randn(b, 5, 16)),
    "no grad": (models.NoGradBranch, rows),
    "straight-through": (models.StraightThrough, rows),
    "scripted": (models.CallsScripted, rows),
    "recurrent": (models.Recurrent, lambda b: torch.randn(b, 7, 4)),
    "resizes": (models.Resizes, image),
    "flattens": (models.FlattensByHand, image),
    "transposed": (models.WithTransposedLinear, rows),
    "buffers": (models.HiddenBuffers, rows),
    "numpy table": (models.NumpyTable, rows),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_equal_at_every_batch_size_and_after_copying(name: str, batch: int) -> None:
    kind, make = CASES[name]
    model = kind().eval()
    gm = trace(model, (make(batch),))
    for other in (1, 2, 5):
        assert_same(gm, model, make(other))
    assert_same(copy.deepcopy(gm), model, make(4))
    assert_same(pickle.loads(pickle.dumps(gm)), model, make(4))


@pytest.mark.parametrize(
    "name", ["dropout", "attention", "stochastic depth", "same tensor back", "functional conv and norm"]
)
@pytest.mark.parametrize("traced_in_training", [False, True])
def test_both_modes_whatever_the_mode_it_was_traced_in(name: str, traced_in_training: bool) -> None:
    kind, make = CASES[name]
    model = kind().train(traced_in_training)
    if traced_in_training and name == "stochastic depth":
        model.drop_path.training = True
    gm = trace(model, (make(2),))
    for training in (True, False, True):
        model.train(training)
        gm.train(training)
        assert_same(copy.deepcopy(gm), copy.deepcopy(model), make(5))


def test_dropout_that_is_off_for_good_stays_off() -> None:
    gm = trace(models.DropoutByFlag().eval(), (rows(2, 8),))
    kinds = [type(m) for m in gm.modules()]
    assert kinds.count(nn.Dropout) == 1


def test_the_model_is_not_changed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    before = copy.deepcopy(model.state_dict())
    x = image(4)
    kept = x.clone()
    gm = trace(model, (x,))
    assert torch.equal(x, kept)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in gm.parameters())
    gm.get_submodule("0").weight.data.zero_()
    assert torch.equal(model[0].weight, before["0.weight"])


def test_structured_inputs_and_outputs() -> None:
    model = models.Containers().eval()

    def given(batch: int) -> dict[str, Any]:
        return {"mask": torch.rand(batch, 4), "extra": {"a": [rows(batch)]}}

    gm = trace(model, (rows(2),), example_kwargs=given(2))
    assert_same(gm, model, rows(5), **given(5))
    assert_same(copy.deepcopy(gm), model, rows(5), **given(5))
    assert_same(pickle.loads(pickle.dumps(gm)), model, rows(5), **given(5))
    with pytest.raises(ValueError, match="1 entries"):
        gm(rows(2), mask=torch.rand(2, 4), extra={"a": [rows(2), rows(2)]})
    with pytest.raises(ValueError, match="keys"):
        gm(rows(2), mask=torch.rand(2, 4), extra={"a": [rows(2)], "b": rows(2)})


def test_arguments_that_are_not_tensors_are_checked() -> None:
    model = models.Containers().eval()
    gm = trace(model, (rows(2),), example_kwargs={"flag": False})
    assert_same(gm, model, rows(5), flag=False)
    with pytest.raises(ValueError, match="flag=False"):
        gm(rows(2), flag=True)
    with pytest.raises(ValueError, match="mask=None"):
        gm(rows(2), mask=rows(2), flag=False)


def test_starred_arguments() -> None:
    model = models.StarArguments()
    gm = trace(model, (rows(2), rows(2), rows(2)), example_kwargs={"bias": rows(2)})
    assert_same(gm, model, rows(5), rows(5), rows(5), bias=rows(5))


def test_named_dimensions_are_free_and_others_are_guarded() -> None:
    model = models.Positions()
    fixed = trace(model, (tokens(2),))
    with pytest.raises(ValueError, match=r"\(any, 5\)"):
        fixed(tokens(2, 6))
    free = trace(model, (tokens(2),), dynamic_dims={"tokens": {1: "length"}})
    for batch, length in ((1, 1), (3, 9), (7, 2)):
        assert_same(free, model, tokens(batch, length))


def test_a_baked_size_is_guarded_only_where_it_matters() -> None:
    resizes = trace(models.Resizes(), (image(1),))
    with pytest.raises(ValueError, match="recorded for x"):
        resizes(image(1, 10))
    ratio = trace(models.AspectRatio(), (image(1),))
    with pytest.raises(ValueError, match="recorded for x"):
        ratio(torch.randn(1, 3, 8, 10))
    pads = trace(models.PadsToEven(), (image(1),))
    with pytest.raises(ValueError, match="recorded for x"):
        pads(image(1, 9))
    model = models.FlattensByHand()
    assert_same(trace(model, (image(1),)), model, image(2, 13))


def test_ties_and_shared_modules_stay() -> None:
    gm = trace(models.Tied(), (tokens(2),))
    assert gm.embedding.weight is gm.head.weight
    assert [n.target for n in gm.graph.nodes].count("body") == 2
    assert copy.deepcopy(gm).embedding.weight.shape == (10, 8)
    copied = copy.deepcopy(gm)
    assert copied.embedding.weight is copied.head.weight


def test_state_dict_has_the_names_of_the_model() -> None:
    for kind, make in (CASES["functional conv and norm"], CASES["buffers"], CASES["in place"], CASES["recurrent"]):
        model = kind().eval()
        gm = trace(model, (make(2),))
        gm.load_state_dict(model.state_dict())
        assert set(gm.state_dict()) == set(model.state_dict())
        assert set(copy.deepcopy(gm).state_dict()) == set(model.state_dict())
    assert trace(models.FunctionalConvNorm().eval(), (image(1),)).bn.num_batches_tracked == 7


def test_gradients_reach_what_they_reached() -> None:
    gm = trace(models.NoGradBranch(), (rows(2),))
    gm(rows(3)).sum().backward()
    assert gm.target.weight.grad is None
    assert gm.online.weight.grad is not None
    gm = trace(models.StraightThrough(), (rows(2),))
    gm(rows(3)).sum().backward()
    assert gm.linear.weight.grad.abs().sum() > 0


def test_layers_that_act_by_mode_are_kept_whole() -> None:
    gm = trace(models.WithStochasticDepth().eval(), (rows(2, 8),))
    assert isinstance(gm.drop_path, models.StochasticDepth)


def test_padding_masks_and_the_fused_encoder() -> None:
    model = models.Encoder().eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 3:] = True
    with pytest.warns(TraceWarning, match="padded positions"):
        gm = trace(model, (torch.randn(2, 5, 16), padding))
    x = torch.randn(2, 5, 16)
    with torch.enable_grad():  # the layers themselves, not the fused kernel
        assert_same(gm, model, x, padding)


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_layers_become_linear_and_attention(batch_first: bool) -> None:
    model = models.Encoder(batch_first).eval()
    gm = trace(model, (torch.randn(2, 5, 16),))
    targets = {str(n.target) for n in gm.graph.nodes}
    assert not any("multi_head" in t for t in targets)
    assert isinstance(gm.get_submodule("encoder.layers.0.self_attn.in_proj"), nn.Linear)
    assert isinstance(gm.get_submodule("encoder.layers.0.self_attn.out_proj"), nn.Linear)


def test_a_whole_transformer_with_masks() -> None:
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    gm = trace(model, (torch.randn(2, 5, 16), torch.randn(2, 4, 16)), example_kwargs={"tgt_mask": mask})
    assert_same(gm, model, torch.randn(3, 5, 16), torch.randn(3, 4, 16), tgt_mask=mask)


def test_conv1d_of_gpt2_becomes_linear_under_another_name() -> None:
    model = models.WithTransposedLinear()
    gm = trace(model, (rows(2),))
    layer = gm.get_submodule("proj.linear")
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, model.proj.weight.t())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*proj\.weight"):
        gm.load_state_dict(model.state_dict())


def test_parametrized_layers_keep_their_parametrization() -> None:
    from torch.nn.utils.parametrizations import weight_norm

    model = nn.Sequential(weight_norm(nn.Conv1d(3, 4, 3)), nn.ReLU())
    gm = trace(model, (torch.randn(2, 3, 8),))
    assert_same(gm, model, torch.randn(5, 3, 8))
    assert set(gm.state_dict()) == set(model.state_dict())
    gm(torch.randn(2, 3, 8)).sum().backward()
    assert all(p.grad is not None for p in gm.parameters())


def test_half_and_double() -> None:
    gm = trace(models.FunctionalConvNorm().eval(), (image(2),))
    assert copy.deepcopy(gm).double()(image(2).double()).dtype is torch.float64
    assert copy.deepcopy(gm).bfloat16()(image(2).bfloat16()).dtype is torch.bfloat16
    model = models.FunctionalConvNorm().eval().bfloat16()
    assert_same(trace(model, (image(1).bfloat16(),)), model, image(3).bfloat16())


def test_a_graph_module_passes_and_without_inputs_fx_traces() -> None:
    model = models.FunctionalConvNorm().eval()
    gm = trace(model)
    assert isinstance(gm.conv, nn.Conv2d)
    assert_same(gm, model, image(2))
    assert trace(gm) is gm
    assert fxcompress.trace is trace


def test_torch_compile_and_export_take_the_graph() -> None:
    model = models.Encoder().eval()
    x = torch.randn(2, 5, 16)
    gm = trace(model, (x,))
    explained = torch._dynamo.explain(gm)(x)
    assert explained.graph_break_count == 0
    exported = torch.export.export(gm, (x,)).module()
    assert compare(gm(x), exported(x)).error <= _TOLERANCE


def test_a_slow_model_is_computed_only_once_while_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that only have to show sizes are made on tensors without values; the graph is the same."""
    made: list[bool] = []

    class Watched(models.AttentionByFlag):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made.append(internals.is_fake(x))
            return super().forward(x)

    model = Watched().eval()
    trace(model, (torch.randn(1, 5, 8),))
    assert not any(made)
    monkeypatch.setattr(recording, "WORTH_FAKING", 0.0)
    made.clear()
    gm = trace(model, (torch.randn(1, 5, 8),))
    assert made.count(True) == 2  # the larger batch, and the other mode
    assert_same(gm, model, torch.randn(4, 5, 8))


@pytest.mark.parametrize("name", CASES)
def test_recording_without_values_gives_the_same_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, make = CASES[name]
    model, x = kind().eval(), make(2)
    expected = trace(model, (x,))
    monkeypatch.setattr(recording, "WORTH_FAKING", 0.0)
    assert _without_guards(trace(model, (x,))) == _without_guards(expected)


def _without_guards(gm: torch.fx.GraphModule) -> list[str]:
    """A slow model is guarded against other sizes without trying them, so guards may differ."""
    return [line for line in gm.code.splitlines() if "check_input" not in line]
