"""Labels are the same whether the values beside them are worked out or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxcompress.analysis.channels import Labelled, channel_groups
from fxcompress.analysis.channels.running import LabelRunner
from fxcompress.analysis.channels.skeleton import NeedsValues
from tests.analysis.channel_cases import CASES, Net
from tests.analysis.test_channels import doubled, graph_of

WANTS_VALUES = {"a leaf that is not elementwise"}


def run_of(gm: fx.GraphModule, inputs: tuple[Any, ...], values: bool) -> LabelRunner:
    runner = LabelRunner(gm, heads=True, values=values)
    runner.observe(inputs)
    runner.labels.settle()
    return runner


def told(runner: LabelRunner) -> list[str]:
    """All labels of a run, atoms as their representatives, in words."""
    roots, reasons, exact = runner.labels.atoms.summary()

    def word(x: Any) -> Any:
        if not isinstance(x, Labelled):
            return None
        maps = [(sorted(m.dims), roots[m.ids].tolist(), reasons[m.ids].tolist(), exact[m.ids].tolist()) for m in x.maps]
        return x.shape, sorted(maps), x.zero

    values = ((n, v if isinstance(v, (tuple, list)) else [v]) for n, v in runner.found.items())
    return [f"{n}: {[word(x) for x in v]}" for n, v in values]


@pytest.mark.parametrize("name", sorted(set(CASES) - WANTS_VALUES))
def test_labels_do_not_depend_on_values(name: str) -> None:
    case = CASES[name]
    graph, inputs = graph_of(case.make(), case.inputs), doubled(case.inputs)
    without = run_of(graph, inputs, values=False)
    assert told(without) == told(run_of(graph, inputs, values=True))


class Remembering(nn.Module):
    """A leaf of unknown code that keeps what it is given, and mixes its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:  # so that it is recorded as one call
            self.seen.append(x)
        return x.flip(0)


def remembering() -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    layers = {"a": nn.Linear(3, 5), "keep": Remembering(), "out": nn.Linear(5, 2)}
    inputs = (torch.randn(2, 3),)
    return graph_of(Net(lambda m, x: m.out(m.keep(m.a(x))), **layers), inputs), doubled(inputs)


def test_code_that_is_not_known_is_never_given_what_has_no_values() -> None:
    graph, inputs = remembering()
    with pytest.raises(NeedsValues, match="keep"):
        run_of(graph, inputs, values=False)
    channel_groups(graph, inputs)
    assert not any(x.is_meta for m in graph.modules() if isinstance(m, Remembering) for x in m.seen)


def test_a_tensor_with_values_that_is_written_to_wants_values() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        table = torch.zeros(x.shape[0], 5, dtype=x.dtype)
        table[:, :] = m.a(x)
        return m.out(table)  # type: ignore[no-any-return]

    inputs = (torch.randn(2, 3),)
    graph = graph_of(Net(forward, a=nn.Linear(3, 5), out=nn.Linear(5, 2)), inputs)
    with pytest.raises(NeedsValues, match="writes"):
        run_of(graph, doubled(inputs), values=False)
    assert channel_groups(graph, doubled(inputs)).channels == 7


def test_the_graph_is_left_as_it_was() -> None:
    layers = {"a": nn.Conv1d(3, 5, 1), "b": nn.BatchNorm1d(5), "out": nn.Linear(5, 2)}
    inputs = (torch.randn(2, 3, 4),)
    graph = graph_of(Net(lambda m, x: m.out(m.b(m.a(x)).relu().sum(2)), **layers), inputs)
    before = {k: (id(v), v.clone()) for k, v in graph.state_dict(keep_vars=True).items()}
    channel_groups(graph, doubled(inputs))
    after = graph.state_dict(keep_vars=True)
    assert {k: id(v) for k, v in after.items()} == {k: i for k, (i, _) in before.items()}
    assert all(torch.equal(v, before[k][1]) and v.device.type == "cpu" for k, v in after.items())
