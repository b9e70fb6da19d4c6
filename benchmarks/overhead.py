"""What the pipeline itself costs on large graphs, and that it is linear in the number of nodes.

Networks of blocks (linear, relu, identity, linear, and an addition around them) with tiny layers, so that the time is
the engine's. ``compile`` removes the identities without verification, ``plan`` only says what it would do; both get a
graph that was traced before. The goal is a graph of 10,000 nodes in under 30 seconds.

Run ``python benchmarks/overhead.py [--nodes 1000,3000,10000] [--repeats 3] [--clock cpu]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import clock
import publish
import torch
from torch import nn

import fxcompress
from fxcompress.passes.remove_identity import RemoveIdentity

_WIDTH, _NODES_A_BLOCK = 8, 5
_DEFAULT = "1000,3000,10000"


class Chain(nn.Module):
    """Residual blocks; every fourth also reads what the block before it read, so that the graph is no mere chain."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        layers = [nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Identity(), nn.Linear(_WIDTH, _WIDTH)]
        self.blocks = nn.ModuleList(nn.Sequential(*[_like(m) for m in layers]) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape ``(batch, 8)``, as the input."""
        earlier = x
        for i, block in enumerate(self.blocks):
            x, earlier = block(x) + (earlier if i % 4 == 3 else x), x
        return x


def _like(layer: nn.Module) -> nn.Module:
    return nn.Linear(_WIDTH, _WIDTH) if isinstance(layer, nn.Linear) else type(layer)()


def measure(nodes: int, repeats: int) -> dict[str, Any]:
    """Medians of seconds for a graph of about ``nodes`` nodes."""
    torch.manual_seed(0)
    model, x = Chain(nodes // _NODES_A_BLOCK).eval(), torch.randn(2, _WIDTH)
    graph = fxcompress.trace(model, x)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: graph(x),
        "trace": lambda: fxcompress.trace(model, x),
        "compile": lambda: fxcompress.compile(graph, [RemoveIdentity()], x, verify=False),
        "plan": lambda: fxcompress.plan(graph, [RemoveIdentity()], x),
    }
    seconds = {name: clock.medians([clock.seconds(call) for _ in range(repeats)]) for name, call in calls.items()}
    after = fxcompress.compile(graph, [RemoveIdentity()], x, verify=False)
    removed = len(graph.graph.nodes) - len(after.graph.nodes)
    if removed != len(model.blocks):
        raise RuntimeError(f"{removed} nodes were removed of {len(model.blocks)} identities")
    return {"nodes": len(graph.graph.nodes), "sites": removed, "seconds": seconds}


def table(records: list[dict[str, Any]], by: str) -> str:
    """A row for each size, in seconds by one of the clocks."""
    headers = ["nodes", "sites", "forward s", "trace s", "trace us a node"]
    headers += ["compile s", "compile us a node", "plan s", "plan us a node"]
    return publish.markdown([_row(r, by) for r in records], headers) + f"\n\nSeconds by the {by} clock."


def _row(record: dict[str, Any], by: str) -> list[str]:
    row = [str(record["nodes"]), str(record["sites"]), f"{record['seconds']['forward'][by]:.2f}"]
    for name in ("trace", "compile", "plan"):
        seconds = record["seconds"][name][by]
        row += [f"{seconds:.2f}", f"{1e6 * seconds / record['nodes']:.0f}"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", default=_DEFAULT, help="the results of other sizes are only printed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=clock.CLOCKS, default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for nodes in arguments.nodes.split(","):
        records.append(measure(int(nodes), arguments.repeats))
        print(records[-1], flush=True)
    publish.publish("overhead", table(records, arguments.clock), records, write=arguments.nodes == _DEFAULT)


if __name__ == "__main__":
    main()
