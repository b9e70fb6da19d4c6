"""compile and plan: the loop, its records, and that the caller's model never changes."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress import (
    Example,
    FxCompressError,
    Guarantee,
    Need,
    Observation,
    Pass,
    PassContext,
    PassError,
    PreconditionError,
    Refusal,
    Report,
    Site,
    UsageError,
    VerificationError,
    editing,
)
from fxcompress.progress import Event

# ------------------------------------------------------------------------------------------------------------ passes


@dataclasses.dataclass(frozen=True)
class DropIdentity(Pass):
    """Removes nn.Identity; refuses layers whose name starts with ``keep``."""

    keep: str = "kept"
    name: ClassVar[str] = "drop-identity"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        for node in context.gm.graph.nodes:
            if isinstance(context.module(node), nn.Identity):
                if str(node.target).startswith(self.keep):
                    yield Refusal(node, "asked to keep it")
                    yield Refusal(node, "said again")
                else:
                    yield Site(node, detail={"was": "Identity"})

    def rewrite(self, site: Site) -> Mapping[str, Any]:
        source = site.node.args[0]
        assert isinstance(source, fx.Node)
        editing.replace(site.node, source)
        return {"now": source.name, "size": torch.Size([1])}


@dataclasses.dataclass(frozen=True)
class OneAtATime(DropIdentity):
    name: ClassVar[str] = "one-at-a-time"
    repeat: ClassVar[bool] = True

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        found = list(super().sites(context))
        yield from [item for item in found if isinstance(item, Site)][:1]
        yield from (item for item in found if isinstance(item, Refusal))


@dataclasses.dataclass(frozen=True)
class Linears(Pass):
    """All linear layers, with one method at a time made to fail or to misbehave."""

    fails: str = ""
    name: ClassVar[str] = "linears"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def _fail(self, where: str) -> None:
        if self.fails == where:
            raise KeyError(where)

    def requires(self, context: PassContext) -> None:
        self._fail("requires")
        if self.fails == "refuse":
            raise PreconditionError("linears: this model has an odd name")

    def observes(self, context: PassContext) -> Iterator[Observation]:
        self._fail("observes")
        return iter(())

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        for node in context.gm.graph.nodes:
            if isinstance(context.module(node), nn.Linear):
                yield Site(node)
                self._fail("sites")
        if self.fails == "junk":
            yield "junk"  # type: ignore[misc]

    def rewrite(self, site: Site) -> None:
        owner = site.node.graph.owning_module
        assert owner is not None
        layer = owner.get_submodule(str(site.node.target))
        assert isinstance(layer, nn.Linear)
        if self.fails == "bias":
            layer.bias = None
        if self.fails == "scale":
            layer.weight.mul_(1 + 1e-6)
        if self.fails == "nan":
            layer.weight.fill_(float("nan"))
        if self.fails == "broken":
            editing.set_attribute(owner, str(site.node.target), nn.Linear(3, 3))
        if self.fails == "dangling":
            site.node.target = "nowhere"
        if str(site.node.target).endswith("second"):
            layer.weight.zero_()
            self._fail("rewrite")


@dataclasses.dataclass(frozen=True)
class Endless(Pass):
    name: ClassVar[str] = "endless"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    repeat: ClassVar[bool] = True

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        yield from (Site(node) for node in context.gm.graph.nodes if node.op == "call_module")

    def rewrite(self, site: Site) -> None:
        """Nothing, for ever."""


class Mean:
    def __init__(self) -> None:
        self.values: list[float] = []

    def update(self, value: Tensor) -> None:
        self.values.append(float(value.mean()))

    def result(self) -> float:
        return sum(self.values) / len(self.values)


@dataclasses.dataclass(frozen=True)
class Centre(Pass):
    """Subtracts the mean of the calibration data: approximate, and in need of statistics."""

    name: ClassVar[str] = "centre"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CALIBRATION})

    def observes(self, context: PassContext) -> Iterator[Observation]:
        for node in context.gm.graph.nodes:
            if isinstance(context.module(node), nn.Linear):
                yield Observation(node, "mean", Mean)

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        for (node, key), mean in context.statistics.items():
            assert key == "mean"
            yield Site(node, mean, {"mean": mean})

    def rewrite(self, site: Site) -> None:
        owner = site.node.graph.owning_module
        assert owner is not None
        owner.get_submodule(str(site.node.target)).bias.sub_(site.data)  # type: ignore[union-attr, operator]


@dataclasses.dataclass(frozen=True)
class WantsExamples(DropIdentity):
    name: ClassVar[str] = "wants-examples"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})


# ------------------------------------------------------------------------------------------------------------ models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.dropped = nn.Identity()
        self.norm = nn.BatchNorm1d(6)
        self.also = nn.Identity()
        self.second = nn.Linear(6, 3)
        self.kept = nn.Identity()
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(self.second(self.also(self.norm(self.dropped(self.first(x)))).relu())) * self.mask


X = torch.linspace(-1, 1, 8).view(2, 4)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def snapshot(model: nn.Module) -> Any:
    code = model.code if isinstance(model, fx.GraphModule) else ""
    tensors = [(n, t.detach().clone(), t.requires_grad, id(t)) for n, t in model.state_dict(keep_vars=True).items()]
    flags = [(name, type(module), module.training) for name, module in model.named_modules()]
    return code, [(n, t.numpy().tobytes(), g, i) for n, t, g, i in tensors], flags


# --------------------------------------------------------------------------------------------------------- what it does


def test_one_pass(model: nn.Module) -> None:
    before, random = snapshot(model), torch.get_rng_state()
    gm = fxcompress.compile(model, [DropIdentity()], X)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert type(gm).__mro__[1] is fx.GraphModule
    assert not any(isinstance(m, nn.Identity) for n, m in gm.named_modules() if not n.startswith("kept"))
    assert torch.equal(gm(X), model(X))
    assert list(gm.state_dict()) == list(model.state_dict())
    assert not gm.training
    record = fxcompress.report(gm).passes[0]
    assert (record.name, record.options, record.guarantee) == ("drop-identity", {"keep": "kept"}, "exact")
    assert (record.sites, record.error, record.verified) == (2, 0.0, True)
    assert "float64 rerun" in record.verification
    assert record.details[0] == {
        "node": "dropped",
        "target": "dropped",
        "was": "Identity",
        "now": "first",
        "size": [1],
    }
    assert [(r.node, r.target, r.reason) for r in record.refusals] == [("kept", "kept", "asked to keep it")]
    parameters = 4 * 6 + 6 + 6 * 2 + 6 * 3 + 3
    assert record.parameters_before == record.parameters_after == parameters
    assert record.macs_before == record.macs_after == 2 * (4 * 6 + 6 * 3)
    # float32 parameters, running mean and variance, mask, and an int64 counter
    assert record.bytes_before == record.bytes_after == 4 * (parameters + 12 + 3) + 8
    total = fxcompress.report(gm).total
    assert (total.cr_p, total.cr_f, total.warnings) == (0.0, 0.0, ())
    assert total.seconds >= record.seconds > 0


def test_the_result_is_an_ordinary_graph_module(model: nn.Module) -> None:
    gm = fxcompress.compile(model, [DropIdentity()], X)
    again = copy.deepcopy(pickle.loads(pickle.dumps(gm)))
    assert torch.equal(again(X), model(X))
    assert fxcompress.report(again) == fxcompress.report(gm)
    assert Report.from_dict(json.loads(fxcompress.report(gm).to_json())) == fxcompress.report(gm)
    assert gm.train().training
    assert gm.double()(X.double()).dtype == torch.float64
    gm.load_state_dict(model.state_dict())


def test_an_empty_list(model: nn.Module) -> None:
    gm = fxcompress.compile(model, [], X)
    assert torch.equal(gm(X), model(X))
    report = fxcompress.report(gm)
    assert report.passes == ()
    assert report.total.parameters_before == report.total.parameters_after > 0
    assert report.total.macs_before == 84
    assert "total" in str(report)
    assert fxcompress.plan(model, [], X).passes == ()


def test_a_single_pass_needs_no_list(model: nn.Module) -> None:
    for one in (DropIdentity(), DropIdentity):
        assert len(fxcompress.report(fxcompress.compile(model, one, X)).passes) == 1


def test_inputs_may_come_in_any_form(model: nn.Module) -> None:
    for args, kwargs in [(X, None), ((X,), None), ([X], None), (None, {"x": X}), (Example((X,)), None)]:
        gm = fxcompress.compile(model, [DropIdentity()], args, example_kwargs=kwargs)
        assert torch.equal(gm(X), model(X))
        assert fxcompress.report(gm).passes[0].verified


def test_calling_again_continues_the_report(model: nn.Module) -> None:
    first = fxcompress.compile(model, [DropIdentity()], X)
    before = snapshot(first)
    second = fxcompress.compile(first, [DropIdentity(keep="nothing")], X)
    assert snapshot(first) == before
    assert len(fxcompress.report(first).passes) == 1
    report = fxcompress.report(second)
    assert [p.sites for p in report.passes] == [2, 1]
    assert report.total.macs_before == 84
    assert report.total.seconds > fxcompress.report(first).total.seconds
    assert torch.equal(second(X), model(X))
    again = fxcompress.report(fxcompress.compile(second, [DropIdentity(keep="nothing")], X))
    assert [p.sites for p in again.passes] == [2, 1, 0]
    assert (again.passes[2].error, again.passes[2].verified) == (0.0, True)


def test_a_graph_module_is_not_changed(model: nn.Module) -> None:
    gm = fx.symbolic_trace(model)
    gm._non_persistent_buffers_set.add("mask")
    before = snapshot(gm)
    out = fxcompress.compile(gm, [DropIdentity()], X)
    assert snapshot(gm) == before
    assert "mask" not in out.state_dict()
    assert "mask" in dict(out.named_buffers())


def test_repeat_until_nothing_is_left(model: nn.Module) -> None:
    record = fxcompress.report(fxcompress.compile(model, [OneAtATime()], X)).passes[0]
    assert record.sites == 2
    assert [d["node"] for d in record.details] == ["dropped", "also"]
    assert len(record.refusals) == 1


def test_statistics_come_from_the_calibration_data(model: nn.Module) -> None:
    data = [torch.zeros(2, 4), torch.ones(3, 4)]
    for calibration in (data, iter(data), [(b,) for b in data], [{"x": b} for b in data]):
        report = fxcompress.report(fxcompress.compile(model, [Centre()], X, calibration=calibration))
        record = report.passes[0]
        expected = float(torch.stack([model.first(b).mean() for b in data]).mean().detach())  # type: ignore[operator]
        assert record.details[0]["mean"] == pytest.approx(expected)
        assert record.verified
        assert "and the calibration data" in record.verification


def test_a_generator_is_streamed_if_it_is_read_once(model: nn.Module) -> None:
    seen: list[str] = []

    def stream() -> Iterator[Tensor]:
        for _ in range(2):
            seen.append("made")
            yield X

    def tell(event: Event) -> None:
        if event.stage == "calibrate":
            seen.append("used")

    fxcompress.compile(model, [Centre()], X, calibration=stream(), verify=False, progress=tell)
    assert seen == ["made", "used"] * 2


def test_training_mode_is_kept_and_nothing_learns_from_verification(model: nn.Module) -> None:
    gm = fxcompress.compile(model.train(), [DropIdentity()], X)
    assert gm.training
    assert torch.equal(gm.get_buffer("norm.running_mean"), torch.zeros(6))
    assert int(gm.get_buffer("norm.num_batches_tracked")) == 0


def test_without_example_inputs_it_says_unverified(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="nothing is verified") as caught:
        gm = fxcompress.compile(model, [DropIdentity(), DropIdentity(keep="nothing")])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    records = fxcompress.report(gm).passes
    assert [(r.verified, r.verification, r.error) for r in records] == [
        (False, "unverified: no example inputs", None)
    ] * 2
    assert records[0].macs_before is records[0].macs_after is fxcompress.report(gm).total.cr_f is None
    assert "unverified" in str(fxcompress.report(gm))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fxcompress.compile(model, [DropIdentity()], verify=False)
    assert torch.equal(gm(X), model(X))


def test_verify_false(model: nn.Module) -> None:
    record = fxcompress.report(fxcompress.compile(model, [Linears("bias")], X, verify=False)).passes[0]
    assert (record.verified, record.verification) == (False, "unverified: verify=False")
    assert record.parameters_after == record.parameters_before - 9


# ------------------------------------------------------------------------------------------------------------ progress


def test_progress_events(model: nn.Module) -> None:
    events: list[Event] = []
    fxcompress.compile(model, [DropIdentity()], X, progress=events.append)
    assert [e.stage for e in events] == ["trace", "sites", "rewrite", "rewrite", "rewrite", "verify", "done"]
    assert [(e.done, e.total) for e in events if e.stage == "rewrite"] == [(0, 2), (1, 2), (2, 2)]
    assert {e.pass_name for e in events[1:-1]} == {"drop-identity"}


def test_progress_on_stderr_only(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    fxcompress.compile(model, [DropIdentity()], X, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "done" in shown.err
    fxcompress.compile(model, [DropIdentity()], X)
    assert capsys.readouterr() == ("", "")


def test_progress_that_is_none(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="progress"):
        fxcompress.compile(model, [DropIdentity()], X, progress=3)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_shows_all_and_changes_nothing(model: nn.Module) -> None:
    gm = fx.symbolic_trace(model)
    for subject in (model, gm):
        before = snapshot(subject)
        plan = fxcompress.plan(subject, [DropIdentity(), DropIdentity(keep="nothing"), OneAtATime()], X)
        assert snapshot(subject) == before
        assert [p.name for p in plan.passes] == ["drop-identity", "drop-identity", "one-at-a-time"]
        assert [[s.node for s in p.sites] for p in plan.passes] == [["dropped", "also"], ["kept"], []]
        assert [[r.node for r in p.refusals] for p in plan.passes] == [["kept"], [], []]
        assert plan.passes[0].sites[0].detail["now"] == "first"
        table = str(plan)
        for text in ("asked to keep it", "was=Identity", "nothing to do", "rewrite", "leave"):
            assert text in table


def test_a_plan_finds_what_compile_does(model: nn.Module) -> None:
    passes = [Centre(), OneAtATime()]
    plan = fxcompress.plan(model, passes, X, calibration=[X])
    report = fxcompress.report(fxcompress.compile(model, passes, X, calibration=[X]))
    assert [tuple(s.to_dict() for s in p.sites) for p in plan.passes] == [r.details for r in report.passes]
    assert [p.refusals for p in plan.passes] == [r.refusals for r in report.passes]


def test_a_plan_raises_as_compile_does(model: nn.Module) -> None:
    with pytest.raises(PassError, match="'second'"):
        fxcompress.plan(model, [Linears("rewrite")], X)


# ----------------------------------------------------------------------------------------------------- transactionality


@pytest.mark.parametrize(
    ("fails", "kind", "says"),
    [
        ("rewrite", PassError, r"pass 'linears' failed at 'second' \('second'\), site 2 of 2: KeyError: 'rewrite'"),
        ("sites", PassError, r"pass 'linears' failed in sites\(\): KeyError: 'sites'"),
        ("observes", PassError, r"pass 'linears' failed in observes\(\): KeyError"),
        ("requires", PassError, r"pass 'linears' failed in requires\(\): KeyError"),
        ("refuse", PreconditionError, "^linears: this model has an odd name$"),
        ("junk", PassError, "must yield Site and Refusal objects, found str"),
        ("dangling", PassError, "left a broken graph after rewriting first, second"),
        ("bias", VerificationError, "'linears' .*output differs by"),
        ("scale", VerificationError, "'linears' .*output differs by .* in float64|in float64, output differs by"),
        ("nan", VerificationError, "gives NaN at output on the example inputs"),
        ("broken", VerificationError, "'linears' .* fails on the example inputs .*RuntimeError"),
    ],
)
@pytest.mark.parametrize("kind_of_model", ["module", "graph", "compressed"])
def test_a_pass_that_goes_wrong(model: nn.Module, fails: str, kind: Any, says: str, kind_of_model: str) -> None:
    subject = {
        "module": lambda: model,
        "graph": lambda: fx.symbolic_trace(model),
        "compressed": lambda: fxcompress.compile(model, [], X),
    }[kind_of_model]()
    before, inputs = snapshot(subject), X.clone()
    with pytest.raises(kind, match=says) as caught:
        fxcompress.compile(subject, [DropIdentity(), Linears(fails)], X)
    assert snapshot(subject) == before
    assert torch.equal(X, inputs)
    assert torch.equal(subject(X), model(X))
    if kind is PassError and "KeyError" in says:
        assert isinstance(caught.value.__cause__, KeyError)
        assert "Your model is unchanged" in str(caught.value)


def test_a_broken_graph_is_named_without_verification(model: nn.Module) -> None:
    with pytest.raises(PassError, match="the graph that pass 'linears' left fails on the example inputs: RuntimeError"):
        fxcompress.compile(model, [Linears("broken")], X, verify=False)


def test_a_pass_that_never_ends(model: nn.Module) -> None:
    with pytest.raises(PassError, match=r"'endless' still finds sites after \d+ rounds, the last at 'kept'"):
        fxcompress.compile(model, [Endless()], X)


# ------------------------------------------------------------------------------------------------------------ bad input


class OwnError(Exception):
    pass


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise OwnError("out of coffee")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (3, "must be a torch.nn.Module, found a int"),
        (Net, "found the class Net; call it to make one"),
        (lambda x: x, "found a function"),
    ],
)
def test_no_model(bad: Any, says: str) -> None:
    for call in (fxcompress.compile, fxcompress.plan):
        with pytest.raises(UsageError, match=says):
            call(bad, [DropIdentity()], X)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torch_script() -> None:
    with pytest.raises(UsageError, match="TorchScript"):
        fxcompress.compile(torch.jit.script(nn.Sequential(nn.Linear(4, 4))), [DropIdentity()], X)


def test_a_model_without_values() -> None:
    with pytest.raises(PreconditionError, match=r"'first.weight' is on the meta device .*to_empty"):
        fxcompress.compile(Net().to("meta"), [DropIdentity()], X)
    with pytest.raises(PreconditionError, match=r"'0.weight' is uninitialised \(a lazy module\)"):
        fxcompress.compile(nn.Sequential(nn.LazyLinear(3)), [DropIdentity()], X)


def test_what_torch_compile_made_is_unwrapped(model: nn.Module) -> None:
    gm = fxcompress.compile(torch.compile(model), [DropIdentity()], X)  # type: ignore[arg-type]
    assert list(gm.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("inputs", [(X, X), (), X.view(4, 2), {"x": X}, 3, "x"])
@pytest.mark.parametrize("as_graph", [False, True])
def test_inputs_that_do_not_fit(model: nn.Module, inputs: Any, as_graph: bool) -> None:
    subject = fx.symbolic_trace(model) if as_graph else model
    before = snapshot(subject)
    with pytest.raises(FxCompressError):
        fxcompress.compile(subject, [DropIdentity()], inputs)
    assert snapshot(subject) == before


def test_unknown_keyword_inputs(model: nn.Module) -> None:
    for subject in (model, fx.symbolic_trace(model)):
        with pytest.raises(UsageError, match="image"):
            fxcompress.compile(subject, [DropIdentity()], X, example_kwargs={"image": X})
        with pytest.raises(UsageError, match="dict of keyword arguments"):
            fxcompress.compile(subject, [DropIdentity()], X, example_kwargs=[X])  # type: ignore[arg-type]


def test_a_model_that_fails_shows_its_own_error() -> None:
    with pytest.raises(FxCompressError, match="out of coffee") as caught:
        fxcompress.compile(Failing(), [DropIdentity()], X)
    causes = []
    error: BaseException | None = caught.value
    while error is not None:
        causes.append(type(error))
        error = error.__cause__
    assert OwnError in causes


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        (3, "`passes` is a list of Pass objects and names, not int"),
        ([3], "not 3 \\(int\\)"),
        ([None], "not None"),
        ({"drop-identity"}, "`passes` is a list"),
    ],
)
def test_no_passes(model: nn.Module, passes: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        fxcompress.compile(model, passes, X)


def test_needs_are_checked_before_anything_runs() -> None:
    with pytest.raises(PreconditionError, match="pass 'centre' needs `calibration`"):
        fxcompress.compile(Failing(), [DropIdentity(), Centre()], X)
    with pytest.raises(PreconditionError, match="pass 'wants-examples' needs `example_inputs`"):
        fxcompress.compile(Failing(), [WantsExamples()])


def test_labels_in_the_calibration_data(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="inputs and labels"):
        fxcompress.compile(model, [Centre()], X, calibration=[(X, torch.zeros(2))])
    with pytest.raises(UsageError, match="iterable of batches"):
        fxcompress.compile(model, [Centre()], X, calibration=X)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(model: nn.Module, value: float) -> None:
    model.second.weight.data[1, 2] = value  # type: ignore[index, union-attr]
    before = snapshot(model)
    with pytest.raises(PreconditionError, match=r"parameter 'second.weight' has 1 (NaN|infinite) of 18 values"):
        fxcompress.compile(model, [DropIdentity()], X)
    assert snapshot(model) == before


def test_weights_that_are_not_finite_without_verification(model: nn.Module) -> None:
    model.second.weight.data[1, 2] = float("nan")  # type: ignore[index, union-attr]
    # Without inputs: the trace, which compares too, has nothing to run.
    with pytest.warns(UserWarning, match="'second.weight' has 1 NaN"):
        gm = fxcompress.compile(model, [DropIdentity()], verify=False)
    assert "'second.weight' has 1 NaN" in fxcompress.report(gm).total.warnings[0]
    assert "'second.weight' has 1 NaN" in str(fxcompress.report(gm))


def test_a_nan_buffer_is_refused_and_an_infinite_one_is_not(model: nn.Module) -> None:
    model.norm.running_mean[0] = float("nan")  # type: ignore[index, operator, union-attr]
    with pytest.raises(PreconditionError, match=r"buffer 'norm.running_mean' has 1 NaN of 6 values"):
        fxcompress.compile(model, [DropIdentity()], X)
    model.norm.running_mean[0] = 0.0  # type: ignore[index, operator, union-attr]

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model
            self.register_buffer("mask", torch.tensor([0.0, -float("inf"), 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.mask

    assert fxcompress.report(fxcompress.compile(Masked().eval(), [DropIdentity()], X)).passes[0].verified


# ------------------------------------------------------------------------------------------------------------- editing


class Holder(nn.Module):
    """One layer at two paths, one of which is called by the graph and one by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.inner = nn.Module()
        self.inner.used = nn.Linear(4, 4)
        self.inner.other = self.inner.used
        self.inner.unused = nn.Linear(4, 4)
        self.twin = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.used(self.a(x))  # type: ignore[operator, union-attr]


