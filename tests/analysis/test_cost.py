"""Parameters, bytes and MACs of graphs and whole models; the formulas one by one are in ``test_contractions.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from torch import Tensor, fx, nn

from fxcompress.analysis import bind_inputs, cost
from fxcompress.errors import UsageError
from tests.analysis.counting import counted, graph_of, measured, rand
from tests.networks import Network
from tests.strategies import networks
from tests.torchvision_shim import models


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))


def test_by_hand() -> None:
    gm = fx.symbolic_trace(Small())
    found = cost(gm, (rand(2, 3, 4, 6),))
    by_name = {node.name: macs for node, macs in found.macs_by_node.items() if macs}
    assert by_name == {"conv": 2 * 8 * 4 * 6 * 3 * 9, "linear": 2 * 8 * 5}
    assert found.macs == 10368 + 80
    assert found.parameters == (3 * 9 * 8 + 8) + 2 * 8 + (8 * 5 + 5)
    assert found.parameter_bytes == 4 * found.parameters
    assert found.buffer_bytes == 4 * 8 * 2 + 8
    assert set(found.macs_by_node) == set(gm.graph.nodes)


def test_without_inputs_only_macs_are_missing() -> None:
    gm = fx.symbolic_trace(Small())
    found, full = cost(gm), cost(gm, (rand(2, 3, 4, 6),))
    assert found.macs is None
    assert found.macs_by_node == {}
    assert (found.parameters, found.buffer_bytes) == (full.parameters, full.buffer_bytes)


def test_no_arguments_are_inputs_too() -> None:
    graph = fx.Graph()
    eye = graph.call_function(torch.eye, (3,))
    graph.output(graph.call_function(torch.mm, (eye, eye)))
    gm = fx.GraphModule(nn.Module(), graph)
    assert cost(gm, ()).macs == 27


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="'x'"):
        cost(fx.symbolic_trace(Small()), ())


def test_training_mode_leaves_the_buffers() -> None:
    gm = fx.symbolic_trace(Small()).train()
    cost(gm, (rand(2, 3, 4, 6),))
    assert gm.norm.num_batches_tracked == 0


class TestBytes:
    def test_tied_parameters_count_once(self) -> None:
        root = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3), "t": nn.Linear(3, 4, bias=False)})
        root["b"].weight = root["a"].weight
        root["t"].weight = nn.Parameter(root["a"].weight.detach().T)
        root["a_again"] = root["a"]
        gm = fx.symbolic_trace(nn.Sequential(root["a"], root["t"], root["b"], root["t"], root["a_again"]))
        assert cost(gm).parameters == 12 + 3 + 3
        assert cost(gm).parameter_bytes == 4 * 18

    def test_dtypes_and_a_buffer_on_a_parameter(self) -> None:
        root = nn.Module()
        root.weight = nn.Parameter(torch.zeros(6, dtype=torch.float16))
        root.register_buffer("part", root.weight.detach()[2:4])
        root.register_buffer("codes", torch.zeros(5, dtype=torch.int8))
        graph = fx.Graph()
        graph.output([graph.get_attr(name) for name in ("weight", "part", "codes")])
        found = cost(fx.GraphModule(root, graph))
        assert (found.parameters, found.parameter_bytes, found.buffer_bytes) == (6, 12, 5)

    def test_a_view_counts_as_far_as_it_reaches(self) -> None:
        module = nn.Linear(2, 3, bias=False)
        module.weight = nn.Parameter(rand(100, 2)[10:13])
        found = cost(graph_of(module, 1))
        assert (found.parameters, found.parameter_bytes) == (6, 24)


class Opaque(nn.Module):
    """Python that a tracer would choke on, around layers, a functional call and a contraction without a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        for head in self.heads:
            y = head(y) if y.sum() > -1e9 else y
        return torch.tensordot(y, y.mT, 1) @ y


def test_modules_are_counted_inside() -> None:
    module, x = Opaque(), rand(2, 3, 6, 6)
    assert counted(module, x) == measured(module, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torch_script_is_measured() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)))
    assert counted(scripted, rand(2, 3)) == 2 * (3 * 4 + 4 * 5)
    assert dict(scripted.named_buffers())["1.num_batches_tracked"] == 0


@given(networks())
def test_any_network_as_one_opaque_call(network: Network) -> None:
    graph = fx.Graph()
    args = tuple(graph.placeholder(f"arg{index}") for index in range(len(network.args)))
    graph.output(graph.call_module("m", args, {name: graph.placeholder(name) for name in network.kwargs}))
    gm = fx.GraphModule(nn.ModuleDict({"m": network.module}), graph)
    found = cost(gm, network.args, network.kwargs)
    assert found.macs == measured(network.module, *network.args, **network.kwargs)
    assert found.parameters == sum(parameter.numel() for parameter in network.module.parameters())


def test_unknown_operators_are_named() -> None:
    library = torch.library.Library("fxcompress_test", "FRAGMENT")
    library.define("mystery(Tensor x) -> Tensor")
    library.impl("mystery", lambda x: x * 2, "CompositeExplicitAutograd")
    library.define("known(Tensor x) -> Tensor")
    library.impl("known", lambda x: x @ x, "CompositeImplicitAutograd")
    ops = torch.ops.fxcompress_test
    found = cost(graph_of(ops.mystery.default, 1), (rand(3, 3),))
    assert (found.macs, found.uncounted) == (0, {"fxcompress_test.mystery"})
    assert counted(ops.known, rand(3, 3)) == 27
    library._destroy()


WHOLE: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (models.resnet18, (1, 3, 64, 64)),
    "mobilenet_v2": (models.mobilenet_v2, (2, 3, 64, 64)),
    "shufflenet_v2": (models.shufflenet_v2_x0_5, (1, 3, 64, 64)),
    "vit": (lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64), (2, 3, 32, 32)),
    "swin": (lambda: models.swin_transformer.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4]), (1, 3, 32, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name: str) -> None:
    make, size = WHOLE[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    gm, x = fx.symbolic_trace(model), rand(*size)
    found = cost(gm, bind_inputs(gm, (x,)))
    assert found.macs == sum(found.macs_by_node.values()) == measured(model, x)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.uncounted == frozenset()


def test_resnet18_is_as_published() -> None:
    """11,689,512 parameters and 1.814 GMACs at 224 x 224 (torchvision's table)."""
    found = cost(fx.symbolic_trace(models.resnet18().eval()), (rand(1, 3, 224, 224),))
    assert found.parameters == 11_689_512
    assert found.macs == 1_814_073_344
