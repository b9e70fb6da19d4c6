"""Losses of distillation, against plain arithmetic and against what each is indifferent to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.passes.distillation import (
    AttentionTransfer,
    DecoupledKD,
    DistillationLoss,
    FactorTransfer,
    FeatureMatching,
    Hint,
    SimilarityPreserving,
    SoftTargets,
)

DOUBLE = torch.float64
LABELS = torch.tensor([2, 0, 1])
SEEDS = st.integers(0, 10_000)

# Each with a value it reads; the student's has other channels where that is allowed.
CASES: dict[str, tuple[DistillationLoss, tuple[int, ...], tuple[int, ...]]] = {
    "soft": (SoftTargets(), (3, 4), (3, 4)),
    "soft-labels": (SoftTargets(alpha=0.3), (3, 4), (3, 4)),
    "decoupled": (DecoupledKD(), (3, 4), (3, 4)),
    "attention": (AttentionTransfer(), (3, 4, 2, 3), (3, 6, 2, 3)),
    "attention-tokens": (AttentionTransfer(p=1), (3, 5, 4), (3, 5, 6)),
    "attention-line": (AttentionTransfer(channel_dim=1), (3, 4, 5), (3, 6, 5)),
    "hint": (Hint(), (3, 4, 2, 3), (3, 6, 2, 3)),
    "hint-vector": (Hint(), (3, 4), (3, 6)),
    "hint-tokens": (Hint(), (3, 5, 4), (3, 5, 6)),
    "hint-same": (Hint(), (3, 4, 2, 3), (3, 4, 2, 3)),
    "matching": (FeatureMatching(), (3, 4, 2, 3), (3, 4, 2, 3)),
    "matching-some": (FeatureMatching([5, 0, 2, 1]), (3, 4, 2, 3), (3, 6, 2, 3)),
    "matching-tokens": (FeatureMatching([5, 0, 2, 1]), (3, 5, 4), (3, 5, 6)),
    "similarity": (SimilarityPreserving(), (3, 4, 2, 3), (3, 5, 7)),
    "similarity-vector": (SimilarityPreserving(), (3, 4), (3, 6)),
    "factor": (FactorTransfer(), (3, 4, 2, 3), (3, 6, 2, 3)),
    "factor-tokens": (FactorTransfer(p=2), (3, 5, 4), (3, 5, 6)),
    "factor-volume": (FactorTransfer(rate=0.1), (3, 4, 2, 2, 2), (3, 6, 2, 2, 2)),
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def case(name: str, dtype: torch.dtype = DOUBLE) -> tuple[DistillationLoss, Tensor, Tensor]:
    loss, student, teacher = CASES[name]
    torch.manual_seed(0)
    made = loss.prepared(torch.Size(student), torch.Size(teacher)).to(dtype)
    return made, draw(*student, seed=1, dtype=dtype), draw(*teacher, seed=2, dtype=dtype)


def log_sum_exp(numbers: list[float]) -> float:
    return math.log(sum(math.exp(z) for z in numbers))


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(numbers: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in numbers)
    return [math.exp(z) / total for z in numbers]


def unit(numbers: list[float]) -> list[float]:
    norm = math.sqrt(sum(x * x for x in numbers))
    return [x / norm for x in numbers]


class TestByHand:
    """Numbers that plain arithmetic gives."""

    STUDENT = ((1.0, 2.0, 3.0), (0.5, -1.0, 0.0))
    TEACHER = ((2.0, 0.0, 1.0), (0.0, 1.0, -2.0))

    def soft(self, t: float) -> float:
        """The sample's mean of KL, without T²."""
        each = (
            divergence(softmax([z / t for z in b]), softmax([z / t for z in a]))
            for a, b in zip(self.STUDENT, self.TEACHER, strict=True)
        )
        return sum(each) / 2

    def logits(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.STUDENT, dtype=DOUBLE), torch.tensor(self.TEACHER, dtype=DOUBLE)

    def test_soft_targets(self) -> None:
        found = SoftTargets(temperature=2.0)(*self.logits())
        assert found.item() == pytest.approx(4 * self.soft(2.0), rel=1e-12)

    def test_soft_targets_and_labels(self) -> None:
        hard = (log_sum_exp([1, 2, 3]) - 3 + log_sum_exp([0.5, -1, 0]) - 0.5) / 2
        found = SoftTargets(temperature=3.0, alpha=0.25)(*self.logits(), labels=torch.tensor([2, 0]))
        assert found.item() == pytest.approx(0.25 * 9 * self.soft(3.0) + 0.75 * hard, rel=1e-12)

    def test_decoupled(self) -> None:
        wanted = 0.0
        for student, teacher, t in zip(self.STUDENT, self.TEACHER, (2, 0), strict=True):
            p, q = (softmax([z / 2 for z in logits]) for logits in (teacher, student))
            target = divergence([p[t], 1 - p[t]], [q[t], 1 - q[t]])
            others = [[x / (1 - r[t]) for i, x in enumerate(r) if i != t] for r in (p, q)]
            wanted += 4 * (0.5 * target + 3.0 * divergence(*others)) / 2
        found = DecoupledKD(alpha=0.5, beta=3.0, temperature=2.0)(*self.logits(), torch.tensor([2, 0]))
        assert found.item() == pytest.approx(wanted, rel=1e-12)

    def test_attention(self) -> None:
        # Two channels of two places. The teacher's first sample has 3 and 4 in one place: its map is (25, 0).
        student = torch.tensor([[[[1.0, 2.0]], [[2.0, 0.0]]], [[[1.0, 1.0]], [[0.0, 0.0]]]])
        teacher = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]], [[[2.0, 2.0]], [[0.0, 0.0]]]])
        a = unit([1 + 4, 4 + 0])
        wanted = math.hypot(a[0] - 1, a[1]) / 2  # the second sample's maps are alike
        assert AttentionTransfer()(student, teacher).item() == pytest.approx(wanted, rel=1e-6)
        a = unit([1 + 2, 2])
        assert AttentionTransfer(p=1)(student, teacher).item() == pytest.approx(
            math.hypot(a[0] - 1, a[1]) / 2, rel=1e-6
        )

    def test_attention_reads_tokens_by_their_last_dimension(self) -> None:
        student, teacher = torch.tensor([[[1.0, 2.0], [2.0, 0.0]]]), torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
        a = unit([1 + 4, 4])
        assert AttentionTransfer()(student, teacher).item() == pytest.approx(math.hypot(a[0] - 1, a[1]), rel=1e-6)

    def test_hint(self) -> None:
        loss = Hint().prepared(torch.Size((1, 2, 1, 2)), torch.Size((1, 1, 1, 2)))
        assert loss.regressor is not None
        with torch.no_grad():
            loss.regressor.weight.copy_(torch.tensor([[2.0, -1.0]]))
            loss.regressor.bias.fill_(0.5)
        student = torch.tensor([[[[1.0, 3.0]], [[2.0, 1.0]]]])  # regressed: 2 - 2 + 0.5 and 6 - 1 + 0.5
        teacher = torch.tensor([[[[1.5, 4.0]]]])
        assert loss(student, teacher).item() == pytest.approx((1.0**2 + 1.5**2) / 2, rel=1e-6)

    def test_feature_matching(self) -> None:
        teacher = torch.tensor([[1.0, 2.0, 3.0]])
        assert FeatureMatching()(torch.tensor([[1.0, 4.0, 2.0]]), teacher).item() == pytest.approx((4 + 1) / 3)
        assert FeatureMatching([2, 0])(torch.tensor([[1.0, 4.0]]), teacher).item() == pytest.approx((4 + 9) / 2)

    def test_similarity(self) -> None:
        # Q = [[1, 0], [1, 1]]: Q Q^T = [[1, 1], [1, 2]]. The teacher's samples are orthogonal: the identity.
        rows = [unit([1, 1]), unit([1, 2])]
        wanted = sum((x - (i == j)) ** 2 for i, row in enumerate(rows) for j, x in enumerate(row)) / 4
        found = SimilarityPreserving()(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[5.0, 0, 0], [0, 0, 2.0]]))
        assert found.item() == pytest.approx(wanted, rel=1e-6)

    @pytest.mark.parametrize("p", [1, 2])
    def test_factor_transfer(self, p: int) -> None:
        """Coders that stand for given multiples: one place, and the middle of each convolution alone is reached."""
        one = torch.Size((2, 1, 1, 2))
        loss = FactorTransfer(rate=2, p=p).prepared(one, one).double().eval()
        assert loss.paraphraser is not None
        assert loss.translator is not None
        set_taps(loss.paraphraser["encoder"], [[[2.0]], [[1.0], [3.0]], [[1.0, 0.0], [0.0, 1.0]]])  # F = (2x, 6x)
        set_taps(loss.paraphraser["decoder"], [[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5]], [[1.0]]])  # 4x
        set_taps(loss.translator, [[[1.0]], [[4.0], [3.0]], [[1.0, 0.0], [0.0, 1.0]]])  # (4x, 3x)
        student = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 2.0]]]], dtype=DOUBLE)
        teacher = torch.tensor([[[[3.0, 0.0]]], [[[0.0, -1.0]]]], dtype=DOUBLE)
        wanted = 0.0
        for sign in (1, -1):  # of the teacher's sample, and so of its factor
            apart = [a - sign * b for a, b in zip(unit([4, 3]), unit([2, 6]), strict=True)]
            wanted += sum(abs(x) ** p for x in apart) ** (1 / p) / 2
        # 12 for 3; -1 comes back as -4, a tenth of it after each of six layers; and nothing for two zeros.
        wrong = (9.0**2 + (1 - 4e-6) ** 2) / 4
        assert loss(student, teacher).item() == pytest.approx(wanted + wrong, rel=1e-12)
        assert loss.reconstruction(teacher).item() == pytest.approx(wrong, rel=1e-12)
        assert loss.freeze()(student, teacher).item() == pytest.approx(wanted, rel=1e-12)


