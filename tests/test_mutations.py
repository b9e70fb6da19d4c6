"""Planted bugs: the verification must see each of them, and must not see one where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.analysis.memory import Memory
from fxcompress.analysis.sizes import Sizes
from fxcompress.pass_base import Pass, Site
from fxcompress.passes import fold_batch_norm
from fxcompress.passes.fold_batch_norm import FoldBatchNorm
from fxcompress.passes.remove_identity import RemoveIdentity
from tests.passes.driver import randomise

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]

folded, affine = fold_batch_norm._folded, fold_batch_norm._affine


class Net(nn.Module):
    """Named layers and a function that connects them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.connect = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.connect(self, x)


def in_turn(net: Any, x: Tensor) -> Tensor:
    for layer in net.children():
        x = layer(x)
    return x


# --- models, small enough that nothing but the bug can be wrong ---


def plain() -> nn.Module:
    return Net(in_turn, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), relu=nn.ReLU())


def shared() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.norm(net.conv(net.norm(net.conv(x)).relu()))

    return Net(forward, conv=nn.Conv2d(3, 3, 3), norm=nn.BatchNorm2d(3))


def transposed() -> nn.Module:
    return Net(in_turn, conv=nn.ConvTranspose2d(6, 6, 3, groups=2), norm=nn.BatchNorm2d(6))


def grouped() -> nn.Module:
    return Net(in_turn, norm=nn.BatchNorm2d(6), conv=nn.Conv2d(6, 6, 3, groups=2))


def fork() -> nn.Module:
    def forward(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.conv(x)
        return net.norm(y), y

    return Net(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))


def padded() -> nn.Module:
    return Net(in_turn, norm=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 4, 3, padding=1))


def rows() -> nn.Module:
    return Net(in_turn, linear=nn.Linear(8, 8), norm=nn.BatchNorm1d(8))


def overwritten() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        z = y.clone()
        z.add_(1)
        return y * z

    return Net(forward, conv=nn.Conv2d(3, 4, 3))


def sized() -> nn.Module:
    return Net(lambda net, x: net.conv(x).mean((2, 3)).view(2, -1).sum(1), conv=nn.Conv2d(3, 4, 3))


IMAGE, WIDE, ROWS = (2, 3, 8, 8), (2, 6, 8, 8), (2, 8, 8)
MODELS: dict[Callable[[], nn.Module], tuple[int, ...]] = {
    plain: IMAGE, shared: IMAGE, transposed: WIDE, grouped: WIDE, fork: IMAGE, padded: IMAGE, rows: ROWS,
    overwritten: IMAGE, sized: IMAGE,
}  # fmt: skip


def compress(make: Callable[[], nn.Module], pass_: Pass) -> fx.GraphModule:
    torch.manual_seed(0)
    # A graph, so that the pass sees what is written here: tracing by example may know better.
    model = fx.symbolic_trace(randomise(make()))
    return fxcompress.compile(model, [pass_], example_inputs=(torch.randn(MODELS[make]),))


# --- bugs ---


def drops_bias(patch: Patch) -> None:
    def wrong(fold: Any) -> Any:
        return folded(fold)[0], affine(fold.norm)[1]

    patch.setattr(fold_batch_norm, "_folded", wrong)


def forgets_eps(patch: Patch) -> None:
    def wrong(norm: Any) -> Any:
        a = norm.weight.double() / norm.running_var.double().sqrt()
        return a, norm.bias.double() - a * norm.running_mean.double()

    patch.setattr(fold_batch_norm, "_affine", wrong)


def adds_the_mean(patch: Patch) -> None:
    def wrong(norm: Any) -> Any:
        a, s = affine(norm)
        return a, s + 2 * a * norm.running_mean.double()

    patch.setattr(fold_batch_norm, "_affine", wrong)


def folds_twice(patch: Patch) -> None:
    rewrite = FoldBatchNorm.rewrite

    def wrong(self: FoldBatchNorm, site: Site) -> None:
        for _ in site.data.pairs[1:]:
            fold_batch_norm._install(site.data.layer, *folded(site.data))
        rewrite(self, site)

    patch.setattr(FoldBatchNorm, "rewrite", wrong)


