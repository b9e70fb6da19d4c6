"""Channel groups: what pruning may remove, and everything that goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import fx

from fxcompress.analysis.aliasing import Aliasing, aliasing
from fxcompress.analysis.channels.atoms import FIXED, Ids, Mask
from fxcompress.analysis.channels.maps import Labelled, Product
from fxcompress.analysis.channels.running import LabelRunner
from fxcompress.errors import UsageError

__all__ = ["Binding", "ChannelGroups", "Frozen", "Group", "Member", "channel_groups"]

_ATTENTION = ("heads", "head_dim")


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
    """One dimension of one parameter or buffer, and what each of its indices lives and dies with.

    Attributes:
        names: every path of the tensor.
        tensor: the parameter or buffer.
        dim: the dimension.
        classes: for each index along it the class of its atom, of shape ``(size,)``.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor
    dim: int
    classes: Ids

    @property
    def label(self) -> str:
        """'layer.weight[:, i]'."""
        return f"{self.names[0]}[{'' if self.dim == 0 else ':, ' * self.dim}i]"


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A binding as a group sees it.

    Attributes:
        binding: the binding.
        units: for each index the number of the group's channel that it belongs to, or -1.
        produces: whether the layer makes these channels; else it reads them, or goes along.
    """

    binding: Binding
    units: Ids
    produces: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Channels that the same layers make and read. Each of them may go by itself, with all that belongs to it.

    Attributes:
        name: path of the first layer that makes them.
        node: the first node that makes any of them.
        classes: the class of each channel, in the order of the first layer; of shape ``(channels,)``.
        members: the parameters that lose a slice with each channel.
        exact: whether removing channels is the same as setting all that belongs to them to zero.
    """

    name: str
    node: fx.Node
    classes: Ids
    members: tuple[Member, ...]
    exact: bool

    @property
    def channels(self) -> int:
        """How many can go one by one."""
        return len(self.classes)

    @property
    def producers(self) -> tuple[str, ...]:
        """Paths of the layers that make these channels."""
        return tuple(dict.fromkeys(_owner(m.binding.names[0]) for m in self.members if m.produces))


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Channels of one layer, which ``node`` calls, that may not go, and why."""

    node: fx.Node
    module: str
    channels: int
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroups:
    """What :func:`channel_groups` found.

    Attributes:
        groups: everything that may go.
        frozen: everything that layers make and that may not.
        channels: how many channels all layers make.
        bindings: every dimension of every parameter and buffer that has atoms.
        found: the labels of each node's value, atoms being as they were numbered; :meth:`classes_of` translates.
        products: the contractions of each node.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    channels: int
    bindings: tuple[Binding, ...]
    found: Mapping[fx.Node, Any]
    products: Mapping[fx.Node, tuple[Product, ...]]
    _roots: Ids

    @property
    def classes(self) -> int:
        """One more than the largest number of a class."""
        return len(self._roots)

    def classes_of(self, ids: Ids) -> Ids:
        """The class of each atom."""
        return self._roots[ids]

    def sizes(self, x: Labelled, kept: Mask) -> tuple[int, ...]:
        """The shape of ``x`` when only classes with ``kept[class]`` stay."""
        shape = list(x.shape)
        for m in x.maps:
            for dim in m.dims:
                keep = self.along(m.ids, dim, kept)
                if len(keep) > 1:
                    shape[dim] = int(keep.sum())
        return tuple(shape)

    def along(self, ids: Ids, dim: int, kept: Mask) -> Mask:
        """Which indices along ``dim`` of a map stay."""
        other = tuple(d for d in range(ids.ndim) if d != dim)
        return np.asarray(kept[self._roots[ids]].any(axis=other))

    def __str__(self) -> str:
        rows = [
            [g.name, g.channels, _list(g.producers), _list(_readers(g)), "yes" if g.exact else "no"]
            for g in self.groups
        ]
        table = tabulate(rows, headers=["group", "channels", "made by", "goes with", "exact"])
        if not self.frozen:
            return table
        frozen = tabulate(
            [[f.module, f.channels, f.reason] for f in self.frozen], headers=["frozen", "channels", "why"]
        )
        return f"{table}\n\n{frozen}"


