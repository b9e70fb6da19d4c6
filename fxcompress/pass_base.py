"""The contract between a compression technique and the engine.

A technique is a frozen dataclass that derives from :class:`Pass`. Its fields are its options. It never loops over
passes, never copies models and never measures: it says where it would act (:meth:`Pass.sites`) and acts on one such
place (:meth:`Pass.rewrite`). Everything else (copies, calibration, verification, records) is the engine's.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import fx

from fxcompress.analysis.aliasing import Aliasing, aliasing
from fxcompress.analysis.shapes import Shapes, shapes
from fxcompress.errors import PreconditionError
from fxcompress.report import PassRecord

__all__ = [
    "Example",
    "Guarantee",
    "Knob",
    "Need",
    "Observation",
    "Observer",
    "Pass",
    "PassContext",
    "Refusal",
    "Site",
    "Stage",
]


class Guarantee(enum.Enum):
    """What a pass promises about the outputs; the pipeline checks each in its own way (see ``verify.py``)."""

    EXACT = "exact"
    """Equal over the real numbers; proved by running the pass again on a float64 copy."""

    APPROXIMATE = "approximate"
    """Close to the original; the error is measured on the data given, and held against the pass's own bound."""

    RETRAIN = "retrain"
    """Meant to be trained afterwards; shapes, finiteness and gradient flow are checked, the error is reported."""


class Need(enum.Enum):
    """What a pass cannot work without; the pipeline refuses before anything runs."""

    EXAMPLE_INPUTS = "example_inputs"
    CALIBRATION = "calibration"


class Stage(enum.IntEnum):
    """Where a pass usually stands among others. :func:`fxcompress.recommended_order` goes by it; nothing is refused."""

    CLEAN = enum.auto()
    """Takes away what does nothing."""

    FOLD = enum.auto()
    """Merges layers."""

    PRUNE = enum.auto()
    """Removes channels."""

    FACTORISE = enum.auto()
    """Replaces layers by smaller ones."""

    ADAPT = enum.auto()
    """Measures statistics anew."""

    SCALE = enum.auto()
    """Prepares weights for rounding."""

    ROUND = enum.auto()
    """Fewer bits."""

    LOWER = enum.auto()
    """Kernels of one kind of machine."""


@dataclasses.dataclass(frozen=True)
class Example:
    """Inputs the graph can be run on: ``gm(*args, **kwargs)``."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Observer(Protocol):
    """Streams over the values that one node takes on calibration data.

    One that also has ``merge(other)``, which takes in what another one of its kind saw, lets several processes share
    the data; its order must not matter then.
    """

    def update(self, value: Any) -> None: ...

    def result(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Observation:
    """A wish: a fresh observer from ``factory`` is to see every value of ``node``; ask for the result by ``key``."""

    node: fx.Node
    key: str
    factory: Callable[[], Observer]


@dataclasses.dataclass(frozen=True)
class Site:
    """A place to rewrite: ``data`` is for :meth:`Pass.rewrite`, ``detail`` (plain values) goes into the report."""

    node: fx.Node
    data: Any = None
    detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A place that looks like a site and is not, and why."""

    node: fx.Node
    reason: str


@dataclasses.dataclass(frozen=True)
class Knob:
    """A layer of which a pass may do more or less, for :func:`fxcompress.search` to choose how much.

    Attributes:
        layer: its path; what :meth:`Pass.turned` knows it by.
        option: what is set: ``"ratio"``, ``"bits"``.
        settings: the settings to try, numbers, the one that changes least first. To leave the layer alone is always
            possible and is none of them.
    """

    layer: str
    option: str
    settings: tuple[float, ...]


