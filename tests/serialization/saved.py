"""Graphs of all kinds to save, and what it means that one came back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.recording.structure import leaves
from fxcompress.report import CARRIER
from fxcompress.serialization import GRAPH_FILE, WEIGHTS_FILE
from fxcompress.serialization.tensors import TensorReader, write_safetensors

__all__ = ["GRAPHS", "check_same", "resigned", "there_and_back"]


def there_and_back(gm: fx.GraphModule, folder: Path, **options: Any) -> fx.GraphModule:
    """What is loaded after ``gm`` was saved."""
    fxcompress.save(gm, folder)
    return fxcompress.load(folder, **options)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in ``value``."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]


def check_same(a: fx.GraphModule, b: fx.GraphModule, args: tuple[Any, ...] = (), **kwargs: Any) -> None:
    """``b`` is ``a`` once more: nodes, modules, flags, tensors with layout and ties, report, and outputs."""
    assert [(n.op, n.name, n.target if n.op != "call_function" else "") for n in a.graph.nodes] == [
        (n.op, n.name, n.target if n.op != "call_function" else "") for n in b.graph.nodes
    ]
    first, second = (dict(m.named_modules(remove_duplicate=False)) for m in (a, b))
    first.pop(CARRIER, None), second.pop(CARRIER, None)
    assert list(first) == list(second)
    assert [m.training for m in first.values()] == [m.training for m in second.values()]
    assert _sharing(first) == _sharing(second)
    for pairs in ((m.named_parameters(remove_duplicate=False) for m in (a, b)), (_buffers(a), _buffers(b))):
        _check_tensors(*(dict(p) for p in pairs))
    assert list(a.state_dict()) == list(b.state_dict())
    if hasattr(a, CARRIER):
        assert fxcompress.report(a).to_dict() == fxcompress.report(b).to_dict()
    if args or kwargs:
        outputs = []
        for gm in (a, b):
            torch.manual_seed(0)
            outputs.append(tensors_of(gm(*copy.deepcopy(args), **copy.deepcopy(kwargs))))
        assert len(outputs[0]) == len(outputs[1])
        for x, y in zip(*outputs, strict=True):
            torch.testing.assert_close(y, x, equal_nan=True)


def _buffers(gm: nn.Module) -> list[tuple[str, Tensor]]:
    return list(gm.named_buffers(remove_duplicate=False))


def _sharing(modules: dict[str, nn.Module]) -> list[int]:
    """For each module the position of the first path of the same object."""
    firsts: dict[int, int] = {}
    return [firsts.setdefault(id(m), i) for i, m in enumerate(modules.values())]


def _check_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    objects: tuple[dict[int, int], ...] = ({}, {})
    for i, (name, x) in enumerate(a.items()):
        y = b[name]
        assert (type(x), x.dtype, x.shape, x.requires_grad) == (type(y), y.dtype, y.shape, y.requires_grad), name
        assert x.is_contiguous() == y.is_contiguous() or not x.is_non_overlapping_and_dense(), name
        assert torch.equal(x, y) or bool((x != x).any()), name
        assert objects[0].setdefault(id(x), i) == objects[1].setdefault(id(y), i), f"{name} is tied otherwise"


def resigned(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change what ``graph.json`` says, as somebody would who knows the format: the weights' header fits it again."""
    import hashlib

    graph = change(json.loads((folder / GRAPH_FILE).read_text()))
    data = json.dumps(graph).encode()
    reader = TensorReader(folder / WEIGHTS_FILE, torch.device("cpu"), check=False)
    stored = {key: reader._file.get_tensor(key).clone() for key in reader._keys}
    for file in (GRAPH_FILE, WEIGHTS_FILE):
        (folder / file).unlink()  # it may be a link to a good one
    (folder / GRAPH_FILE).write_bytes(data)
    write_safetensors(folder / WEIGHTS_FILE, stored, {"graph_sha256": hashlib.sha256(data).hexdigest()})


class Convolutions(nn.Module):
    """Convolutions with batch norm, and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(self.b(x)).relu() + x
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent layer, an embedding tied to the head, keyword inputs and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, tokens: Tensor, *, double: bool = False) -> dict[str, Any]:
        hidden, state = self.rnn(self.embedding(tokens))
        return {"logits": self.head(hidden) * self.scale, "state": state, "double": [hidden, hidden * 2.0]}


def _images(*passes: str) -> fx.GraphModule:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    return fxcompress.compile(Convolutions().eval(), passes, x, calibration=[x], verify=False)


def _structured() -> fx.GraphModule:
    program = torch.export.export(_Structured(), ([torch.randn(2, 3)],), {"options": {"bias": torch.randn(3)}})
    gm = program.module(check_guards=False)
    gm._forward_hooks.clear(), gm._forward_pre_hooks.clear()  # checks of inputs, which are code
    return gm  # type: ignore[return-value]


class _Structured(nn.Module):
    """Takes a list and a dict, gives a dict of tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, xs: list[Tensor], *, options: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        y = self.linear(xs[0]) + options["bias"]
        return {"both": (y, y.relu())}


def _tokens() -> fx.GraphModule:
    torch.manual_seed(0)
    return fxcompress.compile(Recurrent().eval(), [], torch.randint(11, (2, 4)), verify=False)


GRAPHS: dict[str, tuple[Callable[[], fx.GraphModule], tuple[Any, ...], dict[str, Any]]] = {
    "plain": (_images, (torch.randn(2, 3, 8, 8),), {}),
    "lowered": (lambda: _images("fold-batch-norm", "quantize", "lower-int8"), (torch.randn(2, 3, 8, 8),), {}),
    "trained for integers": (lambda: _images("fold-batch-norm", "fake-quantize"), (torch.randn(2, 3, 8, 8),), {}),
    "factorised": (lambda: _images("fold-batch-norm", "alds:ratio=0.5"), (torch.randn(2, 3, 8, 8),), {}),
    "pruned": (lambda: _images("prune-channels:ratio=0.5"), (torch.randn(2, 3, 8, 8),), {}),
    "bfloat16": (lambda: _images("cast-precision"), (torch.randn(2, 3, 8, 8),), {}),
    "recurrent": (_tokens, (torch.randint(11, (2, 4)),), {}),
    "structured": (_structured, ([torch.randn(2, 3)],), {"options": {"bias": torch.randn(3)}}),
}
"""How to make each, and inputs of it."""
