"""What is saved comes back: nodes, weights, ties, flags, structure and outputs."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.passes.distillation import SoftTargets
from tests.networks import Network, shells
from tests.serialization.saved import GRAPHS, Convolutions, check_same, there_and_back
from tests.strategies import networks

CONTAINERS = (shells.Pair, shells.Output)


@pytest.mark.parametrize("name", GRAPHS)
def test_kinds_of_graphs(name: str, tmp_path: Path) -> None:
    make, args, kwargs = GRAPHS[name]
    gm = make()
    back = there_and_back(gm, tmp_path / "saved")
    check_same(gm, back, args, **kwargs)
    assert back.code == gm.code
    check_same(gm, there_and_back(back, tmp_path / "saved"), args, **kwargs)
    check_same(gm, copy.deepcopy(back), args, **kwargs)


@pytest.mark.filterwarnings("ignore:loading this graph will take trusted")
@given(network=networks())
def test_drawn_networks(network: Network) -> None:
    for training in (False, True):
        gm = fxcompress.trace(network.module, network.args, example_kwargs=network.kwargs).train(training)
        with tempfile.TemporaryDirectory() as folder:
            back = there_and_back(gm, Path(folder) / "saved", trusted=CONTAINERS)
            check_same(gm, back)
            assert back.code == gm.code
            check_same(gm.eval(), back.eval(), network.args, **network.kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    gm = _holder(torch.randn(3, 4).to(dtype))
    check_same(gm, there_and_back(gm, tmp_path / "saved"))


def test_buffers_of_integers_bits_and_eighths(tmp_path: Path) -> None:
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint16):
        value = torch.randint(0, 2, (5,)).to(dtype)
        back = there_and_back(_holder(value, buffer=True), tmp_path / str(dtype)).get_buffer("value")
        assert back.dtype == dtype
        assert torch.equal(back.view(torch.uint8), value.view(torch.uint8))


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    for i, shape in enumerate(((), (0,), (3, 0, 2), (1,))):
        gm = _holder(torch.zeros(shape))
        check_same(gm, there_and_back(gm, tmp_path / str(i)))


def test_memory_formats_survive(tmp_path: Path) -> None:
    gm = _holder(torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last))
    back = there_and_back(gm, tmp_path / "saved")
    assert back.value.stride() == gm.value.stride()
    transposed = _holder(torch.randn(4, 3).T)
    assert there_and_back(transposed, tmp_path / "other").value.stride() == (1, 3)


def test_tensors_in_the_same_memory_stay_there(tmp_path: Path) -> None:
    root = nn.Module()
    root.a = nn.Parameter(torch.randn(4, 6))
    root.b = nn.Parameter(root.a.detach().T)  # another parameter, the same memory
    root.register_buffer("c", root.a.detach()[1:3])
    back = there_and_back(_reads(root, "a", "b", "c"), tmp_path / "saved")
    assert (tmp_path / "saved" / "weights.safetensors").stat().st_size < 600
    with torch.no_grad():
        back.a.mul_(2.0)
    assert torch.equal(back.b, back.a.T)
    assert torch.equal(back.c, back.a[1:3])
    assert torch.equal(back.a, root.a * 2.0)


def test_loaded_weights_can_be_trained_and_the_file_stays(tmp_path: Path) -> None:
    gm = GRAPHS["plain"][0]()
    back = there_and_back(gm, tmp_path / "saved").train()
    before = (tmp_path / "saved" / "weights.safetensors").read_bytes()
    optimizer = torch.optim.SGD(back.parameters(), lr=0.1)
    back(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(back.head.weight, gm.head.weight)
    assert (tmp_path / "saved" / "weights.safetensors").read_bytes() == before


def test_distillation_comes_back_and_can_be_detached(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    teacher, student = Convolutions().eval(), Convolutions().eval()
    attach = fxcompress.registered_passes()["attach-distillation"](teacher=teacher, losses=[SoftTargets()])
    fused = fxcompress.compile(student, [attach], x)
    back = there_and_back(fused, tmp_path / "saved")
    check_same(fused, back, (x,))
    plain = fxcompress.compile(back, ["detach-distillation"], x)
    torch.testing.assert_close(plain(x), student(x))


def test_passes_go_on_with_what_was_loaded(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    gm = fxcompress.compile(Convolutions().eval(), ["fold-batch-norm"], x)
    back = there_and_back(gm, tmp_path / "saved")
    smaller = fxcompress.compile(back, ["quantize", "lower-int8"], x, calibration=[x])
    assert [p.name for p in fxcompress.report(smaller).passes] == ["fold-batch-norm", "quantize", "lower-int8"]


@dataclasses.dataclass
class Result:
    """What a model may give."""

    logits: Tensor
    hidden: Tensor | None = None


class _GivesResult(nn.Module):
    def forward(self, x: Tensor) -> Result:
        return Result(x * 2.0)


class _Odd(nn.Module):
    """A module of a model's own, which the recorder keeps whole when it is asked to."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.settings = factor, {"bias": (1, None)}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.settings["bias"][0]


