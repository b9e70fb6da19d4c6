"""A teacher, taps and losses in a student's graph, and the student out of it again."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.passes.distillation import (
    AttachDistillation,
    AttentionTransfer,
    FactorTransfer,
    FeatureMatching,
    Hint,
    SimilarityPreserving,
    SoftTargets,
    suggest_taps,
)
from tests import contract
from tests.networks import Network, leaves, run
from tests.strategies import networks


class Block(nn.Module):
    """A residual block that writes to what it adds up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    """Two stages of blocks."""

    def __init__(self, width: int = 8, depth: int = 1, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.one = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.two = nn.Sequential(*(Block(2 * width) for _ in range(depth)))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.down(self.one(self.stem(x))))
        return self.head(x.mean((2, 3)))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])
FEATURES = [AttentionTransfer(weight=2.0), Hint(), FactorTransfer(), SimilarityPreserving()]


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Net(4).eval(), Net(8, 2).eval()


def fused(student: nn.Module, teacher: Any, losses: Any = (), **options: Any) -> fx.GraphModule:
    return fxcompress.compile(student, [AttachDistillation(teacher, losses, **options)], X)


def test_one_step_is_that_of_a_loop_by_hand() -> None:
    student, teacher = nets()
    gm = fused(student, teacher, [SoftTargets(temperature=3.0, alpha=0.7), Hint(weight=0.5)], taps=[("one", "one")])
    assert not hasattr(student, "distillation")
    gm.train()
    output, terms, loss = gm(X, labels=Y)
    loss.backward()

    seen: dict[str, Tensor] = {}
    student.train()
    for network in (student, teacher):
        network.one.register_forward_hook(lambda m, a, y: seen.update({str(len(seen)): y}))
    expected = student(X)
    with torch.no_grad():
        target = teacher(X)
    soft = F.kl_div((expected / 3).log_softmax(1), (target / 3).log_softmax(1), log_target=True, reduction="batchmean")
    regressor = gm.get_submodule("distillation.terms.hint.loss.regressor")
    hint = (regressor(seen["0"].movedim(1, -1)).movedim(-1, 1) - seen["1"]).square().mean()
    task = F.cross_entropy(expected, Y)
    wanted = 0.7 * 9 * soft + 0.3 * task + 0.5 * hint
    wanted.backward()
    assert torch.allclose(output, expected)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert set(terms) == {"soft_targets", "hint"}
    assert float(terms["hint"].detach()) == pytest.approx(float(hint.detach()), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gm.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_teacher_stays_as_it_is() -> None:
    student, teacher = nets()
    before = copy.deepcopy(teacher.state_dict())
    gm = fused(student, teacher.train(), FEATURES).train()
    ours = gm.get_submodule("distillation.teacher")
    assert not any(m.training for m in ours.modules())
    assert not any(p.requires_grad for p in ours.parameters())
    optimiser = torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], lr=0.01)
    gm(X)[2].backward()
    optimiser.step()
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    held = {k.split(".", 2)[2]: v for k, v in ours.state_dict().items()}
    assert all(torch.equal(before[k], v) for k, v in held.items() if k in before)
    learned = [p for n, p in gm.named_parameters() if ".terms." in n and p.requires_grad]
    assert learned
    assert all(p.grad is not None for p in learned)


