"""Importances: scores worked out by hand, what they must not depend on, and what they leave as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.analysis.channels import channel_groups
from fxcompress.calibration import as_batches
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.pass_base import Example, PassContext
from fxcompress.passes.pruning import IMPORTANCES, Importance, PruneChannels
from fxcompress.passes.pruning.importance import (
    Activation,
    BatchNormScale,
    FilterThreshold,
    GeometricMedian,
    Hessian,
    LayerAdaptiveMagnitude,
    Magnitude,
    ProvableSensitivity,
    Random,
    Taylor,
)
from fxcompress.passes.pruning.importance_gradient import label_free_loss
from tests.passes.driver import apply, randomise
from tests.zoo import PLAIN

FROM_DATA = [name for name, make in IMPORTANCES.items() if make().needs_data]


def scores_of(
    importance: Importance,
    model: nn.Module,
    calibration: Sequence[Any] | None = None,
    example: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The scores of each group by its name."""
    gm = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    if example is None:
        assert calibration is not None
        example = calibration[0]
    groups = channel_groups(gm, example, **options)
    batches = None if calibration is None else as_batches(calibration)
    with torch.no_grad():  # as in the pipeline
        score = importance.scorer(PassContext(gm, Example((example,)), batches), groups)
    return {group.name: score(group) for group in groups.groups}


def mlp() -> nn.Sequential:
    """h = relu((3 4; 0 1; 1 0) x + (1 0 0)), y = (2 3 1) h. Without a channel go its row, bias and column."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
        model[2].weight.copy_(torch.tensor([[2.0, 3.0, 1.0]]))
        model[2].bias.zero_()
    return model.double()


ONES, ZEROS = torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)

# With x = (1 1): h = (8 1 1), y = 20, the loss is y^2 and its derivative by y is 40. w g is 40 v_i W_ij x_j for an
# element of a row, 40 v_i b_i for a bias, 40 v_i h_i for a column. With x = 0: h = (1 0 0), y = 2, the derivative is 4.
BY_HAND: list[tuple[Importance, list[Tensor] | None, list[float]]] = [
    (Magnitude(p=2, reduce="sum", normalize=False), None, [30, 10, 2]),
    (Magnitude(p=2, reduce="max", normalize=False), None, [25, 9, 1]),
    (Magnitude(p=2, normalize=False), None, [10, 10 / 3, 2 / 3]),
    (Magnitude(p=2), None, [30 / 14, 10 / 14, 2 / 14]),
    (Magnitude(p=1, reduce="sum", normalize=False), None, [10, 4, 2]),
    (FilterThreshold(), None, [5, 1, 1]),
    (FilterThreshold(p=1), None, [7, 1, 1]),
    (LayerAdaptiveMagnitude(reduce="sum"), None, [1, 10 / 40, 2 / 42]),
    (
        GeometricMedian(normalize=False),
        None,
        [math.sqrt(18) + math.sqrt(20), math.sqrt(18) + math.sqrt(2), math.sqrt(20) + math.sqrt(2)],
    ),
    (Taylor(), [ONES], [560 + 80 + 640, 120 + 120, 40 + 40]),
    (Taylor(reduce="max"), [ONES], [640, 120, 40]),
    (Taylor(), [ONES, ZEROS], [(1280 + 16) / 2, 120, 40]),
    (Taylor(squared=True), [ONES], [240**2 + 320**2 + 80**2 + 640**2, 2 * 120**2, 2 * 40**2]),
    (Taylor(loss=lambda y: y.sum()), [ONES], [1280 / 40, 240 / 40, 80 / 40]),
    (Hessian(), [ONES], [(240**2 + 320**2 + 80**2 + 640**2) / 2, 120**2, 40**2]),
    (Hessian(), [torch.cat([ONES, ZEROS])], [(576000 + 128) / 4, 120**2 / 2, 40**2 / 2]),
    (Hessian(), [ONES, ZEROS], [(576000 + 128) / 4, 120**2 / 2, 40**2 / 2]),
    (Activation(normalize=False), [torch.cat([ONES, ZEROS])], [math.sqrt(65 / 2), math.sqrt(1 / 2), math.sqrt(1 / 2)]),
    (Activation(normalize=False), [ONES, torch.cat([ZEROS, ZEROS])], [math.sqrt(66 / 3), *[math.sqrt(1 / 3)] * 2]),
    (ProvableSensitivity(), [ONES], [16 / 20, 3 / 20, 1 / 20]),
    (ProvableSensitivity(), [ONES, ZEROS], [1, 3 / 20, 1 / 20]),
]


@pytest.mark.parametrize(
    ("importance", "data", "wanted"), BY_HAND, ids=[f"{i}-{row[0].name}" for i, row in enumerate(BY_HAND)]
)
def test_by_hand(importance: Importance, data: list[Tensor] | None, wanted: list[float]) -> None:
    found = scores_of(importance, mlp(), data, example=ONES)
    assert list(found) == ["0"]
    torch.testing.assert_close(found["0"], torch.tensor(wanted, dtype=torch.float64))


def test_random_signs_do_not_bias_the_hessian() -> None:
    """Two samples and one draw: (g1 + g2)^2 or (g1 - g2)^2, whose mean is g1^2 + g2^2."""
    both = torch.cat([ONES, ZEROS])
    exact = scores_of(Hessian(draws=2), mlp(), [both])["0"]
    found = torch.stack([scores_of(Hessian(draws=1, seed=s), mlp(), [both])["0"] for s in range(12)])
    low, high = found.amin(0), found.amax(0)
    assert bool((torch.isclose(found, low) | torch.isclose(found, high)).all())
    torch.testing.assert_close((low + high) / 2, exact)
    assert float(high[0]) > float(low[0])


def test_squares_of_small_gradients_in_half_precision() -> None:
    """g^2 is below what float16 has."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).half()
    found = scores_of(Hessian(loss=lambda y: 1e-4 * y.sum()), model, [torch.ones(1, 2).half()])["0"]
    assert float(found.min()) > 0


