"""What is shared in a graph, and by whom."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxcompress.analysis import Aliasing, aliasing


def names(nodes: tuple[fx.Node, ...]) -> list[str]:
    return [node.name for node in nodes]


def build(tensors: nn.Module, *calls: str, reads: tuple[str, ...] = ()) -> tuple[fx.GraphModule, Aliasing]:
    """A chain of module calls, and then a sum with the sums of the tensors read."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for path in calls:
        value = graph.call_module(path, (value,))
    for name in reads:
        value = graph.call_function(torch.add, (value, graph.call_method("sum", (graph.get_attr(name),))))
    graph.output(value)
    gm = fx.GraphModule(tensors, graph)
    return gm, aliasing(gm)


def test_by_hand() -> None:
    root = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2), "d": nn.Linear(2, 2)})
    root["b"] = root["a"]
    root["d"].weight = root["c"].weight
    gm, found = build(root, "a", "b", "c", "d", "a", reads=("c.bias",))
    assert found.paths(gm.a) == ("a", "b")
    assert names(found.calls(gm.b)) == ["a", "b", "a_1"]
    assert found.is_shared(gm.a)
    assert found.names(gm.a.weight) == ("a.weight", "b.weight")
    assert not found.is_shared(gm.d)
    assert found.names(gm.c.weight) == ("c.weight", "d.weight")
    assert names(found.readers(gm.c.weight)) == ["c", "d"]
    assert names(found.readers(gm.c.bias)) == ["c", "c_bias"]
    assert names(found.users(gm.c)) == ["c", "c_bias"]
    assert found.is_tied(gm.c.weight)
    assert not found.is_tied(gm.c.bias)
    assert found.shared_modules() == (gm.a, gm.c)
    assert found.tied() == (("a.weight", "b.weight"), ("a.bias", "b.bias"), ("c.weight", "d.weight"))
    assert not any(found.is_private(gm.get_submodule(path)) for path in "abcd")


def test_what_is_used_once_is_private() -> None:
    gm, found = build(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), "a", "b")
    assert found.is_private(gm.a)
    assert found.is_private(gm.b)
    assert found.shared_modules() == found.tied() == ()


def test_a_parameter_read_beside_the_call_of_its_owner_is_not_private() -> None:
    gm, found = build(nn.ModuleDict({"a": nn.Linear(2, 2)}), "a", reads=("a.weight",))
    assert len(found.calls(gm.a)) == 1
    assert not found.is_private(gm.a)


def test_a_module_inside_a_called_one_is_used_by_that_call() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    gm, found = build(nn.ModuleDict({"block": block}), "block", "block.0")
    assert names(found.calls(gm.block[0])) == ["block_0"]
    assert names(found.users(gm.block[0])) == ["block", "block_0"]
    assert names(found.readers(gm.block[0].weight)) == ["block", "block_0"]
    assert names(found.users(gm.block[1])) == ["block"]
    assert found.is_shared(gm.block[0])
    assert not found.is_shared(gm.block[1])


def test_parameters_that_share_storage_are_tied() -> None:
    root = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(3, 2, bias=False)})
    root["b"].weight = nn.Parameter(root["a"].weight.detach().T)
    gm, found = build(root, "a", "b")
    assert found.names(gm.a.weight) == ("a.weight", "b.weight")
    assert names(found.readers(gm.b.weight)) == ["a", "b"]
    assert found.names(gm.a.weight.data) == ("a.weight", "b.weight")


def test_slices_of_one_storage_that_lie_apart_are_not_tied() -> None:
    root = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(2, 3, bias=False)})
    flat = torch.randn(6, 2)
    root["a"].weight, root["b"].weight = nn.Parameter(flat[:3]), nn.Parameter(flat[3:])
    gm, found = build(root, "a", "b")
    assert not found.is_tied(gm.a.weight)
    assert found.is_private(gm.b)


def test_meta_tensors_are_told_apart() -> None:
    with torch.device("meta"):
        root = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    gm, found = build(root, "a", "b")
    assert found.tied() == ()
    assert names(found.readers(gm.a.weight)) == ["a"]


def test_buffers_and_plain_attributes_count_as_tensors() -> None:
    root = nn.Module()
    root.register_buffer("table", torch.ones(2))
    root.view = root.table[1:]
    gm, found = build(root, reads=("table",))
    assert found.names(gm.table) == ("table",)
    gm.view = gm.table[1:]
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        gm.graph.create_node("get_attr", "view")
    assert aliasing(gm).names(gm.table) == ("table", "view")


def test_strangers_have_nothing() -> None:
    _, found = build(nn.ModuleDict({"a": nn.Linear(2, 2)}), "a")
    stranger = nn.Linear(2, 2)
    assert found.calls(stranger) == found.users(stranger) == found.paths(stranger) == ()
    assert found.names(stranger.weight) == found.readers(stranger.weight) == ()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_tied_head_of_a_traced_model() -> None:
    gm = fx.symbolic_trace(Tied())
    found = aliasing(gm)
    assert names(found.readers(gm.head.weight)) == ["embed", "head"]
    assert not found.is_shared(gm.head)
    assert not found.is_private(gm.head)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2), min_size=3, max_size=3), st.lists(st.integers(0, 2), max_size=6))
def test_calls_are_counted_per_object(owner: list[int], order: list[int]) -> None:
    """Path i holds object owner[i]; the graph calls paths in the given order."""
    objects = [nn.Linear(2, 2) for _ in range(3)]
    root = nn.ModuleDict({f"m{path}": objects[index] for path, index in enumerate(owner)})
    gm, found = build(root, *(f"m{path}" for path in order))
    for path in set(order):
        module = gm.get_submodule(f"m{path}")
        same = [other for other in order if owner[other] == owner[path]]
        assert len(found.calls(module)) == len(same) == len(found.readers(module.weight))
        registered = [other for other in set(order) if owner[other] == owner[path]]
        assert found.is_private(module) == (len(same) == 1 and len(registered) == 1)