def _readers(group: Group) -> list[str]:
    return [m.binding.label for m in group.members if not m.produces]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def _owner(name: str) -> str:
    return name.rpartition(".")[0] or name


def channel_groups(
    gm: fx.GraphModule,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    attention: str = "heads",
) -> ChannelGroups:
    """Find which channels of ``gm`` hang together, by running it on labels.

    Every index of every dimension of a parameter is an atom; one run of the graph unites the atoms that can only go
    together. What moves elements about runs on numbered positions, so that PyTorch itself says where they go; what is
    not known freezes what it touches.

    Args:
        gm: the graph; it stays as it is.
        example_inputs: positional arguments, a tuple (or one tensor).
        example_kwargs: keyword arguments.
        attention: ``"heads"`` if whole heads are to go, ``"head_dim"`` if the same part of every head.

    Raises:
        UsageError: the inputs do not fit, or ``attention`` is neither.
    """
    if attention not in _ATTENTION:
        raise UsageError(f"attention must be one of {', '.join(_ATTENTION)}, got {attention!r}")
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs or ())
    return _Builder(gm, _run(gm, args, example_kwargs or {}, attention == "heads")).build()


def _run(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], heads: bool) -> LabelRunner:
    """A run on labels that is over; without values if it can be done without."""
    runner = LabelRunner(gm, heads, values=False)
    try:
        runner.observe(args, kwargs)
    except Exception:  # an operator without a rule for shapes, an index that is computed, code that wants values, ...
        runner = LabelRunner(gm, heads, values=True)  # ... and what fails with values too is raised here
        runner.observe(args, kwargs)
    runner.labels.settle()
    return runner


