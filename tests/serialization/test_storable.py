"""What passes put into graphs can be saved: nobody forgets to mark a module."""

from __future__ import annotations

import importlib
import pkgutil

import torch
from torch import nn

import fxcompress
from fxcompress.storable import qualified_name, stored_names

NOT_IN_GRAPHS = {
    "fxcompress.report._Carrier": "is written as report.json",
    "fxcompress.recovery.objective.Objective": "wraps a graph while it is trained",
}
CALLS_CODE_OF_THE_MODEL = {f"fxcompress.modules.{name}" for name in ("AutogradCall", "MethodCall", "Refill")}


def _modules() -> set[type[nn.Module]]:
    for info in pkgutil.walk_packages(fxcompress.__path__, "fxcompress."):
        importlib.import_module(info.name)
    pending, found = [nn.Module], set()
    while pending:
        for kind in pending.pop().__subclasses__():
            if kind not in found:
                found.add(kind)
                pending.append(kind)
    return {kind for kind in found if kind.__module__.startswith("fxcompress.")}


def test_every_module_of_ours_is_storable_or_says_why_not() -> None:
    abstract = {qualified_name(kind) for kind in _modules() if kind.__subclasses__()}
    unmarked = {qualified_name(kind) for kind in _modules()} - set(stored_names())
    assert unmarked - abstract - CALLS_CODE_OF_THE_MODEL - set(NOT_IN_GRAPHS) == set()


def test_modules_that_call_code_of_the_model_are_not() -> None:
    assert not CALLS_CODE_OF_THE_MODEL & set(stored_names())
    assert all(
        isinstance(getattr(fxcompress.modules, name.rpartition(".")[2]), type) for name in CALLS_CODE_OF_THE_MODEL
    )


def test_names_lead_back() -> None:
    from fxcompress.serialization.vocabulary import Vocabulary, _functions, own_name

    vocabulary = Vocabulary()
    for name, value in _functions().items():
        again = own_name(value)
        assert again is not None, name
        assert vocabulary.find(again) is value, name
    for kind in (nn.Conv2d, nn.MultiheadAttention, nn.LSTM, nn.Sequential):
        assert vocabulary.find(own_name(kind)) is kind
    for operator in (torch.ops.aten.add.Tensor, torch.ops.aten.add, torch.ops.quantized.max_pool2d):
        assert vocabulary.find(own_name(operator)) is operator
