"""Which channels a graph can do without: nothing reads them, they are zero, or they are constants that a bias takes in.

A set R of classes can go if every place where channels are used up still gives what it gave. Where a layer mixes
channels, what the channels in R give to those that stay must be zero, or a constant that its bias can take in; where
activations are multiplied or summed, the channels in R must be zero. Elsewhere channels keep to themselves. R is the
largest such set: it starts with everything that may go, and what does not fit is taken out until all the rest fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fxcompress.analysis.aliasing import Aliasing
from fxcompress.analysis.channels import ChannelGroups, Labelled
from fxcompress.analysis.channels.arithmetic import REDUCTIONS, RULES, is_pointwise
from fxcompress.analysis.channels.movement import RULES as MOVEMENT
from fxcompress.passes.pruning.known import Along, Known, KnownCall
from fxcompress.passes.pruning.known_running import KnownRunner
from fxcompress.passes.pruning.mixing import MIXES, Mix
from fxcompress.passes.pruning.used_sizes import sizes_as_numbers

__all__ = ["Fold", "Needless", "find_needless"]

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_PRODUCTS = frozenset("matmul mm bmm mv dot rmatmul".split())
_KEEPS = (frozenset(RULES) | frozenset(MOVEMENT) | {"embedding", "setitem"}) - REDUCTIONS
_PLACED = frozenset(("tril", "triu"))
_ASKS = frozenset("size dim numel shape ndim ndimension device dtype check_input stride".split())


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """What the bias of a layer takes in.

    Attributes:
        channels: how many constants.
        shift: by how much each output grows, of those too that go.
    """

    channels: int
    shift: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Needless:
    """What can go.

    Attributes:
        removed: of each class, whether it goes.
        folds: what is to be added to biases.
        zero: of each class, whether something counts on its being zero.
        constant: of each class, whether a bias takes it in.
        refusals: layers that would have been rid of channels, and why they are not.
    """

    removed: Mask
    folds: Mapping[nn.Module, Fold]
    zero: Mask
    constant: Mask
    refusals: Mapping[fx.Node, str]


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """A call of a layer that mixes channels.

    Attributes:
        node, call: the call.
        entering, leaving: the classes of the channels that come in and go out.
        mix: the layer; ``None`` if its parameters are no constants.
        x: what is sure of what comes in, at every call of the layer alike.
        obstacle: why its bias can take nothing in; empty if it can.
    """

    node: fx.Node
    call: KnownCall
    entering: Ids
    leaving: Ids
    mix: Mix | None
    x: Along
    obstacle: str

    def needed(self, removed: Mask) -> Mask:
        """Which of the channels that come in and are to go are of use to those that stay, by weights that are not 0."""
        going = removed[self.entering]
        if self.mix is None:
            return going
        groups, outputs, inputs = self.mix.weight.shape[:3]
        stays = torch.from_numpy(~removed[self.leaving]).reshape(groups, outputs, 1)
        used = torch.zeros(groups, inputs, dtype=torch.bool)
        columns = torch.from_numpy(going).reshape(groups, inputs).any(0).nonzero().flatten()
        used[:, columns] = ((self.mix.weight[:, :, columns] != 0).any(-1) & stays).any(1)
        return going & used.flatten().numpy()

    def misses(self, removed: Mask) -> Mask:
        """Those that it could not do without."""
        harmless = self.x.zero if self.obstacle else self.x.zero | self.x.sure
        return self.needed(removed) & ~harmless.numpy()


def find_needless(gm: fx.GraphModule, groups: ChannelGroups, runner: KnownRunner, aliasing: Aliasing) -> Needless:
    """What ``gm`` can do without.

    Args:
        gm: the graph.
        groups: its channels.
        runner: what is sure of its values.
        aliasing: what is shared in it.
    """
    return _Search(gm, groups, runner, aliasing).run()


class _Search:
    def __init__(self, gm: fx.GraphModule, groups: ChannelGroups, runner: KnownRunner, aliasing: Aliasing) -> None:
        self.gm, self.groups, self.aliasing = gm, groups, aliasing
        self.calls: Mapping[fx.Node, KnownCall] = runner.calls
        self.removed = np.zeros(groups.classes, dtype=np.bool_)
        self.zero = np.zeros(groups.classes, dtype=np.bool_)
        self.refusals: dict[fx.Node, str] = {}

    def run(self) -> Needless:
        for group in self.groups.groups:
            self.removed[group.classes] = group.exact
        for classes in sizes_as_numbers(self.gm, self.groups):
            self.removed[classes] = False
        for node, call in self.calls.items():
            self._keep_fixed(node, call)
        readers = self._readers()
        before = self.removed.copy()
        self._shrink(readers)
        while full := [g for g in self.groups.groups if self.removed[g.classes].all()]:
            self.removed[[g.classes[0] for g in full]] = False
            self._shrink(readers)
        return self._result(readers, before)

    def _shrink(self, readers: Sequence[_Reader]) -> None:
        changed = True
        while changed:
            changed = False
            for reader in reversed(readers):
                missed = reader.entering[reader.misses(self.removed)]
                if len(missed):
                    self.removed[missed] = False
                    changed = True

    def _result(self, readers: Sequence[_Reader], before: Mask) -> Needless:
        folds: dict[nn.Module, Fold] = {}
        constant = np.zeros_like(self.removed)
        for reader in readers:
            needed = reader.needed(self.removed)
            self.zero[reader.entering[needed & reader.x.zero.numpy()]] = True
            taken = needed & ~reader.x.zero.numpy()
            if taken.any():
                assert reader.mix is not None, "without weights nothing can be taken in"
                assert reader.call.module is not None, "only modules take something in"
                constant[reader.entering[taken]] = True
                shift = reader.mix.constant_part(torch.where(torch.from_numpy(taken), reader.x.value, 0.0))
                folds[reader.call.module] = Fold(int(taken.sum()), shift)
            self._refuse(reader, before)
        return Needless(self.removed, folds, self.zero & self.removed, constant, self.refusals)

    def _refuse(self, reader: _Reader, before: Mask) -> None:
        if not reader.obstacle:
            return
        stuck = reader.needed(before & ~self.removed | self.removed) & (reader.x.sure & ~reader.x.zero).numpy()
        count = len(np.unique(reader.entering[stuck & ~self.removed[reader.entering]]))
        if count:
            self.refusals[reader.node] = f"{count} of the channels it reads are constants, but {reader.obstacle}"

    # ------------------------------------------------------------------------------------------------- one call
    def _classes(self, value: Any, dim: int) -> Ids:
        """The class of each index along ``dim``."""
        x: Labelled = value
        m = x.about(dim % len(x.shape)) if isinstance(x, Labelled) else None
        if m is None:
            return np.zeros(x.shape[dim] if isinstance(x, Labelled) else 1, dtype=np.int64)
        roots = np.moveaxis(self.groups.classes_of(m.ids), dim % len(x.shape), 0)
        rows = roots.reshape(len(roots), -1)
        for index in np.flatnonzero((rows != rows[:, :1]).any(1)):  # several things at one place: none of them goes
            self.removed[rows[index]] = False
        return rows[:, 0]

    def _all_classes(self, value: Any) -> Iterator[Ids]:
        for x in _labelled(value):
            for m in x.maps:
                yield self.groups.classes_of(m.ids).ravel()

    def _keep(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            for classes in self._all_classes(self.groups.found[source]):
                self.removed[classes] = False

    def _keep_fixed(self, node: fx.Node, call: KnownCall) -> None:
        """Keep what ``node`` counts on, whatever else goes."""
        name, found = call.name, self.groups.found
        labelled = [x for source in node.all_input_nodes for x in _labelled(found[source])]
        if name in MIXES or not any(x.maps for x in labelled) or (name in _ASKS and not _labelled(found[node])):
            return
        if name == "batch_norm" and _is_training(call):
            self.refusals[node] = "it is in training mode; call model.eval() first"
            self._keep(node)
        elif name in _PRODUCTS and name in ("matmul", "mm", "bmm") and len(node.args) == 2:
            self._keep_product(node, call)
        elif name == "scaled_dot_product_attention":
            self._keep_attention(node, call)
        elif name in REDUCTIONS and not (name in ("max", "min") and len(labelled) > 1):
            for d in call.reduced():
                self._keep_unless_zero(labelled[0], call.first(), d, only=name in ("sum", "nansum"))
        elif not self._keeps_apart(node, name):
            self._keep(node)

    def _keeps_apart(self, node: fx.Node, name: str) -> bool:
        """Whether channels keep to themselves in the call."""
        if name in _KEEPS or (is_pointwise(name) and name not in _PLACED):
            return True
        found = self.groups.found
        ins, outs = _labelled(found[node.all_input_nodes[0]]), _labelled(found[node])
        return len(ins) == len(outs) == 1 and outs[0].maps is ins[0].maps

    def _keep_unless_zero(self, x: Labelled, known: Known, dim: int, only: bool = True) -> None:
        """Keep classes along ``dim`` that may be other than zero; all, if not ``only`` those."""
        m = x.about(dim % len(x.shape)) if x.shape else None
        if m is None:
            return
        classes = self.groups.classes_of(m.ids)
        if not only:
            self.removed[classes.ravel()] = False
            return
        along = self._classes(x, dim)
        zero = known.along(dim % len(x.shape)).zero.numpy()
        self.removed[along[~zero]] = False
        self.zero[along[zero]] = True

    def _keep_product(self, node: fx.Node, call: KnownCall) -> None:
        pairs = []
        for source, known, dim in zip(node.args, call.args, (-1, -2), strict=True):
            if not isinstance(source, fx.Node) or not isinstance(known, Known):
                return self._keep(node)
            pairs.append((self.groups.found[source], known, dim if len(known.shape) > 1 else -1))
        zero = np.logical_or(*(known.along(dim % len(known.shape)).zero.numpy() for _, known, dim in pairs))
        for x, _, dim in pairs:
            classes = self._classes(x, dim)
            self.removed[classes[~zero]] = False
            self.zero[classes[zero]] = True
        return None

    def _keep_attention(self, node: fx.Node, call: KnownCall) -> None:
        """Along what queries and keys have in common, and along places, nothing is lost unless both are kept."""
        given = {"query": 0, "key": 1, "value": 2, "attn_mask": 3}
        dims = {"query": (-1,), "key": (-1, -2), "value": (-2,), "attn_mask": (-1,)}
        for name, position in given.items():
            source = node.args[position] if position < len(node.args) else node.kwargs.get(name)
            if not isinstance(source, fx.Node):
                continue
            x = self.groups.found[source]
            for dim in dims[name]:
                if len(x.shape) >= -dim:
                    m = x.about(dim % len(x.shape))
                    if m is not None:
                        self._keep_unzero_attention(name, dim, x, call)

    def _keep_unzero_attention(self, name: str, dim: int, x: Labelled, call: KnownCall) -> None:
        query, key = call.get(0, "query"), call.get(1, "key")
        if dim == -1 and name in ("query", "key"):
            zero = query.along(len(query.shape) - 1).zero | key.along(len(key.shape) - 1).zero
            classes = self._classes(x, -1)
            self.removed[classes[~zero.numpy()]] = False
            self.zero[classes[zero.numpy()]] = True
        else:
            self._keep_unless_zero(x, Known.nothing(x.shape), dim, only=False)