class _Builder:
    """From a run on labels to groups."""

    def __init__(self, gm: fx.GraphModule, runner: LabelRunner) -> None:
        self.gm, self.runner, self.atoms = gm, runner, runner.labels.atoms
        self.aliasing: Aliasing = aliasing(gm)

    def build(self) -> ChannelGroups:
        ids = [
            (bound.tensor, next(iter(m.dims)), m.ids.reshape(-1))
            for bound in self.runner.bound.values()
            for m in bound.labelled.maps
        ]
        self._freeze_whole_dimensions(ids)
        roots, reasons, exact = self.atoms.summary()
        bindings = tuple(
            Binding(names, tensor, dim, roots[v]) for tensor, dim, v in ids if (names := self.aliasing.names(tensor))
        )
        made = self._made(roots)
        groups = tuple(self._groups(bindings, made, reasons, exact))
        return ChannelGroups(
            groups=groups,
            frozen=tuple(self._frozen(reasons)),
            channels=sum(len(v) for vectors in self.runner.produced.values() for v in vectors),
            bindings=bindings,
            found=self.runner.found,
            products=self.runner.products,
            _roots=roots,
        )

    def _freeze_whole_dimensions(self, ids: Sequence[tuple[torch.Tensor, int, Ids]]) -> None:
        for tensor, dim, v in ids:
            roots = self.atoms.find(v)
            if (roots == roots[0]).all():
                names = self.aliasing.names(tensor)
                self.atoms.freeze(v[:1], f"all of dimension {dim} of {names[0] if names else 'a tensor'} goes together")

    def _made(self, roots: Ids) -> Mask:
        """Of each class, whether it has a channel that a layer makes; which node is the first is kept."""
        self._nodes, self._makers = list(self.runner.produced), np.full(len(roots), -1)
        for i in reversed(range(len(self._nodes))):
            for v in self.runner.produced[self._nodes[i]]:
                self._makers[roots[v]] = i
        made = self._makers >= 0
        made[FIXED] = False
        return made

    def _groups(self, bindings: Sequence[Binding], made: Mask, reasons: Ids, exact: Mask) -> Iterator[Group]:
        free = made & (reasons < 0)
        # The signature of a class is the set of bindings that it is in: a sum of random numbers, one a binding.
        numbers = np.random.default_rng(0).integers(1, 2**62, size=len(bindings), dtype=np.int64)
        signature = np.zeros(len(made), dtype=np.int64)
        places: dict[int, list[int]] = {}
        with np.errstate(over="ignore"):
            for i, binding in enumerate(bindings):
                signature[np.unique(binding.classes)] += numbers[i]
        candidates = np.flatnonzero(free & (signature != 0))
        order = candidates[np.argsort(signature[candidates], kind="stable")]
        found, starts = np.unique(signature[order], return_index=True)
        alike = dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else {}
        for i, binding in enumerate(bindings):
            for s in np.unique(signature[binding.classes[free[binding.classes]]]):
                places.setdefault(int(s), []).append(i)
        produced = self._producing(bindings)
        number = np.full(len(made), -1)  # of each class the number it has in the group at hand
        for s, classes in sorted(alike.items(), key=lambda item: places[item[0]][0]):
            members = [bindings[i] for i in places[s]]
            yield self._group(classes, members, produced, bool(exact[classes].all()), number)
            number[classes] = -1

    def _group(
        self, classes: Ids, bindings: Sequence[Binding], produced: set[tuple[int, int]], exact: bool, number: Ids
    ) -> Group:
        lead = next((b for b in bindings if (id(b.tensor), b.dim) in produced), bindings[0])
        number[classes] = 0
        inside = lead.classes[number[lead.classes] == 0]
        _, index = np.unique(inside, return_index=True)
        ordered = inside[np.sort(index)]
        number[ordered] = np.arange(len(ordered))
        members = tuple(Member(b, number[b.classes], (id(b.tensor), b.dim) in produced) for b in bindings)
        makers = self._makers[ordered]
        node = self._nodes[int(makers[makers >= 0].min())]
        return Group(_owner(lead.names[0]), node, ordered, members, exact)

    def _producing(self, bindings: Sequence[Binding]) -> set[tuple[int, int]]:
        """The tensors (by identity) and dimensions along which the channels lie that a layer makes: those whose own
        atoms they are or, where a layer has made atoms for them, those of its tensors that have the same classes."""
        keys: list[tuple[int, int]] = []
        owner = np.full(len(self.atoms), -1)  # of each atom, which of the keys
        for bound in self.runner.bound.values():
            for m in bound.labelled.maps:
                owner[m.ids.ravel()] = len(keys)
                keys.append((id(bound.tensor), next(iter(m.dims))))
        known = {(id(b.tensor), b.dim): b for b in bindings}
        found: set[tuple[int, int]] = set()
        for node, vectors in self.runner.produced.items():
            for v in vectors:
                made = v[v != FIXED]
                owners = {keys[i] for i in np.unique(owner[made]).tolist() if i >= 0}
                if not owners and len(made) and node.op == "call_module":
                    classes = set(self.atoms.find(made).tolist())
                    inside = {id(p) for p in self.gm.get_submodule(str(node.target)).parameters()}
                    owners = {k for k, b in known.items() if k[0] in inside and b.tensor.dim() > 1}
                    owners = {k for k in owners if set(known[k].classes.tolist()) == classes}
                found |= owners
        return found & set(known)

    def _frozen(self, reasons: Ids) -> Iterator[Frozen]:
        for node, vectors in self.runner.produced.items():
            for v in vectors:
                why = np.where(v == FIXED, -2, reasons[v])
                for reason in np.unique(why[why != -1]):
                    text = "made without a parameter" if reason == -2 else self.atoms.reasons[reason]
                    name = str(node.target) if node.op == "call_module" else node.name
                    yield Frozen(node, name, int((why == reason).sum()), text)
