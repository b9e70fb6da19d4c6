"""Which node gives what a module of the original model gave, of modules that are no calls in the graph any more."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from fxcompress.storable import storable

__all__ = ["SCOPES", "end_of", "ends_in", "remember_ends"]

SCOPES = "_fxcompress_scopes"
"""A child without parameters that no node calls: ``torch.fx`` carries such children through copies and pickles."""


@storable
class _Scopes(nn.Module):
    """Name and target of the last node of each module, by path."""

    def __init__(self, ends: Mapping[str, tuple[str, str]]) -> None:
        super().__init__()
        self.ends = dict(ends)

    def extra_repr(self) -> str:
        """How many there are."""
        return f"{len(self.ends)} modules"


def remember_ends(gm: fx.GraphModule, ends: Mapping[str, fx.Node]) -> None:
    """Let ``gm`` know which nodes gave what modules gave, by their paths; nodes that are gone are left out."""
    there = set(gm.graph.nodes)
    known = {path: (node.name, str(node.target)) for path, node in ends.items() if node in there}
    if known:
        setattr(gm, SCOPES, _Scopes(known).train(gm.training))


def ends_in(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """All that :func:`end_of` knows of ``gm``: paths of modules and their last nodes that are still there."""
    scopes = getattr(gm, SCOPES, None)
    if not isinstance(scopes, _Scopes):
        return {}
    there = {(node.name, str(node.target)): node for node in gm.graph.nodes}
    return {path: there[end] for path, end in scopes.ends.items() if end in there}


def end_of(gm: fx.GraphModule, path: str) -> fx.Node | None:
    """The node that gives what the module at ``path`` gave when the model was recorded, if it is still there."""
    return ends_in(gm).get(path)