def set_taps(coder: nn.Module, weights: list[list[list[float]]]) -> None:
    """Let convolutions map channels by these matrices at each place alone, and normalisation do nothing."""
    convolutions = [m for m in coder.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    with torch.no_grad():
        for m, rows in zip(convolutions, weights, strict=True):
            matrix = torch.tensor(rows, dtype=DOUBLE)
            m.weight.zero_()
            m.weight[:, :, 1, 1] = matrix.T if isinstance(m, nn.ConvTranspose2d) else matrix
    for norm in (m for m in coder.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = 0.0


class TestProperties:
    """What holds for any values, in double precision."""

    @given(SEEDS, st.sampled_from(["soft", "decoupled", "hint-same", "matching", "attention", "similarity"]))
    def test_zero_where_both_agree(self, seed: int, name: str) -> None:
        loss, shape, _ = CASES[name]
        x = draw(*shape, seed=seed).requires_grad_()
        value = loss(x, x.detach(), LABELS)
        value.backward()  # type: ignore[no-untyped-call]
        assert value.item() == pytest.approx(0, abs=1e-14)
        assert x.grad is not None
        assert x.grad.abs().max() < 1e-12

    @given(SEEDS, st.floats(1e-3, 1e3), st.permutations(range(6)))
    def test_attention_is_blind_to_order_and_scale_of_channels(self, seed: int, by: float, order: list[int]) -> None:
        student, teacher = draw(2, 4, 2, 3, seed=seed), draw(2, 6, 2, 3, seed=seed + 1)
        value = AttentionTransfer()(student, teacher)
        torch.testing.assert_close(AttentionTransfer()(by * student, teacher[:, order]), value)

    @given(SEEDS, st.floats(1e-2, 1e2))
    def test_similarity_is_blind_to_rotations(self, seed: int, by: float) -> None:
        student, teacher = draw(3, 4, seed=seed), draw(3, 5, 2, 2, seed=seed + 1)
        rotation, _ = torch.linalg.qr(draw(4, 4, seed=seed + 2))
        value = SimilarityPreserving()(student, teacher)
        torch.testing.assert_close(SimilarityPreserving()(by * student @ rotation, teacher), value)

    @given(SEEDS, st.floats(-50, 50), st.floats(-50, 50))
    def test_logits_matter_up_to_a_constant(self, seed: int, to_student: float, to_teacher: float) -> None:
        student, teacher = draw(3, 4, seed=seed), draw(3, 4, seed=seed + 1)
        for loss in (SoftTargets(alpha=0.5), DecoupledKD()):
            value = loss(student, teacher, LABELS)
            torch.testing.assert_close(loss(student + to_student, teacher + to_teacher, LABELS), value)

    @given(SEEDS, st.floats(0.5, 10))
    def test_soft_targets_are_decoupled_by_the_teachers_confidence(self, seed: int, t: float) -> None:
        """Equation of the decoupling: KL is the first part and the second times 1 - p_t, sample by sample."""
        student, teacher = draw(1, 4, seed=seed), draw(1, 4, seed=seed + 1)
        confidence = F.softmax(teacher / t, 1)[0, 2].item()
        both = DecoupledKD(alpha=1, beta=1 - confidence, temperature=t)(student, teacher, LABELS[:1])
        torch.testing.assert_close(both, SoftTargets(temperature=t)(student, teacher))

    @given(SEEDS, st.sampled_from([n for n in CASES if "similarity" not in n and "factor" not in n]))
    def test_a_batch_is_the_mean_of_its_parts(self, seed: int, name: str) -> None:
        loss, a, b = case(name)
        student, teacher = draw(*a.shape, seed=seed), draw(*b.shape, seed=seed + 1)
        parts = [loss(student[i : i + 1], teacher[i : i + 1], LABELS[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(torch.stack(parts).mean(), loss(student, teacher, LABELS))

    @given(SEEDS, st.sampled_from(list(CASES)), st.sampled_from([0.0, 1e-30, 1e-10, 1.0, 1e3]))
    def test_gradients_are_finite(self, seed: int, name: str, size: float) -> None:
        loss, a, b = case(name, torch.float32)
        for scales in ((size, 1.0), (1.0, size), (size, size)):
            student = (scales[0] * draw(*a.shape, seed=seed, dtype=a.dtype)).requires_grad_()
            value = loss(student, scales[1] * draw(*b.shape, seed=seed + 1, dtype=b.dtype), LABELS)
            value.backward()  # type: ignore[no-untyped-call]
            assert value.isfinite()
            assert student.grad is not None
            assert student.grad.isfinite().all()

    @pytest.mark.parametrize("name", CASES)
    def test_gradients_are_right(self, name: str) -> None:
        loss, student, teacher = case(name)
        assert torch.autograd.gradcheck(lambda x: loss(x, teacher, LABELS), student.requires_grad_())


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_a_map_of_zeros_gives_no_gradient(p: float) -> None:
    student = torch.zeros(2, 3, 2, 2, requires_grad=True)
    AttentionTransfer(p=p)(student, draw(2, 3, 2, 2, dtype=torch.float32)).backward()
    assert torch.equal(student.grad, torch.zeros(2, 3, 2, 2))  # type: ignore[arg-type]


def test_dead_samples_give_similarity_no_explosion() -> None:
    student = draw(3, 4, dtype=torch.float32)
    student[1] = 0
    student.requires_grad_()
    SimilarityPreserving()(student, draw(3, 4, seed=1, dtype=torch.float32)).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 10


def test_sure_logits_stay_finite() -> None:
    """The target's probability is 1 and the others' 0 as float32 has them."""
    student = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    teacher, label = torch.tensor([[-500.0, 0.0, 500.0]]), torch.tensor([0])
    value = DecoupledKD(1.0, 1.0, temperature=1.0)(student, teacher, label)
    # The target part is 500 + 0 apart: teacher sure of "other", log of which is -500 of the student.
    # Among others the teacher is sure of class 2, which the student gives 500 less than class 1.
    assert value.item() == pytest.approx(500 + 500, rel=1e-6)
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


class TestDense:
    """Outputs with places."""

    @pytest.mark.parametrize("loss", [SoftTargets(alpha=0.4), DecoupledKD()], ids=["soft", "decoupled"])
    def test_a_place_is_as_a_sample(self, loss: DistillationLoss) -> None:
        student, teacher = draw(2, 4, 3, 2), draw(2, 4, 3, 2, seed=1)
        labels = torch.randint(4, (2, 3, 2), generator=torch.Generator().manual_seed(0))
        rows = [x.permute(0, 2, 3, 1).reshape(-1, 4) for x in (student, teacher)]
        value = loss(student, teacher, labels)
        torch.testing.assert_close(value, loss(*rows, labels.flatten()))
        by_last = type(loss)(alpha=loss.alpha, channel_dim=-1)  # type: ignore[call-arg, arg-type]
        lasts = [x.flatten(2).movedim(1, -1) for x in (student, teacher)]
        torch.testing.assert_close(value, by_last(*lasts, labels.flatten(1)))

    @pytest.mark.parametrize("loss", [SoftTargets(alpha=0), DecoupledKD()], ids=["soft", "decoupled"])
    def test_places_without_a_label_are_left_out(self, loss: DistillationLoss) -> None:
        student, teacher = draw(4, 4).requires_grad_(), draw(4, 4, seed=1)
        labels = torch.tensor([1, -100, 3, -100])
        value = loss(student, teacher, labels)
        torch.testing.assert_close(value, loss(student[::2], teacher[::2], labels[::2]))
        value.backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        assert student.grad[1].eq(0).all()

    def test_no_label_at_all_is_nothing_to_learn(self) -> None:
        assert DecoupledKD()(draw(2, 4), draw(2, 4, seed=1), torch.tensor([-100, -100])).item() == 0


class TestLearned:
    """What losses learn."""

    def test_hint_learns_where_widths_differ(self) -> None:
        loss = Hint(weight=3.0)
        made = loss.prepared(torch.Size((2, 4, 8, 8)), torch.Size((2, 6, 4, 4)))
        assert [tuple(p.shape) for p in made.parameters()] == [(6, 4), (6,)]
        assert (made.weight, loss.regressor) == (3.0, None)
        assert not list(made.prepared(torch.Size((2, 4)), torch.Size((2, 4))).parameters())

    def test_factors(self) -> None:
        made = FactorTransfer(rate=0.5).prepared(torch.Size((2, 4, 8, 8)), torch.Size((2, 6, 8, 8)))
        assert made.paraphraser is not None
        assert made.translator is not None
        shapes = [[tuple(p.shape[:2]) for p in m.parameters() if p.dim() > 1] for m in made.paraphraser.values()]
        layers = ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3
        assert [type(m).__name__ for m in made.translator] == layers
        assert [type(m).__name__ for m in made.paraphraser["encoder"]] == layers  # type: ignore[attr-defined]
        assert shapes == [[(6, 6), (3, 6), (3, 3)], [(3, 3), (3, 6), (6, 6)]]
        assert [p.shape[:2] for p in made.translator.parameters() if p.dim() > 1] == [(4, 4), (3, 4), (3, 3)]

    def test_the_paraphraser_learns_from_reconstruction_alone(self) -> None:
        loss, student, teacher = case("factor")
        assert isinstance(loss, FactorTransfer)
        assert loss.paraphraser is not None
        parameters = list(loss.paraphraser.parameters())
        student.requires_grad_()
        found = torch.autograd.grad(loss(student, teacher), [*parameters, student])
        wanted = torch.autograd.grad(loss.reconstruction(teacher), parameters)
        torch.testing.assert_close(found[:-1], wanted)
        assert found[-1].abs().max() > 0

    def test_reconstruction_learns(self) -> None:
        loss, _, teacher = case("factor", torch.float32)
        assert isinstance(loss, FactorTransfer)
        before = loss.reconstruction(teacher).item()
        optimiser = torch.optim.Adam(loss.parameters(), 0.01)
        for _ in range(100):
            optimiser.zero_grad()
            loss.reconstruction(teacher).backward()
            optimiser.step()
        assert loss.reconstruction(teacher).item() < before / 3

    def test_a_frozen_paraphraser_stays(self) -> None:
        loss, student, teacher = case("factor")
        assert isinstance(loss, FactorTransfer)
        assert loss.paraphraser is not None
        loss.freeze().train()
        before = {name: x.clone() for name, x in loss.paraphraser.state_dict().items()}
        value = loss(student, teacher)
        value.backward()
        assert all(torch.equal(x, before[name]) for name, x in loss.paraphraser.state_dict().items())
        assert all(p.grad is None for p in loss.paraphraser.parameters())
        assert not any(p.requires_grad for p in loss.paraphraser.parameters())
        assert loss.translator is not None
        assert loss.translator.training
        assert all(p.grad is not None for p in loss.translator.parameters())
        assert not loss.prepared(student.shape, teacher.shape).frozen
        loss.freeze(False)
        assert loss.paraphraser.training
        assert loss(student, teacher) > value.detach()

    def test_kept_channels_go_with_the_module(self) -> None:
        kept = torch.tensor([3, 1])
        loss = FeatureMatching(kept)
        kept.zero_()
        assert loss.state_dict()["channels"].tolist() == [3, 1]

    @pytest.mark.parametrize("name", CASES)
    def test_the_teacher_gets_no_gradient(self, name: str) -> None:
        loss, student, teacher = case(name)
        teacher.requires_grad_()
        loss(student.requires_grad_(), teacher, LABELS).backward()
        assert teacher.grad is None
        assert all(p.grad is not None for p in loss.parameters())


class TestRuns:
    """Compiled, and in other precisions."""

    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("name", CASES)
    def test_compiles_whole(self, name: str, dynamic: bool) -> None:
        loss, student, teacher = case(name)
        torch._dynamo.reset()
        wanted = loss.eval()(student, teacher, LABELS)
        compiled: Any = torch.compile(loss, fullgraph=True, backend="eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(student, teacher, LABELS), wanted)

    def test_a_frozen_paraphraser_compiles(self) -> None:
        loss, student, teacher = case("factor")
        assert isinstance(loss, FactorTransfer)
        compiled: Any = torch.compile(loss.freeze().eval(), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))

    @pytest.mark.parametrize("name", CASES)
    def test_autocast(self, name: str) -> None:
        loss, student, teacher = case(name, torch.float32)
        student, teacher = (x.bfloat16().requires_grad_() for x in (student, teacher))
        wanted = loss(student.float(), teacher.float(), LABELS)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(student, teacher, LABELS)
        value.backward()
        assert value.dtype == torch.float32
        assert student.grad is not None
        assert student.grad.isfinite().all()
        # What is learned runs in bfloat16, of 8 bits; the rest in float32.
        learned = any(True for _ in loss.parameters())
        torch.testing.assert_close(value, wanted, rtol=2e-2 if learned else 1e-6, atol=0)

    @pytest.mark.parametrize("name", CASES)
    def test_whole_networks_of_bfloat16(self, name: str) -> None:
        loss, student, teacher = case(name, torch.bfloat16)
        assert loss(student, teacher, LABELS).dtype == torch.float32


class TestErrors:
    """What is wrong is said, with what to do."""

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: SoftTargets(temperature=0), "temperature of SoftTargets is a finite number above 0"),
            (lambda: SoftTargets(alpha=1.5), "from 0 to 1"),
            (lambda: SoftTargets(alpha=-0.1), "alpha of SoftTargets is a finite number at least 0"),
            (lambda: AttentionTransfer(p=0.5), "p of AttentionTransfer is a finite number at least 1"),
            (lambda: FactorTransfer(rate=0), "rate of FactorTransfer"),
            (lambda: FactorTransfer(p=math.inf), "p of FactorTransfer"),
            (lambda: DecoupledKD(beta=math.nan), "beta of DecoupledKD"),
            (lambda: Hint(weight=-1), "weight of Hint is a finite number at least 0"),
            (lambda: Hint(weight="2"), "weight of Hint"),  # type: ignore[arg-type]
            (lambda: Hint(name="my hint"), "snake case such as 'hint'"),
            (lambda: Hint(channel_dim=0), "0 is that of samples"),
            (lambda: FeatureMatching([]), "list of indices"),
            (lambda: FeatureMatching([0, 0]), "list of indices"),
            (lambda: FeatureMatching([-1]), "list of indices"),
            (lambda: FeatureMatching(torch.tensor([True, False])), "mask.nonzero"),
            (lambda: FactorTransfer().freeze(), "call `prepared`"),
        ],
    )
    def test_options(self, make: Any, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            make()

    @pytest.mark.parametrize(
        ("loss", "student", "teacher", "message"),
        [
            (SoftTargets(), (2, 3), (2, 4), "numbers of classes differ"),
            (SoftTargets(), (2, 1), (2, 1), "one class"),
            (SoftTargets(), (2, 5, 3), (2, 5, 3), "channel_dim=1 or 2"),
            (SoftTargets(channel_dim=2), (2, 3), (2, 3), "no dimension of channels of 2"),
            (AttentionTransfer(), (2, 3), (2, 4), "one place"),
            (AttentionTransfer(), (2, 3, 1, 1), (2, 4, 2, 2), "one place"),
            (Hint(), (2, 3, 4), (2, 3, 2, 2), "dimensions differ"),
            (Hint(), (2,), (2,), "1 dimension"),
            (FeatureMatching(), (2, 3), (2, 4), "or use Hint"),
            (FeatureMatching([0, 4, 1]), (2, 3), (2, 4), "no channel 4"),
            (FeatureMatching([0, 1]), (2, 3), (2, 4), "2 channels are said to be kept"),
            (FactorTransfer(), (2, 3), (2, 4), "use Hint"),
        ],
    )
    def test_shapes(
        self, loss: DistillationLoss, student: tuple[int, ...], teacher: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            loss.prepared(torch.Size(student), torch.Size(teacher))
        with pytest.raises(UsageError, match=message):
            loss(torch.zeros(student), torch.zeros(teacher), torch.zeros(student[:1]))

    def test_sizes_of_places_may_differ_until_called(self) -> None:
        loss = AttentionTransfer().prepared(torch.Size((2, 3, 4, 4)), torch.Size((2, 3, 8, 8)))
        with pytest.raises(UsageError, match=r"attention cannot compare \(2, 3, 4, 4\) .* resize one"):
            loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))

    def test_samples_are_the_same(self) -> None:
        with pytest.raises(UsageError, match="not the same samples"):
            SimilarityPreserving()(torch.zeros(2, 3), torch.zeros(1, 3))

    def test_not_prepared(self) -> None:
        with pytest.raises(UsageError, match="call `prepared`"):
            Hint()(torch.zeros(2, 3), torch.zeros(2, 4))
        with pytest.raises(UsageError, match="call `prepared`"):
            FactorTransfer()(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2))

    @pytest.mark.parametrize("loss", [SoftTargets(alpha=0.5, name="kd"), DecoupledKD(name="kd")])
    def test_labels(self, loss: DistillationLoss) -> None:
        assert loss.needs_labels
        x = torch.zeros(3, 4)
        with pytest.raises(ValueError, match="'kd' wants labels: pass them as `labels=`"):
            loss(x, x)
        for wrong in (torch.zeros(3, dtype=torch.int64)[:2], torch.zeros(3), torch.zeros(3, 4, dtype=torch.int64)):
            with pytest.raises(UsageError, match=r"class indices of shape \(3,\)"):
                loss(x, x, wrong)

    def test_no_labels_needed(self) -> None:
        assert not SoftTargets().needs_labels
        assert not AttentionTransfer().needs_labels


def test_reads_well() -> None:
    assert (
        repr(SoftTargets(2.0, weight=0.5)) == "SoftTargets(name='soft_targets', weight=0.5, temperature=2.0, alpha=1.0)"
    )
    assert "channel_dim=-1" in repr(Hint(channel_dim=-1))
    assert repr(FeatureMatching([1, 4])).endswith("channels=2 indices)")


def test_names_are_of_one_term_each() -> None:
    names = {loss.name for loss, _, _ in CASES.values()}
    assert len(names) == len({type(loss) for loss, _, _ in CASES.values()}) == 7
