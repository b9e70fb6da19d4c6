"""Which channels a graph can do without: nothing reads them, they are zero, or they are constants that a bias takes in.

A set R of classes can go if every place where channels are used up still gives what it gave. Where a layer mixes
channels, what the channels in R give to those that stay must be zero, or a constant that its bias can take in; where
activations are multiplied or summed up, the channels in R must be zero. Elsewhere channels keep to themselves. R is the
largest such set: it starts with everything that may go, and what does not fit is taken out until the rest fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.analysis.aliasing import Aliasing
from fxcompress.analysis.channels import ChannelGroups, Labelled
from fxcompress.analysis.channels.arithmetic import REDUCTIONS, RULES, is_pointwise
from fxcompress.analysis.channels.movement import RULES as MOVEMENT
from fxcompress.passes.pruning.known import Known, KnownCall
from fxcompress.passes.pruning.mixing import MIXES, Mix
from fxcompress.passes.pruning.readers import Ids, Mask, Reader, alike, obstacle_to_bias
from fxcompress.passes.pruning.sizes import first_input
from fxcompress.passes.pruning.used_sizes import sizes_as_numbers

__all__ = ["Fold", "Needless", "find_needless"]

_KEEPS_APART = (frozenset(RULES) | frozenset(MOVEMENT) | {"embedding", "setitem"}) - REDUCTIONS
"""Functions in which channels keep to themselves, or whose channels are not exact anyway."""
_ASKS = frozenset("size dim numel shape ndim ndimension device dtype check_input stride".split())
"""Questions about the sizes or the kind of a tensor; for sizes see :func:`sizes_as_numbers`."""
_PLACED = frozenset(("tril", "triu"))


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """What the bias of a layer takes in.

    Attributes:
        channels: how many constants.
        shift: by how much each output grows; of those too that go.
    """

    channels: int
    shift: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Needless:
    """What can go.

    Attributes:
        removed: of each class, whether it goes.
        zero: whether it goes and something counts on its being zero.
        constant: whether it goes and a bias takes it in.
        folds: what is to be added to biases.
        refusals: calls that stand in the way of constants, and why.
    """

    removed: Mask
    zero: Mask
    constant: Mask
    folds: Mapping[nn.Module, Fold]
    refusals: Mapping[fx.Node, str]


def find_needless(
    gm: fx.GraphModule, groups: ChannelGroups, calls: Mapping[fx.Node, KnownCall], aliasing: Aliasing
) -> Needless:
    """What ``gm`` can do without.

    Args:
        gm: the graph.
        groups: its channels.
        calls: its calls, with what is sure of their arguments.
        aliasing: what is shared in it.
    """
    return _Search(gm, groups, calls, aliasing).run()


class _Search:
    def __init__(
        self, gm: fx.GraphModule, groups: ChannelGroups, calls: Mapping[fx.Node, KnownCall], aliasing: Aliasing
    ) -> None:
        self.gm, self.groups, self.calls, self.aliasing = gm, groups, calls, aliasing
        self.removed: Mask = np.zeros(groups.classes, dtype=np.bool_)
        self.zero: Mask = np.zeros(groups.classes, dtype=np.bool_)
        self.refusals: dict[fx.Node, str] = {}

    def run(self) -> Needless:
        for group in self.groups.groups:
            self.removed[group.classes] = group.exact
        for classes in sizes_as_numbers(self.gm, self.groups):
            self.removed[classes] = False
        readers = []
        for node, call in self.calls.items():
            if call.name in MIXES:
                readers.append(self._reader(node, call))
            elif any(x.maps for source in node.all_input_nodes for x in self._labelled(source)):
                self._keep_what_counts(node, call)
        readers = alike(readers)
        wanted = self.removed.copy()
        self._shrink(readers)
        while full := [g for g in self.groups.groups if self.removed[g.classes].all()]:
            self.removed[[g.classes[0] for g in full]] = False
            self._shrink(readers)
        return self._result(readers, wanted)

    def _shrink(self, readers: Sequence[Reader]) -> None:
        """Take out what does not fit until all the rest fits."""
        changed = True
        while changed:
            changed = False
            for reader in reversed(readers):
                missed = reader.misses(self.removed)
                self.removed[reader.entering[missed]] = False
                changed = changed or bool(missed.any())

    def _result(self, readers: Sequence[Reader], wanted: Mask) -> Needless:
        folds: dict[nn.Module, Fold] = {}
        constant = np.zeros_like(self.removed)
        for reader in readers:
            uses, takes = reader.uses(self.removed), reader.takes_in(self.removed)
            self.zero[reader.entering[uses & ~takes]] = True
            if takes.any():
                assert reader.mix is not None, "or there would be an obstacle"
                assert reader.module is not None, "or there would be an obstacle"
                constant[reader.entering[takes]] = True
                shift = reader.mix.constant_part(torch.where(torch.from_numpy(takes), reader.x.value, 0.0))
                folds[reader.module] = Fold(int(takes.sum()), shift)
            if reader.obstacle:
                self._refuse(reader, wanted)
        return Needless(self.removed, self.zero & self.removed, constant, folds, self.refusals)

    def _refuse(self, reader: Reader, wanted: Mask) -> None:
        trial = self.removed.copy()
        trial[reader.entering[reader.x.sure.numpy()]] = True
        stuck = np.unique(reader.entering[reader.takes_in(trial & wanted) & reader.x.sure.numpy()])
        if len(stuck):
            reason = f"{len(stuck)} of the channels that it reads are constant, but {reader.obstacle}"
            self.refusals[reader.node] = reason

    # ------------------------------------------------------------------------------------------------- labels
    def _labelled(self, node: fx.Node) -> list[Labelled]:
        leaves = pytree.tree_leaves(self.groups.found[node], is_leaf=lambda v: isinstance(v, Labelled))
        return [x for x in leaves if isinstance(x, Labelled)]

    def _along(self, x: Labelled, dim: int) -> Ids:
        """The class that each index along ``dim`` goes with; 0 where nothing goes."""
        m = x.about(dim) if x.shape else None
        if m is None:
            return np.zeros(x.shape[dim] if x.shape else 1, dtype=np.int64)
        roots = self.groups.classes_of(m.ids)
        rows = np.moveaxis(roots, dim, 0).reshape(roots.shape[dim], -1)
        assert len(rows) == x.shape[dim], "a map has the size of the tensor along its dimensions"
        if rows.shape[1] == 1:
            return rows[:, 0]
        if (rows == rows[:1]).all():  # it goes along another dimension
            return np.zeros(len(rows), dtype=np.int64)
        self._keep(rows[(rows != rows[:, :1]).any(1)])  # several at one index: none of them goes
        return rows[:, 0]

    def _keep(self, classes: Ids) -> None:
        self.removed[classes.ravel()] = False

    def _keep_all(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            for x in self._labelled(source):
                for m in x.maps:
                    self._keep(self.groups.classes_of(m.ids))

    # ------------------------------------------------------------------------------------------------- one call
    def _reader(self, node: fx.Node, call: KnownCall) -> Reader:
        x, weight = self.groups.found[first_input(node)], call.get(1, "weight")
        dim = len(x.shape) - len(weight.shape) + 1
        entering, leaving = self._along(x, dim), self._along(self.groups.found[node], dim)
        mix = Mix.of(call)
        obstacle = obstacle_to_bias(call, mix, self.aliasing)
        return Reader(node, call.module, entering, leaving, mix, call.first().along(dim), obstacle)

    def _keep_what_counts(self, node: fx.Node, call: KnownCall) -> None:
        """Keep what ``node`` counts on, whatever else goes."""
        name, outs = call.name, self._labelled(node)
        if name == "batch_norm" and _is_training(call):
            self.refusals[node] = "it is in training mode; call model.eval() first"
            self._keep_all(node)
        elif name in ("matmul", "mm", "bmm") and len(call.tensors()) == len(call.args) == 2:
            left, right = call.tensors()
            x, y = (self.groups.found[source] for source in node.args if isinstance(source, fx.Node))
            self._keep_products([(x, left, -1), (y, right, max(-2, -len(right.shape)))])
        elif name == "scaled_dot_product_attention":
            self._keep_attention(node, call)
        elif name in REDUCTIONS and len(call.tensors()) == 1:
            self._keep_unless_zero(node, call, call.reduced())
        elif name == "normalize":
            self._keep_unless_zero(node, call, call.dims(call.get(2, "dim", default=1)))
        elif not self._keeps_apart(node, name, outs):
            self._keep_all(node)

    def _keeps_apart(self, node: fx.Node, name: str, outs: Sequence[Labelled]) -> bool:
        """Whether channels keep to themselves in the call."""
        if name in _ASKS or name in _KEEPS_APART or (is_pointwise(name) and name not in _PLACED):
            return True
        ins = self._labelled(node.all_input_nodes[0])  # a module that acts element by element, as was found by trial
        return len(ins) == len(outs) == 1 and outs[0].maps is ins[0].maps

    def _keep_unless_zero(self, node: fx.Node, call: KnownCall, dims: Sequence[int]) -> None:
        """In a sum or a norm; what a mean goes over is not exact anyway."""
        for dim in dims:
            self._keep_products([(self.groups.found[first_input(node)], call.first(), dim)])

    def _keep_products(self, factors: Sequence[tuple[Labelled, Known, int]]) -> None:
        """Each of ``factors``, which are multiplied, is summed over a dimension: keep what is not zero in any."""
        zero = np.logical_or.reduce([known.along(dim % len(known.shape)).zero.numpy() for _, known, dim in factors])
        for x, _, dim in factors:
            classes = self._along(x, dim % len(x.shape))
            self._keep(classes[~zero])
            self.zero[classes[zero]] = True

    def _keep_attention(self, node: fx.Node, call: KnownCall) -> None:
        """Sums over what queries and keys have in common, and over the places of keys, values and the mask."""
        given = {name: call.get(i, name) for i, name in enumerate(("query", "key", "value", "attn_mask"))}
        sources = {name: node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(given)}
        labels = {k: self.groups.found[v] for k, v in sources.items() if isinstance(v, fx.Node)}
        self._keep_products([(labels[k], given[k], -1) for k in ("query", "key")])
        for name, dim in (("key", -2), ("value", -2), ("attn_mask", -1)):
            if name in labels:
                self._keep(self._along(labels[name], dim % len(labels[name].shape)))


def _is_training(call: KnownCall) -> bool:
    if call.module is not None:
        return call.module.training
    return bool(call.get(5, "training", default=False)) and isinstance(call.get(1, "running_mean"), Known)
