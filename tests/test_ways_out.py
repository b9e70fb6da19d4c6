"""Compressed graphs in other hands: torch.compile, torch.export, ONNX Runtime, OpenVINO, ExecuTorch."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import fxcompress
from fxcompress import FxCompressError, UsageError
from fxcompress.analysis.inputs import bind_inputs
from fxcompress.passes.quantization.kernels import unavailable
from tests.networks import OUTPUTS, Network, leaves, run
from tests.strategies import networks

SIZES = (1, 2, 5)
ROUNDING = 1e-5
"""Relative: what another order of sums makes of float32."""
A_STEP = 0.02
"""Relative to the largest output: where a value is rounded to the next integer, some steps of a scale."""


class Net(nn.Module):
    """A convolutional network with all that stands between quantised layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.BatchNorm2d(16), nn.Hardswish())
        self.head = nn.Sequential(nn.Linear(16 * 16, 32), nn.GELU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        return self.head((x + self.body(x)).flatten(1))


FOLDED = ["remove-identity", "fold-batch-norm"]
EXACT_CHAINS = {
    "traced": [],
    "folded": FOLDED,
    "pruned": ["prune-channels:ratio=0.5", *FOLDED],
    "factorised": [*FOLDED, "alds-plus:ratio=0.4"],
    "half": [*FOLDED, "cast-precision:dtype=float16"],
}
INTEGER_CHAINS = {
    "int8": [*FOLDED, "quantize"],
    "int8-addends": [*FOLDED, "quantize:round_addends=True"],
    "int8-symmetric": [*FOLDED, "quantize:symmetric=True"],
    "int16": [*FOLDED, "quantize:activation_bits=16"],
    "dynamic": [*FOLDED, "quantize:dynamic=True"],
    "weights": [*FOLDED, "quantize:activation_bits=None"],
    "int4-groups": [*FOLDED, "quantize:activation_bits=None,weight_bits=4,granularity=4"],
    "fake": [*FOLDED, "fake-quantize"],
    "everything": ["prune-channels:ratio=0.25", *FOLDED, "alds:ratio=0.3", "quantize"],
}
CHAINS = EXACT_CHAINS | INTEGER_CHAINS


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@functools.cache
def compressed(chain: str) -> fx.GraphModule:
    torch.manual_seed(0)
    network = Net().eval()
    for norm in (network.stem[1], network.body[1]):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxcompress.compile(network, CHAINS[chain], images(1), calibration=[images(8, i) for i in range(1, 4)])


def session(path: Path, optimise: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def in_onnxruntime(path: Path, *inputs: Tensor, optimise: bool = True) -> list[Tensor]:
    found = session(path, optimise)
    names = [value.name for value in found.get_inputs()]
    given_ = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.as_tensor(value) for value in found.run(None, given_)]


def difference(expected: Tensor, found: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((expected - found).abs().max() / expected.abs().max())


def tolerance(chain: str) -> float:
    return {"half": 1e-2}.get(chain, A_STEP if chain in INTEGER_CHAINS else ROUNDING)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def initializers(path: Path) -> dict[str, numpy.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


# ------------------------------------------------------------------------------------------------- torch
@pytest.mark.parametrize("chain", ["pruned", "factorised", "int8", "dynamic", "int4-groups", "fake"])
def test_torch_compile_takes_the_whole_graph(chain: str) -> None:
    gm = compressed(chain)
    torch.compiler.reset()
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in SIZES[1:]:
            assert difference(gm(images(size)), compiled(images(size))) <= ROUNDING


@pytest.mark.parametrize("chain", CHAINS)
def test_torch_export_keeps_the_batch_size_free(chain: str) -> None:
    gm = compressed(chain)
    program = fxcompress.export(gm, images(1)).module()
    with torch.no_grad():
        for size in SIZES:
            assert difference(gm(images(size)), program(images(size))) <= ROUNDING


def test_a_program_runs_without_this_package(tmp_path: Path) -> None:
    gm, x = compressed("int8"), images(3)
    torch.export.save(fxcompress.export(gm, x), tmp_path / "model.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "import torch.ao.quantization.fx._decomposed\n"
        "program = torch.export.load('model.pt2').module()\n"
        "torch.save(program(torch.load('x.pt')), 'y.pt')\n"
        "assert not any(name.startswith('fxcompress') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert difference(gm(x), torch.load(tmp_path / "y.pt")) <= ROUNDING


# ------------------------------------------------------------------------------------------------- ONNX
@pytest.mark.parametrize("chain", CHAINS)
def test_onnx_runtime_gives_the_same(chain: str, tmp_path: Path) -> None:
    gm = compressed(chain)
    path = fxcompress.export_onnx(gm, tmp_path / "model.onnx", images(1))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    with torch.no_grad():
        for size in SIZES:
            (found,) = in_onnxruntime(path, images(size))
            assert difference(gm(images(size)), found) <= tolerance(chain)


@pytest.mark.parametrize("chain", ["int8", "int8-addends", "int8-symmetric", "everything"])
def test_integers_are_integers_in_the_file(chain: str, tmp_path: Path) -> None:
    gm = compressed(chain)
    path = fxcompress.export_onnx(gm, tmp_path / "model.onnx", images(1))
    stored = initializers(path)
    ours = {name: value for name, value in gm.named_parameters() if value.dtype is torch.int8}
    assert ours
    for name, weight in ours.items():
        assert stored[name].dtype == numpy.int8
        assert torch.equal(torch.tensor(stored[name]), weight)
    found = operators(path)
    quantised = [node for node in gm.graph.nodes if "quantized_decomposed.quantize" in str(node.target)]
    assert found["QuantizeLinear"] == len(quantised)
    assert found["DequantizeLinear"] == len(quantised) + len(ours)
    assert "Round" not in found
    weights = [n for n in onnx.load(path).graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    assert [len(n.input) for n in weights] == [2] * len(ours)  # zero points that are all zero are left out


def test_the_file_is_as_small_as_the_integers(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    x, data = torch.randn(1, 256), [torch.randn(16, 256)]
    sizes = {}
    for name, passes in {"float": [], "int8": ["quantize"]}.items():
        gm = fxcompress.compile(wide, passes, x, calibration=data)
        sizes[name] = fxcompress.export_onnx(gm, tmp_path / f"{name}.onnx", x).stat().st_size
    assert sizes["int8"] < 0.3 * sizes["float"]


def _dyadic(gm: fx.GraphModule) -> None:
    """Make all scales powers of two and all biases sums of few, so that float32 arithmetic is exact in any order."""

    def power(value: float) -> float:
        return float(2.0 ** round(numpy.log2(value)))

    for node in gm.graph.nodes:
        if "quantize_per_tensor" in str(node.target):
            node.update_arg(1, power(node.args[1]))
    with torch.no_grad():
        for name, buffer in gm.named_buffers():
            if name.endswith("weight_scale"):
                buffer.copy_(torch.tensor([power(v) for v in buffer.flatten().tolist()]).reshape(buffer.shape))
        for name, parameter in gm.named_parameters():
            if name.endswith("bias"):
                parameter.copy_((parameter * 256).round() / 256)
    gm.recompile()


@pytest.mark.parametrize("symmetric", [False, True])
def test_with_scales_that_are_powers_of_two_every_bit_is_the_same(symmetric: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=2), nn.LeakyReLU(0.125),
        nn.Flatten(), nn.Linear(32, 16), nn.Hardtanh(-1, 1), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    gm = fxcompress.compile(network, [f"quantize:symmetric={symmetric}"], images(2), calibration=[images(8, 1)])
    _dyadic(gm)
    path = fxcompress.export_onnx(gm, tmp_path / "model.onnx", images(2))
    x = 3 * images(64, 9)  # beyond what was calibrated, so that values are clipped
    with torch.no_grad():
        (found,) = in_onnxruntime(path, x)
        assert torch.equal(gm(x), found)


def test_limits_of_the_grid_hold_that_are_not_those_of_the_dtype(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4, bias=False).eval()
    nn.init.eye_(layer.weight)
    gm = fxcompress.compile(layer, ["quantize:symmetric=True"], torch.ones(1, 4), calibration=[torch.ones(1, 4)])
    path = fxcompress.export_onnx(gm, tmp_path / "model.onnx", torch.ones(2, 4))
    (found,) = in_onnxruntime(path, torch.full((1, 4), -5.0))
    # -127 scales of 1/127; the least int8, -128, would give -1.008
    torch.testing.assert_close(found, torch.full((1, 4), -1.0), rtol=0, atol=1e-6)
    assert operators(path)["Clip"] == 1


def test_what_was_only_moved_is_not_clipped_again(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 4)).eval()
    gm = fxcompress.compile(network, ["quantize:symmetric=True"], images(2), calibration=[images(8)])
    found = operators(fxcompress.export_onnx(gm, tmp_path / "model.onnx", images(2)))
    assert 0 < found["Clip"] < found["QuantizeLinear"]


class Padded(nn.Module):
    """A tensor padded on two sides, on four, and by the convolution as well; ``pad`` is the first of these."""

    def __init__(self, pad: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(pad, nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="zeros"), nn.ReLU6())
        self.second = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3, groups=8), nn.LeakyReLU(0.125))
        self.third = nn.Conv2d(8, 4, 3, padding=(1, 0))
        self.last = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.third(self.second(self.first(x))))


def padded(pad: nn.Module, passes: list[str]) -> fx.GraphModule:
    torch.manual_seed(2)
    network = Padded(pad).eval()
    network(images(2))
    gm = fxcompress.compile(network, passes, images(2), calibration=[images(8, 1)])
    if passes:
        _dyadic(gm)
    return gm


@pytest.mark.parametrize(
    "passes", [[], ["quantize"], ["quantize:symmetric=True"], ["quantize:activation_bits=16"]], ids=str
)
@settings(max_examples=4, phases=[Phase.generate, Phase.shrink])
@given(sides=st.tuples(*[st.integers(0, 3)] * 4), seed=st.integers(0, 99))
def test_zeros_around_a_convolution_are_its_padding(
    passes: list[str], tmp_path_factory: pytest.TempPathFactory, sides: tuple[int, ...], seed: int
) -> None:
    gm = padded(nn.ZeroPad2d(sides), passes)
    path = fxcompress.export_onnx(gm, tmp_path_factory.mktemp("onnx") / "model.onnx", images(2))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert operators(path)["Pad"] == 0
    x = 3 * images(5, seed)
    with torch.no_grad():
        (found,) = in_onnxruntime(path, x, optimise=False)
        assert difference(gm(x), found) <= ROUNDING


@pytest.mark.parametrize("passes", [[], ["quantize"]], ids=str)
@pytest.mark.parametrize(
    "pad", [nn.ConstantPad2d(1, 0.5), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.ZeroPad2d(-1)], ids=repr
)
def test_other_padding_stays(pad: nn.Module, passes: list[str], tmp_path: Path) -> None:
    gm, x = padded(pad, passes), images(3, 8)
    path = fxcompress.export_onnx(gm, tmp_path / "model.onnx", images(2))
    found = operators(path)
    assert found["Pad"] + found["Slice"] == 1
    with torch.no_grad():
        assert difference(gm(x), in_onnxruntime(path, x, optimise=False)[0]) <= ROUNDING


class Around(nn.Module):
    """What is between padding and a convolution, or reads the padded tensor too, by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Any:
        padded = functional.pad(x, (1, 1, 1, 1))
        if self.kind == "above zero":
            return self.conv(padded.clamp(0.25, 6.0))
        if self.kind == "below zero":
            return self.conv(padded.clamp(max=-0.25))
        if self.kind == "another reader":
            return self.conv(padded) + padded[:, :, 1:-1, 1:-1]
        if self.kind == "an output":
            return self.conv(padded), padded
        if self.kind == "channels":
            return self.conv(functional.pad(x[:, 1:], (1, 1, 1, 1, 1, 0)))
        assert self.kind == "limits around zero"
        return self.conv(padded.clamp(-1.0, 0.5))


@pytest.mark.parametrize("passes", [[], ["quantize"]], ids=str)
@pytest.mark.parametrize(
    "kind", ["above zero", "below zero", "another reader", "an output", "channels", "limits around zero"]
)
def test_padding_that_means_more_stays(kind: str, passes: list[str], tmp_path: Path) -> None:
    torch.manual_seed(3)
    gm = fxcompress.compile(Around(kind).eval(), passes, images(2), calibration=[images(8, 1)])
    path = fxcompress.export_onnx(gm, tmp_path / "model.onnx", images(2))
    assert operators(path)["Pad"] == (kind != "limits around zero")
    x = images(5, 4)
    with torch.no_grad():
        expected, found = gm(x), in_onnxruntime(path, x, optimise=False)
    for a, b in zip(expected if isinstance(expected, tuple) else (expected,), found, strict=True):
        assert difference(a, b) <= (A_STEP if passes else ROUNDING)


def test_integers_are_not_quantised_again(tmp_path: Path) -> None:
    """What is on a grid stays the integers that it is; on another grid it is rounded again."""

    class Again(nn.Module):
        def __init__(self, other: float) -> None:
            super().__init__()
            self.scales = (0.125, other)

        def forward(self, x: Tensor) -> Tensor:
            for scale in self.scales:
                integers = torch.ops.quantized_decomposed.quantize_per_tensor(x, scale, 3, -128, 127, torch.int8)
                x = torch.ops.quantized_decomposed.dequantize_per_tensor(integers, scale, 3, -128, 127, torch.int8)
            return x + 1

    x = 4 * images(64, 5)
    for other, steps in ((0.125, 1), (0.25, 2)):
        gm = fxcompress.trace(Again(other), images(2))
        path = fxcompress.export_onnx(gm, tmp_path / f"{other}.onnx", images(2))
        assert operators(path)["QuantizeLinear"] == steps
        assert torch.equal(gm(x), in_onnxruntime(path, x, optimise=False)[0])  # optimising, it takes one grid of two


def test_several_inputs_by_name_and_outputs_in_containers(tmp_path: Path) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> dict[str, Any]:
            return {"sum": self.layer(x) + more["a"], "rest": (more["b"] * 2,)}

    more = {"a": torch.randn(1, 4), "b": torch.randn(3)}
    gm = fxcompress.compile(Several().eval(), [], torch.randn(1, 4), example_kwargs={"more": more})
    path = fxcompress.export_onnx(gm, tmp_path / "model.onnx", torch.randn(1, 4), example_kwargs={"more": more})
    x, more = torch.randn(7, 4), {"a": torch.randn(7, 4), "b": torch.randn(3)}
    with torch.no_grad():
        expected = gm(x, more=more)
    assert [value.name for value in session(path).get_inputs()] == ["x", "more_a", "more_b"]
    found = in_onnxruntime(path, x, more["a"], more["b"])
    assert difference(expected["sum"], found[0]) <= ROUNDING
    assert torch.equal(expected["rest"][0], found[1])
    program = fxcompress.export(gm, torch.randn(1, 4), example_kwargs={"more": {"a": x[:1], "b": more["b"]}})
    with torch.no_grad():
        assert difference(expected["sum"], program.module()(x, more=more)["sum"]) <= ROUNDING


# ------------------------------------------------------------------------------------------------- drawn networks
PYTREES = [name for name in OUTPUTS if name != "dataclass"]
"""torch.export knows no dataclasses unless they are registered with it."""
DRAWN = (["remove-identity", "fold-batch-norm"], ["svd:ratio=0.3"], ["fold-batch-norm", "quantize:activation_bits=16"])


@pytest.mark.parametrize("passes", DRAWN, ids=lambda passes: passes[-1].partition(":")[0])
@settings(max_examples=3, phases=[Phase.generate, Phase.shrink])
@given(network=networks(outputs=PYTREES))
def test_drawn_networks_leave(passes: list[str], tmp_path_factory: pytest.TempPathFactory, network: Network) -> None:
    given_ = {"example_inputs": network.args, "example_kwargs": network.kwargs}
    try:
        gm = fxcompress.compile(network.module, passes, calibration=network.calibration(), verify=False, **given_)
    except fxcompress.PreconditionError:
        return event("refused")
    program = fxcompress.export(gm, **given_).module()
    path = fxcompress.export_onnx(gm, tmp_path_factory.mktemp("onnx") / "model.onnx", **given_)
    for batch in (network.batch, network.batch + 3):
        args, kwargs = network.fresh(5, batch)
        expected = [leaf for _, leaf in leaves(run(gm, (args, kwargs))) if isinstance(leaf, Tensor)]
        exported = [leaf for _, leaf in leaves(run(program, (args, kwargs))) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in pytree.tree_leaves(bind_inputs(gm, args, kwargs)) if isinstance(leaf, Tensor)]
        # Optimising, ONNX Runtime rounds what recurrent layers of integer weights compute: what is tested is the file.
        found = in_onnxruntime(path, *inputs, optimise=False)
        for a, b, c in zip(expected, exported, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(c, a, rtol=1e-3, atol=1e-3)
    return event("left")


# ------------------------------------------------------------------------------------------------- what cannot
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("chain", ["int8", "int8-addends", "dynamic", "weights"])
def test_lowered_graphs_leave_as_what_they_stand_for(chain: str, tmp_path: Path) -> None:
    """Packed weights stay behind: what leaves is the graph that was lowered, to the bit."""
    gm, x = compressed(chain), images(4, 7)
    lowered = fxcompress.compile(gm, ["lower-int8"], images(4))
    assert fxcompress.report(lowered).passes[-1].sites
    program = fxcompress.export(lowered, images(4))
    assert not any("onednn" in str(n.target) or "quantized." in str(n.target) for n in program.graph.nodes)
    with torch.no_grad():
        assert difference(gm(x), program.module()(x)) <= ROUNDING
        path = fxcompress.export_onnx(lowered, tmp_path / "model.onnx", images(4))
        assert difference(gm(x), in_onnxruntime(path, x)[0]) <= A_STEP
    assert operators(path)["DequantizeLinear"] > 0


def test_an_operator_without_a_translation_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    gm = fxcompress.trace(Odd(), torch.randn(2, 3))
    with pytest.raises(FxCompressError, match=r"torch.onnx cannot write this graph: .*bessel_j0"):
        fxcompress.export_onnx(gm, tmp_path / "model.onnx", torch.randn(2, 3))
    assert not (tmp_path / "model.onnx").exists()


def test_what_torch_export_refuses_is_said(tmp_path: Path) -> None:
    class Unknown:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Makes(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Unknown(x + 1)

    gm = fxcompress.trace(Makes(), torch.randn(2, 3))
    with pytest.raises(FxCompressError, match=r"torch.export refuses this graph: .*Unknown"):
        fxcompress.export(gm, torch.randn(2, 3))


def test_wrong_calls_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm, path = compressed("folded"), tmp_path / "model.onnx"
    with pytest.raises(UsageError, match="not Net"):
        fxcompress.export(Net(), images(1))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="do not fit the graph"):
        fxcompress.export(gm)
    with pytest.raises(UsageError, match="opset is at least 21"):
        fxcompress.export_onnx(gm, path, images(1), opset=18)
    with pytest.raises(UsageError, match="cannot write"):
        fxcompress.export_onnx(gm, tmp_path / "nowhere" / "model.onnx", images(1))
    monkeypatch.setitem(sys.modules, "fxcompress.onnx_operators", None)
    with pytest.raises(UsageError, match=r"pip install 'fxcompress\[onnx\]'"):
        fxcompress.export_onnx(gm, path, images(1))


# ------------------------------------------------------------------------------------------------- other runtimes
@pytest.mark.parametrize("chain", ["folded", "pruned", "factorised", "int8", "int8-addends", "everything"])
def test_openvino_gives_the_same(chain: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    gm = compressed(chain)
    path = fxcompress.export_onnx(gm, tmp_path / "model.onnx", images(1))
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(openvino.convert_model(path), "CPU", options)
    with torch.no_grad():
        for size in SIZES:
            found = torch.as_tensor(compiled([images(size).numpy()])[0])
            assert difference(gm(images(size)), found) <= (0.1 if chain in INTEGER_CHAINS else ROUNDING)
    if chain == "int8":
        kinds = {}
        for op in compiled.get_runtime_model().get_ops():
            info = op.get_rt_info()
            kinds.setdefault(info["layerType"].astype(str), set()).add(info["runtimePrecision"].astype(str))
        assert kinds["Convolution"] <= {"u8", "i8"}
        assert kinds["FullyConnected"] <= {"u8", "i8"}


@pytest.mark.parametrize("chain", ["folded", "factorised"])  # int8: the README says what XNNPACK makes of it
def test_executorch_gives_the_same(chain: str) -> None:
    pytest.importorskip("executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    gm, x = compressed(chain), images(2)
    program = to_edge_transform_and_lower(fxcompress.export(gm, x), partitioner=[XnnpackPartitioner()]).to_executorch()
    method = Runtime.get().load_program(program.buffer).load_method("forward")
    with torch.no_grad():
        assert difference(gm(x), method.execute([x])[0]) <= ROUNDING