def test_containers_of_the_source(tmp_path: Path) -> None:
    gm, x = fxcompress.trace(_GivesResult(), torch.ones(3)), torch.ones(3)
    with pytest.warns(UserWarning, match="trusted"):
        fxcompress.save(gm, tmp_path / "saved")
    with pytest.raises(fxcompress.SerializationError, match=r"Result.*stand_ins=True"):
        fxcompress.load(tmp_path / "saved")
    trusted = fxcompress.load(tmp_path / "saved", trusted=[Result])
    assert isinstance(trusted(x), Result)
    by_name = fxcompress.load(tmp_path / "saved", trusted={f"{Result.__module__}.Result": Result})
    assert torch.equal(by_name(x).logits, x * 2.0)
    stand_in = fxcompress.load(tmp_path / "saved", stand_ins=True)(x)
    assert torch.equal(stand_in.logits, x * 2.0)
    assert torch.equal(stand_in["logits"], stand_in[0])
    assert stand_in.hidden is None
    assert stand_in.keys() == ["logits"]


def test_modules_of_the_source(tmp_path: Path) -> None:
    gm = fxcompress.trace(nn.Sequential(_Odd(3.0)), torch.ones(2), opaque=["0"])
    with pytest.warns(UserWarning, match="_Odd"):
        fxcompress.save(gm, tmp_path / "saved")
    with pytest.raises(fxcompress.SerializationError, match="_Odd"):
        fxcompress.load(tmp_path / "saved")
    assert torch.equal(fxcompress.load(tmp_path / "saved", trusted=[_Odd])(torch.ones(2)), torch.full((2,), 4.0))


def test_a_process_without_the_source_loads_it(tmp_path: Path) -> None:
    make, (x,), _ = GRAPHS["lowered"]
    gm = make()
    fxcompress.save(gm, tmp_path / "saved")
    torch.save((x, gm(x)), tmp_path / "pair.pt")
    script = (
        "import sys, torch, fxcompress\n"
        f"x, y = torch.load({str(tmp_path / 'pair.pt')!r})\n"
        f"gm = fxcompress.load({str(tmp_path / 'saved')!r})\n"
        "torch.testing.assert_close(gm(x), y)\n"
        "assert not any(name.split('.')[0] in ('tests', 'pickle5') for name in sys.modules)\n"
        "print(fxcompress.report(gm))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lower-int8" in done.stdout


def test_pickling_and_compiling_what_was_loaded(tmp_path: Path) -> None:
    make, (x,), _ = GRAPHS["plain"]
    back = there_and_back(make(), tmp_path / "saved")
    torch.testing.assert_close(pickle.loads(pickle.dumps(back))(x), back(x))
    torch.testing.assert_close(torch.compile(back, backend="aot_eager")(x), back(x))
    torch.testing.assert_close(torch.export.export(back, (x,)).module()(x), back(x))


def test_device_and_lazy_loading(tmp_path: Path) -> None:
    gm = GRAPHS["plain"][0]()
    fxcompress.save(gm, tmp_path / "saved")
    assert {p.device.type for p in fxcompress.load(tmp_path / "saved", device="meta").parameters()} == {"meta"}
    check_same(gm, fxcompress.load(tmp_path / "saved", check=False))


def _reads(root: nn.Module, *names: str) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(tuple(graph.get_attr(name) for name in names))
    return fx.GraphModule(root, graph)


def _holder(value: Tensor, buffer: bool = False) -> fx.GraphModule:
    root: Any = nn.Module()
    if buffer:
        root.register_buffer("value", value)
    else:
        root.value = nn.Parameter(value)
    return _reads(root, "value")
