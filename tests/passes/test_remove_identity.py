"""RemoveIdentity: what goes, what stays and why, for every batch size and with in-place operations about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.passes.remove_identity import RemoveIdentity
from tests.passes.driver import apply, error, reasons, refused

Body = Callable[[Tensor], Any]


class Net(nn.Module):
    """conv, then ``body`` on its (N, 4, 6, 6) output; or linear, on (N, 4), for ``flat``."""

    def __init__(self, body: Body, flat: bool = False) -> None:
        super().__init__()
        self.body = body
        self.layer: nn.Module = nn.Linear(3, 4) if flat else nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.body(self.layer(x))


def inputs(flat: bool, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3) if flat else torch.randn(batch, 3, 8, 8)


def removes(body: Body, *, flat: bool = False, sites: int = 1, example: bool = True) -> fx.GraphModule:
    model = Net(body, flat).eval()
    gm, applied = apply(RemoveIdentity(), model, *([inputs(flat)] if example else []))
    assert len(applied.sites) == sites, reasons(applied)
    for batch in (1, 2, 5):
        assert error(model, gm, inputs(flat, batch)) == 0
    return gm


def keeps(body: Body, *, flat: bool = False) -> str:
    return refused(RemoveIdentity(), Net(body, flat).eval(), inputs(flat))


def test_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.0)).eval()
    gm, applied = apply(RemoveIdentity(), model)
    assert [(n.op, n.target) for n in gm.graph.nodes] == [
        ("placeholder", "input"), ("call_module", "0"), ("call_module", "3"), ("output", "output"),
    ]  # fmt: skip
    assert [site.node for site in applied.sites] == ["_1", "_2", "_4"]
    assert dict(gm.named_children()).keys() == {"0", "3"}


@pytest.mark.parametrize(
    "module",
    [
        nn.Identity(),
        nn.Dropout(0.3),
        nn.Dropout(0.3, inplace=True),
        nn.Dropout2d(0.3),
        nn.AlphaDropout(0.3),
        nn.FeatureAlphaDropout(0.3),
        nn.AvgPool2d(1),
        nn.MaxPool2d(1),
        nn.Upsample(scale_factor=1),
        nn.Upsample(scale_factor=(1.0, 1.0), mode="bicubic"),
        nn.UpsamplingBilinear2d(scale_factor=1),
        nn.ZeroPad2d(0),
        nn.ReflectionPad2d((0, 0, 0, 0)),
        nn.CircularPad2d(0),
    ],
    ids=repr,
)
def test_modules_that_do_nothing(module: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), module, nn.ReLU()).eval()
    gm, applied = apply(RemoveIdentity(), model)  # without an example: no shapes are needed
    assert len(applied.sites) == 1
    assert error(model, gm, inputs(False)) == 0


@pytest.mark.parametrize(
    "module",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(1, stride=2),
        nn.AvgPool2d(1, divisor_override=2),
        nn.MaxPool2d(1, stride=2),
        nn.Upsample(scale_factor=2),
        nn.Upsample(size=(6, 6)),
        nn.ZeroPad2d(1),
        nn.Flatten(),
    ],
    ids=repr,
)
def test_modules_that_do_something(module: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), module, nn.ReLU()).eval()
    assert refused(RemoveIdentity(), model, inputs(False)) == ""


def test_empty_sequential() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Identity()))
    model.add_module("1", nn.Sequential())
    gm, applied = apply(RemoveIdentity(), model)
    assert len(applied.sites) == 1
    assert error(model, gm, inputs(False)) == 0


# --- functions and methods ---


REMOVED: dict[str, Body] = {
    "dropout": lambda x: F.dropout(x, 0.5, training=False).relu(),
    "dropout of nothing": lambda x: F.dropout2d(x, p=0.0),
    "alpha_dropout, whose default is evaluation": lambda x: F.alpha_dropout(x, 0.5),
    "torch.dropout": lambda x: torch.dropout(x, 0.5, False),
    "add": lambda x: (x + 0).relu(),
    "sub": lambda x: (x - 0.0).relu(),
    "mul": lambda x: (x * 1.0).relu(),
    "div": lambda x: (x / 1).relu(),
    "pad": lambda x: F.pad(x, (0, 0)).relu(),
    "clone": lambda x: x.clone().relu(),
    "permute": lambda x: x.permute(0, 1, 2, 3),
    "transpose": lambda x: x.transpose(2, 2),
    "view to its own shape": lambda x: x.view(x.shape),
    "reshape to its own size": lambda x: x.reshape(x.size()),
    "view by sizes": lambda x: x.view(x.size(0), x.size(1), x.size(2), -1),
    "view by shape": lambda x: x.view(x.shape[0], 4, -1, x.shape[3]),
    "view by sizes of another": lambda x: x.relu().view(x.size(0), 4, x.size(-2), -1),
    "expand": lambda x: x.expand(-1, 4, -1, -1),
    "index": lambda x: x[:, ..., :],
    "flatten of one dimension": lambda x: torch.flatten(x, 2, 2),
    "long of long": lambda x: x.argmax(1).long(),
    "bool of bool": lambda x: (x > 0).to(torch.bool),
    "to its own dtype": lambda x: x.to(x.dtype),
    "type_as itself": lambda x: x.type_as(x),
}


@pytest.mark.parametrize("body", REMOVED.values(), ids=REMOVED.keys())
def test_calls_that_do_nothing(body: Body) -> None:
    removes(body)


FLAT: dict[str, Body] = {
    "flatten": lambda x: torch.flatten(x, 1),
    "view by one size": lambda x: x.view(x.size(0), -1),
    "view by one number": lambda x: x.view(-1, 4),
    "view by size and number": lambda x: x.view(x.size(0), 4),
    "reshape as a tuple": lambda x: x.reshape((x.size(0), -1)),
}


@pytest.mark.parametrize("body", FLAT.values(), ids=FLAT.keys())
def test_reshapes_of_rows_that_do_nothing(body: Body) -> None:
    removes(body, flat=True)


def test_sizes_of_the_input_are_followed_through_layers() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.linear = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(torch.flatten(self.pool(self.conv(x)).relu(), 1))
            return y.expand(x.size(0), -1)  # an expand has no element count to lean on

    model = Rows().eval()
    gm, applied = apply(RemoveIdentity(), model, inputs(False))
    assert [site.node for site in applied.sites] == ["expand"]
    for batch in (1, 2, 5):
        assert error(model, gm, inputs(False, batch)) == 0


def test_casts_that_repeat_a_cast() -> None:
    gm = removes(lambda x: x.double().view(-1).double().to(torch.float64), sites=2)
    assert [n.target for n in gm.graph.nodes if n.op == "call_method"] == ["double", "view"]


def test_contiguous_after_contiguous() -> None:
    removes(lambda x: x.transpose(1, 2).contiguous().contiguous())


SILENTLY_KEPT: dict[str, Body] = {
    "add of something": lambda x: x + 1,
    "sub from": lambda x: 0 - x,
    "mul that changes the dtype": lambda x: x.argmax(1) * 1.0,
    "add to bool": lambda x: (x > 0) + 0,
    "dropout whose training is computed": lambda x: F.dropout(x, 0.5, x.size(0) > 100),
    "contiguous": lambda x: x.contiguous(),
    "contiguous in another format": lambda x: x.contiguous().contiguous(memory_format=torch.channels_last),
    "index": lambda x: x[:, 1:],
    "view of bits": lambda x: x.view(torch.int32),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(0, 2, 1, 3),
    "pad": lambda x: F.pad(x, (0, 1)),
    "cast": lambda x: x.double(),
    "copying cast": lambda x: x.double().to(torch.float64, copy=True),
    "clone to another format": lambda x: x.clone(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("body", SILENTLY_KEPT.values(), ids=SILENTLY_KEPT.keys())
def test_calls_that_do_something(body: Body) -> None:
    assert keeps(body) == ""


# --- refusals ---


def test_dropout_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    assert "training mode" in refused(RemoveIdentity(), model)
    assert "training mode" in keeps(lambda x: F.dropout(x, 0.5))


def test_hooks_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    assert "Identity that has hooks" in refused(RemoveIdentity(), model)


def test_subclasses_are_left_alone() -> None:
    class Louder(nn.Identity):
        """A subclass that does something."""

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    graph = fx.Graph()
    graph.output(graph.call_module("loud", (graph.placeholder("x"),)))
    assert refused(RemoveIdentity(), fx.GraphModule({"loud": Louder()}, graph)) == ""


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.mean((1, 2)).view(2, -1),  # (N, 6): at N = 4 that is (2, 12)
        lambda x: x.mean((1, 2)).view(2, 6).sum(),  # works for N = 2 only, but not by force of the element count alone
        lambda x: x.expand(2, -1, -1, -1),  # a batch of 1 becomes 2
        lambda x: x.view(x.size(2) - 4, 4, -1, 6),
        lambda x: x.sum((2, 3)).reshape(x.size(0), 4).view(x.size(1) - 2, -1),
    ],
)
def test_shapes_that_agree_on_the_example_only_are_refused(body: Body) -> None:
    model = Net(body).eval()
    gm, applied = apply(RemoveIdentity(), model, inputs(False))
    assert "cannot be shown to keep every other" in reasons(applied)
    assert error(model, gm, inputs(False)) == 0


def test_dtypes_that_agree_on_the_example_only_are_refused() -> None:
    reason = keeps(lambda x: x.float() + x.to(torch.float32))
    assert reason.count("not by construction") == 2


def _write_to_copy(x: Tensor) -> Any:
    y = x.clone()
    y.add_(1)
    return x * y


def _write_to_original(x: Tensor) -> Any:
    y = x + 0
    x.mul_(2)
    return x * y


def _write_to_view_of_copy(x: Tensor) -> Any:
    y = F.pad(x, (0, 0))
    y.view(-1).add_(7)
    return x * y


def _write_by_function(x: Tensor) -> Any:
    y = x * 1
    return F.relu(y, inplace=True) + x


@pytest.mark.parametrize("body", [_write_to_copy, _write_to_original, _write_to_view_of_copy, _write_by_function])
def test_copies_that_are_written_to_are_refused(body: Body) -> None:
    assert "may write to it or to its original later" in keeps(body)


def test_a_copy_of_what_was_written_before_is_removed() -> None:
    removes(lambda x: F.relu(x, inplace=True).clone().sigmoid())


def test_copies_for_writing_elsewhere_are_removed() -> None:
    def body(x: Tensor) -> Tensor:
        y = x.clone().sigmoid()
        return y.add_(1)

    removes(body)


def test_copies_that_are_handed_out_with_their_original_are_refused() -> None:
    assert "seen outside" in keeps(lambda x: (x, x.clone()))
    identity = fx.symbolic_trace(nn.Identity())
    with identity.graph.inserting_before(identity.graph.output_node()):
        copy = identity.graph.call_method("clone", (identity.graph.find_nodes(op="placeholder")[0],))
    identity.graph.output_node().args = (copy,)
    identity.recompile()
    assert "seen outside" in reasons(apply(RemoveIdentity(), identity, torch.ones(2))[1])


def test_views_stay_where_strides_change_in_place() -> None:
    def body(x: Tensor) -> Any:
        y = x.view(x.shape)
        y.unsqueeze_(0)
        return x, y

    assert "changes the strides" in keeps(body)


def test_copies_whose_strides_are_counted_on_stay() -> None:
    def expanded(x: Tensor) -> Tensor:
        y = x.unsqueeze(1).expand(-1, 3, -1, -1, -1).clone()
        return y.view(y.shape[0], 12, 6, 6)  # which fails on the expanded tensor itself

    assert "how the copy lies" in keeps(expanded)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(1), nn.Unflatten(1, (2, 2))).eval()
    assert "how the copy lies" in refused(RemoveIdentity(), model, inputs(False))


def test_an_unknown_module_may_write() -> None:
    class Writes(nn.Module):
        """Opaque to the graph."""

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    graph = fx.Graph()
    x = graph.placeholder("x")
    copy = graph.call_method("clone", (x,))
    graph.output(graph.call_function(torch.mul, (graph.call_module("writes", (copy,)), x)))
    assert "Writes 'writes' may write" in refused(
        RemoveIdentity(), fx.GraphModule({"writes": Writes()}, graph), torch.ones(2)
    )


def test_chains_go_at_once() -> None:
    removes(lambda x: F.dropout((x + 0) * 1, 0.1, False).view(x.shape).clone().relu(), sites=5)


def test_idempotent() -> None:
    gm = removes(lambda x: x.clone().view(x.shape).relu(), sites=2)
    assert not apply(RemoveIdentity(), gm, inputs(False))[1].sites


def test_end_to_end() -> None:
    def body(x: Tensor) -> Tensor:
        x = F.dropout(x, 0.1, training=False).view(x.shape[0], 4, -1, x.shape[3])
        return torch.flatten(x + 0, 1).view(x.size(0), -1)

    gm = fxcompress.compile(Net(body).eval(), ["remove-identity"], example_inputs=inputs(False))
    record = fxcompress.report(gm).passes[0]
    assert (record.verified, record.error, record.refusals) == (True, 0.0, ())
    kept = [n.target for n in gm.graph.nodes if n.op not in ("placeholder", "output") and n.users]
    assert kept == ["layer", torch.flatten]