@given(network=networks())
@settings(deadline=None, max_examples=25)
def test_students_come_back_node_for_node(network: Network) -> None:
    """Whatever the student: its outputs stay, its copies work, and it comes back as it was."""
    given_ = {"example_inputs": network.args, "example_kwargs": network.kwargs}
    plain = fxcompress.compile(network.module, [], **given_)
    assume(all(y.dim() in (2, 4) for _, y in leaves(run(plain, network.fresh(4))) if isinstance(y, Tensor)))
    assume(any(isinstance(y, Tensor) and y.is_floating_point() for _, y in leaves(run(plain, network.fresh(4)))))
    gm = fxcompress.compile(network.module, [AttachDistillation(network.module)], **given_)
    inputs = network.fresh(5, network.batch + 1)
    for other in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        output, terms, loss = run(other, inputs)
        for (_, a), (_, b) in zip(leaves(run(plain, inputs)), leaves(output), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        assert float(loss) == pytest.approx(float(terms["soft_targets"]))
        assert abs(float(loss)) < 1e-4, "it is its own teacher"
    back = fxcompress.compile(gm, ["detach-distillation"], **given_)
    assert [(n.op, n.name, str(n.target)) for n in back.graph.nodes] == [
        (n.op, n.name, str(n.target)) for n in plain.graph.nodes
    ]
    assert back.code == plain.code
    contract.assert_untouched({"state": plain.state_dict()}, {"state": back.state_dict()})
    contract.check_outputs(network, back, network.tolerance)


def test_dynamo_takes_it_whole() -> None:
    student, teacher = nets()
    gm = fused(student, teacher, [SoftTargets(alpha=0.5), *FEATURES]).train()
    twin = copy.deepcopy(gm)
    torch._dynamo.reset()
    fast = torch.compile(twin, backend="eager", fullgraph=True)
    for one, other in ((gm, gm), (twin, fast)):
        torch.manual_seed(0)
        other(X, labels=Y)[2].backward()
        one.zero_grad(set_to_none=False)
    a, b = (call(X, labels=Y) for call in (gm.eval(), torch.compile(twin.eval(), backend="eager", fullgraph=True)))
    assert torch.allclose(a[0], b[0], atol=1e-5)
    assert torch.allclose(a[2], b[2], rtol=1e-4)


def test_several_teachers_are_averaged() -> None:
    student, teacher = nets()
    torch.manual_seed(5)
    other = Net(8, 2).eval()
    gm = fused(student, [teacher, other], [SoftTargets()])
    with torch.no_grad():
        target = (teacher(X) + other(X)) / 2
        expected = SoftTargets()(student(X), target)
    assert torch.allclose(gm(X)[2], expected, rtol=1e-5)


def test_outputs_of_the_teacher_may_come_with_the_data() -> None:
    student, teacher = nets()
    gm = fused(student, None, [SoftTargets(alpha=0.5)])
    given_ = teacher(X).detach()
    whole = fused(student, teacher, [SoftTargets(alpha=0.5)])
    assert torch.allclose(gm(X, labels=Y, teacher_output=given_)[2], whole(X, labels=Y)[2])
    with pytest.raises(ValueError, match="teacher_output"):
        gm(X, labels=Y)
    with pytest.raises(ValueError, match="labels"):
        gm(X, teacher_output=given_)
    assert fxcompress.compile(gm, ["detach-distillation"], X, example_kwargs={"labels": Y, "teacher_output": given_})(
        X
    ).shape == (4, 5)


def test_the_student_may_be_its_own_teacher_and_be_in_containers() -> None:
    class Dict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(x), "b": self.b(x)}

    student, x = Dict(), torch.randn(2, 4)
    for output, width in ((None, 3), ("a", 3), ("b", 2)):
        gm = fxcompress.compile(student, [AttachDistillation(student, output=output)], x)
        call = next(n for n in gm.graph.nodes if n.target == "distillation.terms.soft_targets")
        assert gm.get_submodule(str(call.args[0].target)).out_features == width  # type: ignore[union-attr]
        assert gm.get_submodule("distillation.teacher.networks.0") is not student
    with pytest.raises(UsageError, match=r"no output 'c'.*\['a'\]"):
        fxcompress.compile(student, [AttachDistillation(student, output="c")], x)


