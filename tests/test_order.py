"""Which orders are refused, what is said then, and which order is recommended."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Guarantee, Pass, Stage, UsageError
from fxcompress.order import in_order
from fxcompress.passes.pruning import PruneChannels


@dataclasses.dataclass(frozen=True)
class Plain(Pass):
    """Declares nothing."""

    name: ClassVar[str] = "plain"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT


@dataclasses.dataclass(frozen=True)
class BetweenTwo(Plain):
    name: ClassVar[str] = "between-two"
    before: ClassVar[frozenset[str]] = frozenset({"quantize", "never-installed"})
    after: ClassVar[frozenset[str]] = frozenset({"fold-batch-norm"})
    why_after: ClassVar[str] = "it looks at folded layers"


@dataclasses.dataclass(frozen=True)
class Early(Plain):
    name: ClassVar[str] = "early"
    stage: ClassVar[Stage] = Stage.CLEAN


@dataclasses.dataclass(frozen=True)
class Rock(Plain):
    name: ClassVar[str] = "rock"
    before: ClassVar[frozenset[str]] = frozenset({"scissors", "rock"})


@dataclasses.dataclass(frozen=True)
class Scissors(Plain):
    name: ClassVar[str] = "scissors"
    before: ClassVar[frozenset[str]] = frozenset({"paper"})


@dataclasses.dataclass(frozen=True)
class Paper(Plain):
    name: ClassVar[str] = "paper"
    before: ClassVar[frozenset[str]] = frozenset({"rock"})


@dataclasses.dataclass(frozen=True)
class Misspelt(Plain):
    name: ClassVar[str] = "misspelt"
    before: ClassVar[Any] = "quantize"


@dataclasses.dataclass(frozen=True)
class Numbered(Plain):
    name: ClassVar[str] = "numbered"
    stage: ClassVar[Any] = 3


X = torch.randn(2, 3, 8, 8)


def never_called() -> nn.Module:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("an order is refused before any work")

    return Broken()


@pytest.mark.parametrize(
    ("passes", "early", "late", "right"),
    [
        (["lower-int8", "quantize"], "lower-int8", "quantize", "quantize, lower-int8"),
        (
            ["quantize:weight_bits=4", "fold-batch-norm", "lower-int8"],
            "quantize",
            "fold-batch-norm",
            "fold-batch-norm, quantize:weight_bits=4, lower-int8",
        ),
        (["fake-quantize", "fold-batch-norm"], "fake-quantize", "fold-batch-norm", "fold-batch-norm, fake-quantize"),
        (["fold-batch-norm", "adapt-batch-norm"], "fold-batch-norm", "adapt-batch-norm", "adapt-batch-norm, fold"),
        (["detach-distillation", "attach-distillation"], "detach-", "attach-", "attach-distillation, detach"),
        (["cast-precision", "quantize"], "cast-precision", "quantize", "quantize, cast-precision"),
        (["quantize", PruneChannels(ratio=0.3)], "quantize", "prune-channels", "prune-channels, quantize"),
        (["quantize", "svd"], "quantize", "svd", "svd, quantize"),
        (["quantize", "smooth-quant"], "quantize", "smooth-quant", "smooth-quant, quantize"),
        (["lower-int8", "equalize-layers"], "lower-int8", "equalize-layers", "equalize-layers, lower-int8"),
        (["quantize", BetweenTwo()], "quantize", "between-two", "between-two, quantize"),
        ([BetweenTwo(), "fold-batch-norm"], "between-two", "fold-batch-norm", "fold-batch-norm, between-two"),
    ],
)
@pytest.mark.parametrize("call", [fxcompress.compile, fxcompress.plan])
def test_wrong_orders_name_both_and_say_the_right_one(
    call: Any, passes: list[Any], early: str, late: str, right: str
) -> None:
    with pytest.raises(UsageError) as caught:
        call(never_called(), passes, X)
    told = str(caught.value)
    assert told.startswith(f"'{early}")
    assert f" stands before '{late}" in told
    assert f"The right order: {right}" in told


def test_the_reason_is_that_of_the_later_pass() -> None:
    with pytest.raises(UsageError, match=r"'between-two': it looks at folded layers\. The right"):
        in_order([BetweenTwo(), "fold-batch-norm"])
    with pytest.raises(UsageError, match="integer weights"):
        in_order(["quantize", "fold-batch-norm"])


@pytest.mark.parametrize(
    "passes",
    [
        ["prune-channels", "fold-batch-norm"],
        ["alds", "prune-channels", "alds"],
        ["equalize-layers", "fold-batch-norm"],
        ["quantize", "adapt-batch-norm", "lower-int8", "cast-precision", "remove-identity"],
        ["attach-distillation", "fold-batch-norm", "prune-channels", "detach-distillation"],
        ["quantize"],
        [],
    ],
)
def test_unusual_orders_that_work_are_let_be(passes: list[str]) -> None:
    assert [p.name for p in in_order(passes)] == passes


@pytest.mark.parametrize(
    ("passes", "best"),
    [
        (
            ["lower-int8", "quantize", "alds", "prune-channels", "fold-batch-norm", "remove-identity"],
            ["remove-identity", "fold-batch-norm", "prune-channels", "alds", "quantize", "lower-int8"],
        ),
        (
            ["fold-batch-norm", "adapt-batch-norm", "prune-channels:ratio=0.3"],
            ["prune-channels:ratio=0.3", "adapt-batch-norm", "fold-batch-norm"],
        ),
        (
            ["smooth-quant", "equalize-layers", "fold-batch-norm"],
            ["fold-batch-norm", "smooth-quant", "equalize-layers"],
        ),
        (["svd", "alds:ratio=0.2", "svd"], ["svd", "alds:ratio=0.2", "svd"]),
        (["cast-precision", "lower-int8", "quantize"], ["quantize", "cast-precision", "lower-int8"]),
        ("quantize", ["quantize"]),
        ([], []),
    ],
)
def test_recommended_order(passes: Any, best: list[str]) -> None:
    assert fxcompress.recommended_order(passes) == best
    in_order(best)


def test_passes_without_a_stage_stay_behind_what_they_were_behind() -> None:
    plain, early, between = Plain(), Early(), BetweenTwo()
    order = fxcompress.recommended_order
    assert order([plain, "quantize", "fold-batch-norm"]) == [plain, "fold-batch-norm", "quantize"]
    assert order(["quantize", plain, "fold-batch-norm"]) == ["fold-batch-norm", "quantize", plain]
    assert order(["quantize", "lower-int8", early]) == [early, "quantize", "lower-int8"]
    assert order(["quantize", between, "fold-batch-norm"]) == ["fold-batch-norm", between, "quantize"]


def test_declarations_in_a_circle_are_named() -> None:
    assert in_order([Rock(), Scissors()])
    assert in_order([Rock(), Rock()]), "a pass says nothing about itself"
    for call in (fxcompress.recommended_order, in_order):
        with pytest.raises(UsageError, match="can stand in no order") as caught:
            call([Early(), Rock(), Scissors(), Paper()])
        for name in ("rock", "scissors", "paper"):
            assert f"{name!r} says that" in str(caught.value)
        assert "'early'" not in str(caught.value)


def test_a_string_is_no_set_of_names() -> None:
    with pytest.raises(UsageError, match=r"Misspelt\.before is a set of names of passes, not 'quantize'"):
        fxcompress.recommended_order([Misspelt()])
    with pytest.raises(UsageError, match=r"Numbered\.stage is an fxcompress\.Stage"):
        fxcompress.recommended_order([Numbered()])


# --- presets ---


def test_presets_are_lists_of_passes_in_order() -> None:
    assert list(fxcompress.presets()) == ["fast-cpu", "small", "accurate"]
    for name, passes in fxcompress.presets().items():
        in_order(passes)
        assert [p.name for p in in_order(name)] == [p.name for p in in_order(passes)]
        assert fxcompress.recommended_order(name) == passes
    fxcompress.presets()["fast-cpu"].clear()
    assert fxcompress.presets()["fast-cpu"]


def test_a_preset_stands_for_its_passes_in_a_list() -> None:
    found = [p.name for p in in_order(["prune-channels", "fast-cpu", "cast-precision"])]
    assert found == ["prune-channels", *(p.name for p in in_order("fast-cpu")), "cast-precision"]


@pytest.mark.parametrize("name", ["fast-gpu", "fast_cpu", "acurate"])
def test_the_nearest_preset_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{'accurate' if name[0] == 'a' else 'fast-cpu'}'"):
        in_order(name)


def test_presets_have_no_options() -> None:
    with pytest.raises(UsageError, match="is a preset and has no options; take its passes"):
        in_order("small:ratio=0.3")