def mistakes_the_layout(patch: Patch) -> None:
    def straight(layer: Any, weight: Tensor) -> Tensor:
        groups, outputs, inputs = fold_batch_norm.channel_counts(layer)
        return weight.reshape(groups, outputs // groups, inputs // groups, -1)

    patch.setattr(fold_batch_norm, "by_group", straight)
    patch.setattr(fold_batch_norm, "as_stored", lambda layer, weight: weight.reshape(layer.weight.shape))


def mistakes_the_groups(patch: Patch) -> None:
    def wrong(fold: Any) -> Any:
        layer = fold.layer
        a, _ = affine(fold.norm)
        local = a[: a.numel() // layer.groups].view(1, -1, 1, 1)  # every group scaled like the first
        return layer.weight.double() * local, folded(fold)[1]

    patch.setattr(fold_batch_norm, "_folded", wrong)


def shifts_through_the_scaled_weight(patch: Patch) -> None:
    def wrong(fold: Any) -> Any:
        weight, bias = folded(fold)
        _, s = affine(fold.norm)
        scaled = fold_batch_norm.by_group(fold.layer, weight)
        groups = fold_batch_norm.channel_counts(fold.layer)[0]
        assert bias is not None
        return weight, (scaled.sum(-1) * s.view(groups, 1, -1)).sum(-1).flatten()

    patch.setattr(fold_batch_norm, "_folded", wrong)


def ignores_other_readers(patch: Patch) -> None:
    def wrong(self: Any, layer: Any, norm: Any, direction: str) -> Iterator[tuple[fx.Node, fx.Node]]:
        for call in self.context.aliasing.calls(layer):
            yield from ((call, user) for user in call.users if self.context.module(user) is norm)

    patch.setattr(fold_batch_norm._Survey, "_pairs", wrong)


def ignores_padding(patch: Patch) -> None:
    patch.setattr(fold_batch_norm, "_border_obstacle", lambda fold: None)


def ignores_the_dimension(patch: Patch) -> None:
    patch.setattr(fold_batch_norm._Survey, "_shape_obstacle", lambda self, fold: None)


def ignores_writers(patch: Patch) -> None:
    patch.setattr(Memory, "obstacle_to_sharing", lambda self, copy, source, keeps_strides: None)


def ignores_other_sizes(patch: Patch) -> None:
    patch.setattr(Sizes, "asked", lambda self, value: ANY)


BUGS: list[tuple[Plant, Callable[[], nn.Module], Pass]] = [
    (drops_bias, plain, FoldBatchNorm()),
    (forgets_eps, plain, FoldBatchNorm()),
    (adds_the_mean, plain, FoldBatchNorm()),
    (folds_twice, shared, FoldBatchNorm()),
    (mistakes_the_layout, transposed, FoldBatchNorm()),
    (mistakes_the_groups, grouped, FoldBatchNorm()),
    (shifts_through_the_scaled_weight, grouped, FoldBatchNorm()),
    (ignores_other_readers, fork, FoldBatchNorm()),
    (ignores_padding, padded, FoldBatchNorm()),
    (ignores_the_dimension, rows, FoldBatchNorm()),
    (ignores_writers, overwritten, RemoveIdentity()),
    (ignores_other_sizes, sized, RemoveIdentity()),
]


@pytest.mark.parametrize(("plant", "make", "pass_"), BUGS, ids=[plant.__name__ for plant, _, _ in BUGS])
def test_a_planted_bug_is_caught(
    plant: Plant, make: Callable[[], nn.Module], pass_: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(make, pass_)  # without the bug all is well
    plant(monkeypatch)
    with pytest.raises(fxcompress.VerificationError, match=rf"'{pass_.name}'.*float64"):
        compress(make, pass_)


def test_float32_alone_would_not_have_seen_a_forgotten_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the proof is in float64: this bug is as large as rounding is."""
    torch.manual_seed(0)
    model, x = randomise(plain()), torch.randn(IMAGE)
    forgets_eps(monkeypatch)
    wrong = fxcompress.compile(fx.symbolic_trace(model), [FoldBatchNorm()], example_inputs=(x,), verify=False)
    with torch.no_grad():
        torch.testing.assert_close(wrong(x), model(x), rtol=1e-4, atol=1e-4)