class PassContext:
    """What a pass may ask about the graph in front of it, and what passes did to that so far (``history``).

    Made anew after every change, so nothing in it is stale.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example: Example | None = None,
        batches: Iterable[Example] | None = None,
        statistics: Mapping[tuple[fx.Node, str], Any] | None = None,
        history: Sequence[PassRecord] = (),
    ) -> None:
        self.gm = gm
        self.example = example
        self.batches = batches
        self.history = history
        self.statistics: Mapping[tuple[fx.Node, str], Any] = statistics or {}

    @cached_property
    def shapes(self) -> Shapes:
        """Shape and dtype of every node, from one run on the example.

        Raises:
            PreconditionError: there are no example inputs to run.
        """
        if self.example is None:
            raise PreconditionError("shapes were asked for but there are no example inputs; pass `example_inputs`")
        return shapes(self.gm, self.example.args, dict(self.example.kwargs))

    @cached_property
    def aliasing(self) -> Aliasing:
        """Which modules are shared, which parameters are tied, how often each module is called."""
        return aliasing(self.gm)

    def module(self, node: fx.Node) -> torch.nn.Module | None:
        """The module that a ``call_module`` node calls, else ``None``."""
        return self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None


class Pass:
    """Base of every technique. Derive with ``@dataclasses.dataclass(frozen=True)``; fields are the options.

    Attributes:
        name: kebab-case name, the one in the entry-point group ``fxcompress.passes``.
        guarantee: what the rewritten graph owes the original.
        needs: what must be there before the pass can start.
        trainable: whether what it makes can be trained; integers cannot.
        repeat: look for sites again after a round of rewriting, until there are none (folding opens new places).
        before, after: names of passes, installed or not, that are wrong before or after this one in one call of
            ``compile``; it is then refused. Only for orders in which a pass fails or finds nothing.
        why_after: why this pass comes after those that come before it, a clause for the message.
        stage: where it usually stands; ``None`` for behind whatever it was given behind.
        pays_with: names of passes that make what this one does pay; if one comes later, ``reject_slower`` judges all
            from this one to that together.
        timed: whether ``reject_slower`` measures it: not what is there for training.
    """

    name: ClassVar[str]
    guarantee: ClassVar[Guarantee]
    needs: ClassVar[frozenset[Need]] = frozenset()
    trainable: ClassVar[bool] = True
    repeat: ClassVar[bool] = False
    before: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[frozenset[str]] = frozenset()
    why_after: ClassVar[str] = ""
    stage: ClassVar[Stage | None] = None
    pays_with: ClassVar[frozenset[str]] = frozenset()
    timed: ClassVar[bool] = True

    def requires(self, context: PassContext) -> None:
        """Refuse the whole model by raising :class:`~fxcompress.errors.PreconditionError`. Read-only."""

    def observes(self, context: PassContext) -> Iterable[Observation]:
        """The statistics this pass wants from the calibration data; one run collects all of them. Read-only."""
        return ()

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """Every place to rewrite and every refusal, in graph order; all global choices are made here. Read-only."""
        raise NotImplementedError(f"{type(self).__qualname__} must say where it acts: implement sites()")

    def rewrite(self, site: Site) -> Mapping[str, Any] | None:
        """Change the graph at ``site``; what it returns (plain values) is added to the site's detail."""
        raise NotImplementedError(f"{type(self).__qualname__} must act on its sites: implement rewrite()")

    def compared(self, gm: fx.GraphModule, example: Example) -> tuple[fx.GraphModule, Example]:
        """The part of a graph, before or after this pass, that the guarantee is about, and inputs of that part.

        All of it, unless the pass adds inputs and outputs or takes them away. ``gm`` is not changed.
        """
        return gm, example

    def extended(self, gm: fx.GraphModule, example: Example) -> Example:
        """``example``, which fits the graph before this pass, as ``gm``, the graph after it, takes it."""
        return example

    def knobs(self, context: PassContext) -> Iterable[Knob]:
        """The layers that this pass can treat one by one, for a search; none if it cannot. Read-only."""
        return ()

    def turned(self, settings: Mapping[str, float]) -> Pass:
        """This pass as it does to the layers in ``settings`` (by :attr:`Knob.layer`) what they say, and no others."""
        raise NotImplementedError(f"{type(self).__qualname__} has knobs(), so it must say what they do: turned()")

    def calibration_reads(self) -> int:
        """How often this pass reads the calibration data; a stream of it is kept in memory if more than once in all."""
        return int(Need.CALIBRATION in self.needs or type(self).observes is not Pass.observes)

    def error_bound(self) -> float | None:
        """For APPROXIMATE passes: the largest relative error this pass declares, or ``None`` for 'just report it'."""
        return None