def test_clean_up_spares_what_another_path_needs() -> None:
    model = Holder()
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("twin.used", (graph.call_module("b", (x,)),)))
    gm = fx.GraphModule(model, graph)
    for name in ("a", "inner"):
        setattr(gm, name, getattr(model, name))
    editing.clean_up(gm)
    assert torch.equal(gm(X), model(X))
    assert {n for n, _ in gm.named_parameters()} == {"b.weight", "b.bias", "twin.used.weight", "twin.used.bias"}


def chain(nodes: int) -> fx.GraphModule:
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    for i in range(nodes // 4):
        root.add_module(f"linear{i}", nn.Linear(2, 2))
        root.add_module(f"identity{i}", nn.Identity())
        x = graph.call_module(f"identity{i}", (graph.call_module(f"linear{i}", (x,)),))
        x = graph.call_function(torch.add, (graph.call_function(torch.relu, (x,)), 1.0))
    graph.output(x)
    return fx.GraphModule(root, graph)


def test_overhead_is_linear() -> None:
    """Ten times the nodes in far less than the hundred times of anything quadratic. CPU time, as CI is shared."""
    seconds = []
    for nodes in (400, 4000):
        gm = chain(nodes)
        start = time.process_time()
        out = fxcompress.compile(gm, [DropIdentity()], X[:, :2], verify=False)
        seconds.append(time.process_time() - start)
        assert fxcompress.report(out).passes[0].sites == nodes // 4
    assert seconds[1] < 40 * seconds[0]
