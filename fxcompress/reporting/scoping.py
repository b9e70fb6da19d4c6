"""Which module of the original model each node of a graph is in, as far as the graph still shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from fxcompress.scopes import ends_in

__all__ = ["common", "owner_of", "parents", "scopes_of"]


def owner_of(attribute: str) -> str:
    """The path of the module that has ``attribute``; the attribute itself if that is the whole model."""
    return attribute.rpartition(".")[0] or attribute


def parents(path: str) -> Iterator[str]:
    """``"a.b.c"`` -> ``"a"``, ``"a.b"``."""
    parts = path.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))


def common(a: str, b: str) -> str:
    """The longest path that both are in or at."""
    shared = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared)


def scopes_of(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """The path of the module that each node is in; empty for the model itself.

    A call of a module and the reading of a parameter say it. What else lies between the first such node of a module
    and the node that gives what the module gave is in that module; the rest is where its neighbours both are.
    """
    nodes: list[fx.Node] = list(gm.graph.nodes)
    paths = [_path(node) for node in nodes]
    inner = _between_ends(gm, nodes, paths)
    known = [path.rpartition(".")[0] if path else inner[i] for i, path in enumerate(paths)]
    return {node: scope or "" for node, scope in zip(nodes, _with_neighbours(nodes, known), strict=True)}


def _path(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    return owner_of(str(node.target)) if node.op == "get_attr" else ""


def _between_ends(gm: fx.GraphModule, nodes: Sequence[fx.Node], paths: Sequence[str]) -> list[str | None]:
    """For each node the deepest module between whose first node and whose end it lies, where nothing else does."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    count: dict[str, int] = {}
    seen = [0]
    for i, path in enumerate(paths):
        seen.append(seen[-1] + bool(path))
        for parent in parents(path) if path else ():
            first.setdefault(parent, i)
            last[parent] = i
            count[parent] = count.get(parent, 0) + 1
    place = {node: i for i, node in enumerate(nodes)}
    found: list[str | None] = [None] * len(nodes)
    ends = sorted(ends_in(gm).items(), key=lambda pair: pair[0].count("."))
    for path, end in ends:
        if path and path in first and last[path] <= place[end]:
            span = range(first[path], place[end] + 1)
            if seen[span.stop] - seen[span.start] == count[path]:
                for i in span:
                    found[i] = path
    return found


def _with_neighbours(nodes: Sequence[fx.Node], known: Sequence[str | None]) -> list[str | None]:
    filled = list(known)
    following: list[str | None] = [None] * len(nodes)
    later: str | None = None
    for i in range(len(nodes) - 1, -1, -1):
        later = known[i] if known[i] is not None else later
        following[i] = later
    earlier: str | None = None
    for i, node in enumerate(nodes):
        if known[i] is not None:
            earlier = known[i]
        elif node.op not in ("placeholder", "output") and earlier is not None and following[i] is not None:
            filled[i] = common(earlier, following[i] or "")
    return filled