class Language(nn.Module):
    """Logits for every token, and a loss of its own where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, ids: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        logits = scale * self.head(self.table(ids))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.mT, labels), "logits": logits}


def test_tokens_and_labels_that_the_student_takes_itself() -> None:
    torch.manual_seed(0)
    student, ids = Language().eval(), torch.randint(11, (3, 5))
    losses = [SoftTargets(alpha=0.5, channel_dim=-1)]
    attach = AttachDistillation(Language().eval(), losses, output="logits")
    with pytest.raises(PreconditionError, match="takes 'labels' itself"):
        fxcompress.compile(student, [attach], ids, example_kwargs={"scale": 1.0})
    passes = [attach, "remove-identity", "detach-distillation"]
    gm = fxcompress.compile(student, passes, ids, example_kwargs={"labels": ids, "scale": 1.0})
    assert set(gm(ids, labels=ids, scale=1.0)) == {"loss", "logits"}
    only = nn.Sequential(student.table, student.head)
    gm = fxcompress.compile(only, [AttachDistillation(only, losses), "remove-identity"], ids)
    half = 0.5 * F.cross_entropy(only(ids).mT, ids)
    assert torch.allclose(gm(ids, labels=ids)[2], half, rtol=1e-4)


# --- taps ---


def test_taps_by_name() -> None:
    student, teacher = nets()
    for name in ("one", "one.0", "one.0.conv", "stem"):
        gm = fused(student, teacher, [AttentionTransfer()], taps=[(name, name)])
        assert gm(X)[2].isfinite()
    gm = fused(student, teacher, [AttentionTransfer()], taps=[("add", "one.0.norm")])
    call = next(n for n in gm.graph.nodes if "terms" in str(n.target))
    assert call.args[0].target == "clone", "what is written to later is kept as it was"  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="near it: one"):
        fused(student, teacher, [Hint()], taps=[("ones", "one")])
    with pytest.raises(UsageError, match="in the teacher; near it"):
        fused(student, teacher, [Hint()], taps=[("one", "three")])


def test_a_tap_that_a_pass_took_away() -> None:
    student, teacher = nets()
    attach = AttachDistillation(teacher, [AttentionTransfer()], taps=[("one.0.norm", "one.0.norm")])
    with pytest.raises(UsageError, match=r"pass 'fold-batch-norm' rewrote it; .* its place .*one\.0\.conv"):
        fxcompress.compile(student, ["fold-batch-norm", attach], X)
    expected = float(fxcompress.compile(student, [attach], X)(X)[2].detach())
    for passes in ([attach, "fold-batch-norm"], ["remove-identity", attach]):
        gm = fxcompress.compile(student, passes, X)
        assert float(gm(X)[2].detach()) == pytest.approx(expected, rel=1e-4)
    by_path = AttachDistillation(teacher, [AttentionTransfer()], taps=[("one.0.conv", "one.0.conv")])
    gm = fxcompress.compile(student, ["alds:ratio=0.3", by_path], X)
    assert fxcompress.report(gm).passes[0].sites
    assert gm(X)[2].isfinite(), "the pair that took its place is at its path"


def test_pruning_what_is_tapped() -> None:
    student, teacher = nets()
    gm = fxcompress.compile(
        student, [AttachDistillation(teacher, [Hint()], taps=[("two", "two")]), "prune-channels:ratio=0.5"], X
    )
    records = fxcompress.report(gm).passes
    assert records[-1].sites > 0
    gm(X)[2].backward()
    back = fxcompress.compile(gm, ["detach-distillation"], X)
    assert back(X).shape == (4, 5)


def test_pruned_students_know_their_channels() -> None:
    _, teacher = nets()
    passes = ["prune-channels:ratio=0.3", "prune-channels:ratio=0.3"]
    matching = AttachDistillation(teacher, [FeatureMatching()], taps=[("one", "one"), ("down", "down")])
    gm = fxcompress.compile(teacher, [*passes, matching], X)
    pruned = fxcompress.compile(teacher, passes, X)
    for number, (tap, layer) in enumerate((("one", "stem"), ("down", "down")), start=1):
        channels = gm.get_submodule(f"distillation.terms.feature_matching_at_{number}").loss.channels
        kept, all_ = pruned.get_submodule(layer), teacher.get_submodule(layer)
        assert len(channels) == kept.out_channels < all_.out_channels
        assert torch.equal(all_.bias[channels], kept.bias)
        assert tap in fxcompress.report(gm).passes[-1].details[0]["taps"][number - 1]


def test_suggestions() -> None:
    student, teacher = nets()
    pairs = suggest_taps(student, teacher, X)
    assert len(pairs) == 2
    gm = fused(student, teacher, [AttentionTransfer()])
    assert fxcompress.report(gm).passes[-1].details[0]["taps"] == [f"{a} <- {b}" for a, b in pairs]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4).eval()
    smaller = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 16, batch_first=True), 2).eval()
    sequence = torch.randn(2, 5, 8)
    narrow = nn.Sequential(nn.Linear(8, 4), smaller)
    found = suggest_taps(narrow, encoder, sequence)
    assert len(found) > 1
    with pytest.raises(UsageError, match="name pairs yourself"):
        suggest_taps(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.Sequential(nn.Conv2d(3, 4, 5)), X)


def test_other_positions_are_resized_or_refused() -> None:
    student, teacher = nets()
    with pytest.raises(UsageError, match="resize=True"):
        fused(student, teacher, [Hint()], taps=[("two", "one")])
    with pytest.warns(UserWarning, match="interpolated"):
        gm = fused(student, teacher, [Hint()], taps=[("two", "one")], resize=True)
    assert gm(X)[2].isfinite()


# --- bad input ---


def test_what_is_refused() -> None:
    student, teacher = nets()
    with pytest.raises(UsageError, match=r"gives \(4, 5\) and a teacher \(4, 7\)"):
        fused(student, Net(classes=7).eval())
    with pytest.raises(PreconditionError, match="nobody to learn from"):
        fused(student, None)
    with pytest.raises(PreconditionError, match="read features"):
        fused(student, None, [Hint()])
    with pytest.raises(UsageError, match="DistillationLoss modules"):
        AttachDistillation(teacher, [nn.MSELoss()])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="a teacher is a module"):
        AttachDistillation("resnet18")  # type: ignore[arg-type]
    gm = fused(student, teacher)
    with pytest.raises(PreconditionError, match="detach-distillation before"):
        fused(gm, teacher)
    with pytest.raises(UsageError, match="the teacher has distillation"):
        fused(student, gm)
    with pytest.raises(UsageError, match="averaged"):
        fused(student, [teacher, Net(4).eval()], [Hint()], taps=[("one", "one")])


def test_losses_of_one_name_get_numbers_and_records_stay_short() -> None:
    student, teacher = nets()
    gm = fused(student, teacher, [SoftTargets(1.0), SoftTargets(4.0)])
    assert list(gm(X)[1]) == ["soft_targets_1", "soft_targets_2"]
    record = fxcompress.report(gm).passes[-1]
    assert record.options["teacher"] == "Net"
    assert len(str(record)) < 3000


def test_in_another_dtype() -> None:
    student, teacher = nets()
    gm = fxcompress.compile(student.double(), [AttachDistillation(teacher, [SoftTargets(), Hint()])], X.double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, _, loss = gm(X.double())
    assert output.dtype is torch.float64
    assert loss.dtype is torch.float64


def test_a_teacher_without_parameters_has_the_dtype_of_its_buffers() -> None:
    teacher, x = nn.BatchNorm1d(4, affine=False).eval(), torch.randn(5, 4)
    student = nn.Linear(4, 4).eval()
    gm = fxcompress.compile(student, [AttachDistillation(teacher, [SoftTargets()])], x)
    assert "float64 rerun" in fxcompress.report(gm).passes[-1].verification
    gm = fxcompress.compile(student.double(), [AttachDistillation(teacher, [SoftTargets()])], x.double())
    assert gm(x.double())[2].isfinite()