def test_loss_without_labels() -> None:
    logits = torch.tensor([[0.0, 0.0, math.log(2)], [0.0, math.log(6), 0.0]])
    torch.testing.assert_close(label_free_loss(logits), torch.tensor([math.log(2), math.log(8 / 6)]))
    torch.testing.assert_close(label_free_loss({"y": torch.tensor([[3.0], [1.0]])}), torch.tensor([9.0, 1.0]))
    pair = (torch.tensor([[1.0, 3.0]]), torch.tensor([2.0]), torch.tensor([7]))
    torch.testing.assert_close(label_free_loss(pair), torch.tensor([5.0 + 4.0]))
    torch.testing.assert_close(label_free_loss((torch.ones(2, 2), torch.tensor(3.0))), torch.tensor([10.0]))
    with pytest.raises(PreconditionError, match="give a `loss`"):
        label_free_loss(torch.tensor([1]))


@pytest.mark.parametrize("name", [n for n in IMPORTANCES if n not in ("batch-norm-scale", "random")])
def test_nothing_but_zeros_is_worth_nothing(name: str) -> None:
    model = mlp()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert scores_of(IMPORTANCES[name](), model, [ONES])["0"].tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------- batch norm
def normed(scales: list[float]) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    model[1].weight.data.copy_(torch.tensor(scales))
    return model.eval()


def test_batch_norm_scales() -> None:
    x = torch.randn(2, 1, 4, 4)
    found = scores_of(BatchNormScale(), normed([-2.0, 0.5, 1.0]), example=x)["0"]
    torch.testing.assert_close(found, torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64))
    found = scores_of(BatchNormScale(normalize=True), normed([-2.0, 0.5, 0.5]), example=x)["0"]
    torch.testing.assert_close(found, torch.tensor([2.0, 0.5, 0.5], dtype=torch.float64))


def test_batch_norm_after_a_flatten_is_the_mean_over_places() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 1)).eval()
    model[2].weight.data.copy_(torch.tensor([1.0, -1, 3, 3, 0, 0, 0, 1]))
    found = scores_of(BatchNormScale(), model, example=torch.randn(2, 1, 2, 2))["0"]
    torch.testing.assert_close(found, torch.tensor([2.0, 0.25], dtype=torch.float64))


def test_a_group_without_batch_norm_is_refused_unless_told_otherwise() -> None:
    with pytest.raises(PreconditionError, match=r"group '0'.*Exclude"):
        scores_of(BatchNormScale(), mlp(), example=ONES)
    found = scores_of(BatchNormScale(otherwise=FilterThreshold()), mlp(), example=ONES)["0"]
    torch.testing.assert_close(found, torch.tensor([5.0, 1, 1], dtype=torch.float64))
    with pytest.raises(UsageError, match="needs data"):
        BatchNormScale(otherwise=Taylor())


# ------------------------------------------------------------------------------------------------- geometric median
def test_filters_that_make_a_channel_together_are_one() -> None:
    """Three groups of two: the first layer's filters are (0 0), (3 4), (3 4), the second's are all zero."""
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 1, groups=3), nn.Conv2d(6, 2, 1))
    model[0].weight.data.copy_(torch.tensor([0.0, 0, 3, 4, 3, 4]).reshape(6, 1, 1, 1))
    model[1].weight.data.zero_()
    found = scores_of(GeometricMedian(reduce="max", normalize=False), model, example=torch.randn(1, 1, 2, 2))["0"]
    torch.testing.assert_close(found, torch.tensor([10.0, 5.0, 5.0], dtype=torch.float64))


# ------------------------------------------------------------------------------------------------- random
def test_random_is_reproducible_and_differs_between_groups_and_seeds() -> None:
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(1, 2)
    first, again, other = (scores_of(Random(seed=s), model, example=x) for s in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len({tuple(v.tolist()) for v in (*first.values(), *other.values())}) == 4
    assert all(float(v.min()) >= 0 and float(v.max()) < 1 for v in first.values())


# ------------------------------------------------------------------------------------------------- sensitivity
def shares_by_hand(layer: Any, x: Tensor, channels: int) -> Tensor:
    """Each channel by itself through the layer, which has no bias; the channels lie side by side."""
    width = x.shape[1] // channels
    parts = []
    for j in range(channels):
        alone = torch.zeros_like(x)
        alone[:, j * width : (j + 1) * width] = x[:, j * width : (j + 1) * width]
        parts.append(layer(alone).abs())
    stacked = torch.stack(parts).flatten(1)
    return (stacked / stacked.sum(0).clamp_min(1e-300)).amax(1).double()


READERS: dict[str, Any] = {
    "padded": lambda: nn.Conv2d(4, 3, 3, padding=1, bias=False),
    "strided": lambda: nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(0, 1), bias=False),
    "dilated": lambda: nn.Conv2d(4, 3, 3, dilation=2, padding="same", bias=False),
    "reflecting": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect", bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False),
}


@pytest.mark.parametrize("name", READERS)
def test_shares_in_a_convolution(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), READERS[name]()).double()
    data = [torch.randn(n, 2, 6, 5, dtype=torch.float64) for n in (1, 2)]
    with torch.no_grad():
        wanted = torch.stack([shares_by_hand(model[2], model[:2](x), 4) for x in data]).amax(0)
    torch.testing.assert_close(scores_of(ProvableSensitivity(places=1000), model, data)["0"], wanted)
    some = scores_of(ProvableSensitivity(places=5), model, data)["0"]
    assert bool((some <= wanted + 1e-12).all())
    assert torch.equal(some, scores_of(ProvableSensitivity(places=5), model, data)["0"])


def test_shares_in_other_ranks_and_without_a_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 2, bias=False)).double()
    x = torch.randn(1, 2, 9, dtype=torch.float64)
    with torch.no_grad():
        wanted = shares_by_hand(model[2], model[:2](x), 4)
    torch.testing.assert_close(scores_of(ProvableSensitivity(), model, [x])["0"], wanted)
    torch.testing.assert_close(scores_of(ProvableSensitivity(), model, [x[0]])["0"], wanted)


def test_a_channel_with_several_places_in_a_linear_layer_counts_as_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 5, bias=False)).double()
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        wanted = shares_by_hand(model[2], model[:2](x), 3)
    torch.testing.assert_close(scores_of(ProvableSensitivity(), model, [x])["0"], wanted)


def test_the_same_part_of_every_group_of_a_convolution() -> None:
    """Two groups of four: channel j is j of the first and j of the second, each a share in the outputs of its group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 4, 3, groups=2, bias=False), nn.Conv2d(4, 2, 1)).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        h, weight = model[0](x), model[1].weight
        halves = [
            torch.stack([F.conv2d(h[:, 4 * g + j, None], weight[2 * g : 2 * g + 2, j, None]).abs() for j in range(4)])
            for g in range(2)
        ]
        wanted = torch.stack([(p / p.sum(0)).flatten(1).amax(1) for p in halves]).amax(0)
    torch.testing.assert_close(scores_of(ProvableSensitivity(), model, [x])["0"], wanted)


def test_depthwise_convolutions_are_looked_through_and_readers_compete() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.depthwise = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 3, groups=3, padding=1)
            self.left, self.right = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.depthwise(self.first(x))
            return self.left(x), self.right(x)

    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        h = model.depthwise(model.first(x))
        wanted = torch.stack([shares_by_hand(layer, h, 3) for layer in (model.left, model.right)]).amax(0)
    torch.testing.assert_close(scores_of(ProvableSensitivity(), model, [x])["first"], wanted)


def test_a_group_that_no_layer_reads_is_refused() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1) @ self.value(x)

    x = torch.randn(2, 3, 4)
    with pytest.raises(PreconditionError, match=r"'pfp'.*group 'query'"):
        scores_of(ProvableSensitivity(), Scores(), [x])
    assert len(scores_of(Activation(), Scores(), [x])["query"]) == 4


# ------------------------------------------------------------------------------------------------- invariances
def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    return randomise(model).double()


def images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64) for n in sizes]


@pytest.mark.parametrize("name", [n for n in IMPORTANCES if n != "random"])
def test_the_order_of_channels_does_not_matter(name: str) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    model = convolutional()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (moved[0].weight, moved[0].bias, *(t for t in moved[1].state_dict().values() if t.dim())):
            tensor.copy_(tensor[order].clone())
        moved[3].weight.copy_(model[3].weight[:, order])
    before, after = (scores_of(IMPORTANCES[name](), m, images(3, 2))["0"] for m in (model, moved))
    torch.testing.assert_close(after, before[order])
    assert len(before.unique()) == 5


def scaled(model: nn.Sequential, into: float, out: float) -> nn.Sequential:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(into)
        twin[0].bias.mul_(into)
        twin[2].weight.mul_(out)
    return twin


@pytest.mark.parametrize(
    ("importance", "into", "out"),
    [
        (Magnitude(p=1), 3.0, 3.0),
        (Magnitude(p=2), 3.0, 3.0),
        (LayerAdaptiveMagnitude(), 3.0, 3.0),
        (GeometricMedian(), 3.0, 1.0),
        (Activation(), 3.0, 1.0),
        (ProvableSensitivity(), 3.0, 0.5),
        (Taylor(), 4.0, 0.25),
        (Taylor(squared=True), 4.0, 0.25),
        (Hessian(), 4.0, 0.25),
        (Taylor(normalize=True), 3.0, 3.0),
    ],
)
def test_scaling_that_changes_nothing(importance: Importance, into: float, out: float) -> None:
    data = [torch.cat([ONES, 2 * ONES])]
    before, after = (scores_of(importance, m, data)["0"] for m in (mlp(), scaled(mlp(), into, out)))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("p", [1, 2])
def test_a_threshold_on_filters_grows_with_them(p: int) -> None:
    before, after = (scores_of(FilterThreshold(p=p), m, example=ONES)["0"] for m in (mlp(), scaled(mlp(), 3.0, 7.0)))
    torch.testing.assert_close(after, 3 * before)


def test_how_the_data_is_batched_matters_to_taylor_alone() -> None:
    together, apart = images(4), list(torch.split(images(4)[0], 1))
    for importance in (Hessian(), Activation(), ProvableSensitivity(places=1000)):
        first, second = (scores_of(importance, convolutional(), data)["0"] for data in (together, apart))
        torch.testing.assert_close(first, second)


# ------------------------------------------------------------------------------------------------- whole models
@pytest.mark.parametrize("name", IMPORTANCES)
def test_prunes_a_network_and_leaves_the_original_alone(name: str) -> None:
    network = PLAIN["resnet"]()
    generator = torch.Generator().manual_seed(0)
    args, _ = network.sample(generator, 2, torch.float32)
    data = [network.sample(generator, 3, torch.float32)[0] for _ in range(2)]
    model = network.module.float().eval()
    before = copy.deepcopy(model.state_dict())
    gm = fxcompress.compile(model, PruneChannels(ratio=0.5, importance=name), args, calibration=data)
    assert gm.get_submodule("layer2.0.conv1").weight.shape[0] == 8
    assert gm(*args).shape == (2, 5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert fxcompress.report(gm).passes[0].verified


@pytest.mark.parametrize("name", [n for n in PLAIN if n != "resnet"])
def test_finds_its_way_in_other_networks(name: str) -> None:
    network = PLAIN[name]()
    generator = torch.Generator().manual_seed(0)
    args, kwargs = network.sample(generator, 2, torch.float32)
    data = [Example(*network.sample(generator, n, torch.float32)) for n in (3, 4)]
    gm = fxcompress.trace(network.module.float().eval(), args, example_kwargs=kwargs)
    groups = channel_groups(gm, args, kwargs)
    assert groups.groups or name == "lstm"
    for importance in (Taylor(), Activation(), ProvableSensitivity()):
        score = importance.scorer(PassContext(gm, Example(args, kwargs), as_batches(data)), groups)
        for group in groups.groups:
            found = score(group)
            assert found.shape == (group.channels,)
            assert found.dtype == torch.float64
            assert bool((found >= 0).all())
            assert float(found.sum()) > 0


@pytest.mark.parametrize("name", IMPORTANCES)
def test_leaves_the_graph_as_it_was(name: str) -> None:
    """In training mode, where batch norm writes and dropout draws; with a frozen weight and a gradient in place."""
    model = nn.Sequential(convolutional(), nn.Dropout(0.5), nn.Linear(4, 3).double()).train()
    gm = fx.symbolic_trace(model)
    gm.get_parameter("0.0.weight").requires_grad_(False)
    kept = torch.ones(3, dtype=torch.float64)
    gm.get_parameter("2.bias").grad = kept
    before, random_state = copy.deepcopy(gm.state_dict()), torch.get_rng_state()
    data = images(3, 2)
    inputs = copy.deepcopy(data)
    importance = IMPORTANCES[name]() if name != "batch-norm-scale" else BatchNormScale(otherwise=Magnitude())
    assert set(scores_of(importance, gm, data)) == {"0.0", "0.3"}
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert gm.get_parameter("2.bias").grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert all(p.grad is None for n, p in gm.named_parameters() if n != "2.bias")
    assert [n for n, p in gm.named_parameters() if not p.requires_grad] == ["0.0.weight"]
    assert gm.training
    assert all(torch.equal(a, b) for a, b in zip(data, inputs, strict=True))


# ------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("name", FROM_DATA)
def test_asks_for_the_data_it_needs(name: str) -> None:
    with pytest.raises(PreconditionError, match="calibration") as caught:
        fxcompress.compile(convolutional(), PruneChannels(importance=name), images(2)[0])
    assert IMPORTANCES[name]().name in str(caught.value)


def test_which_importances_need_data() -> None:
    assert FROM_DATA == ["taylor", "hessian", "activation", "pfp"]
    gm, applied = apply(PruneChannels(importance="fpgm"), convolutional(), images(2)[0])
    assert applied.sites
    assert gm.get_submodule("0").weight.shape[0] == 3


def test_reads_the_data_once() -> None:
    for name in FROM_DATA:
        compiled = fxcompress.compile(
            convolutional(), PruneChannels(importance=name), images(2)[0], calibration=iter(images(3, 2)), verify=False
        )
        assert compiled.get_submodule("0").weight.shape[0] == 3


@pytest.mark.parametrize("name", ["l2", "taylor", "activation", "pfp", "batch-norm-scale"])
def test_scores_that_are_not_finite_are_refused_by_name(name: str) -> None:
    model = convolutional()
    model[1].weight.data[2] = torch.nan
    model[0].weight.data[2] = torch.inf
    with pytest.raises(PreconditionError, match=r"group '0'.*not finite"):
        apply(PruneChannels(importance=name), model, images(2)[0], calibration=images(2))


def test_data_that_does_not_fit() -> None:
    for name in FROM_DATA:
        with pytest.raises(UsageError, match="batch 1"):
            apply(PruneChannels(importance=name), mlp(), ONES, calibration=[ONES, torch.ones(2, 3).double()])


def test_losses_that_cannot_be_used() -> None:
    for loss, error, message in (
        (lambda y: 3.0, UsageError, "gave a float"),
        (lambda y: y.detach().sum(), PreconditionError, "does not depend on any weight"),
    ):
        with pytest.raises(error, match=message):
            scores_of(Taylor(loss=loss), mlp(), [ONES])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Magnitude(p=3), "p is 1 or 2"),
        (lambda: FilterThreshold(p=0), "p is 1 or 2"),
        (lambda: Magnitude(reduce="median"), "reduce is one of"),
        (lambda: Hessian(draws=0), "draws"),
        (lambda: ProvableSensitivity(places=0), "places"),
    ],
)
def test_options_are_checked(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_an_importance_of_ones_own() -> None:
    class Backwards(Importance):
        name = "backwards"

        def scores(self, group: Any) -> Tensor:
            return torch.arange(group.channels, 0, -1)

    gm, _ = apply(PruneChannels(importance=Backwards(), ratio=0.34), mlp(), ONES)
    assert gm.get_submodule("2").weight.tolist() == [[2.0, 3.0]]

    class Wrong(Backwards):
        def scores(self, group: Any) -> Tensor:
            return torch.zeros(1)

    with pytest.raises(UsageError, match="shape"):
        scores_of(Wrong(), mlp(), example=ONES)
