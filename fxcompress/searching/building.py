"""From passes and what they are told to do to each layer to graphs."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import fx

from fxcompress.apply import apply_pass
from fxcompress.calibration import Batches
from fxcompress.editing import private_copy
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.pass_base import Example, Guarantee, Knob, Pass, PassContext
from fxcompress.progress import Event

__all__ = ["Plan", "Stage", "Workshop", "named", "of_one"]

Plan = tuple[Mapping[str, float], ...]
"""For each stage the setting of each layer that it treats."""

_KEPT = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A pass with knobs, and what has to follow it where it does anything."""

    pass_: Pass
    followers: tuple[Pass, ...]
    knobs: tuple[Knob, ...]

    @property
    def name(self) -> str:
        """The pass and what is set, in words."""
        return f"{self.pass_.name} {self.knobs[0].option}"

    @property
    def levels(self) -> int:
        """How many settings the knobs have, at most."""
        return max(len(knob.settings) for knob in self.knobs)

    def level(self, number: int) -> dict[str, float]:
        """Every knob at its setting ``number``, or at its last."""
        return {k.layer: k.settings[min(number, len(k.settings) - 1)] for k in self.knobs}

    def passes(self, settings: Mapping[str, float]) -> tuple[Pass, ...]:
        """What does this; nothing if no layer is treated."""
        return (self.pass_.turned(settings), *self.followers) if settings else ()


def of_one(stages: int, index: int, settings: Mapping[str, float]) -> Plan:
    """The plan in which only stage ``index`` does something."""
    return tuple(dict(settings) if i == index else {} for i in range(stages))


def named(plan: Plan) -> str:
    """A text that is the same for the same plan."""
    return json.dumps([dict(sorted(settings.items())) for settings in plan])


class Workshop:
    """Makes the graphs of plans from one graph, and remembers how far it came with the last ones.

    Attributes:
        origin: the graph of the model as it is; never changed.
        stages: the passes that can be turned.
        left_out: passes with knobs that refuse the model, with the reason.
    """

    def __init__(
        self, origin: fx.GraphModule, passes: Sequence[Pass], example: Example, batches: Batches, few: Batches
    ) -> None:
        self.origin = origin
        self.left_out: list[tuple[str, str]] = []
        self._example = example
        self._data = {False: batches, True: few}
        self._kept: OrderedDict[tuple[str, ...], fx.GraphModule] = OrderedDict()
        self._steps: list[Pass | Stage] = []
        self._read(passes)
        self.stages = [step for step in self._steps if isinstance(step, Stage)]

    def _read(self, passes: Sequence[Pass]) -> None:
        """Sort out which passes are turned, which follow one, and which are always there."""
        gm = self.origin
        follows = False
        for pass_ in passes:
            if type(pass_).extended is not Pass.extended:
                raise UsageError(f"pass {pass_.name!r} changes the inputs of the model; a search has no use for it")
            if type(pass_).knobs is not Pass.knobs:
                knobs = self._knobs(pass_, gm)
                follows = True
                self._steps.append(Stage(pass_, (), knobs))
            elif follows and pass_.guarantee is not Guarantee.EXACT:
                last = self._steps[-1]
                if not isinstance(last, Stage):
                    raise UsageError(f"put {pass_.name!r} directly behind the pass that it belongs to")
                self._steps[-1] = dataclasses.replace(last, followers=(*last.followers, pass_))
            else:
                gm = self._applied((pass_,), gm, few=False)
                self._steps.append(pass_)
        self._steps = [step for step in self._steps if isinstance(step, Pass) or step.knobs]

    def _knobs(self, pass_: Pass, gm: fx.GraphModule) -> tuple[Knob, ...]:
        context = PassContext(gm, self._example, self._data[False])
        try:
            pass_.requires(context)
            knobs = tuple(pass_.knobs(context))
        except PreconditionError as error:
            self.left_out.append((pass_.name, str(error)))
            return ()
        if not knobs:
            self.left_out.append((pass_.name, "finds no layer that it could treat"))
        return knobs

    def passes(self, plan: Plan) -> list[Pass]:
        """What :func:`fxcompress.compile` is to be given."""
        settings = iter(plan)
        found: list[Pass] = []
        for step in self._steps:
            found += step.passes(next(settings)) if isinstance(step, Stage) else (step,)
        return found

    def built(self, plan: Plan, *, few: bool = False) -> fx.GraphModule:
        """The graph of a plan, not verified; ``few``: on fewer data. Not to be changed.

        Raises:
            FxCompressError: a pass refuses what it is asked for.
        """
        gm, settings = self.origin, iter(plan)
        done: tuple[str, ...] = (str(few),)
        for step in self._steps:
            given = next(settings) if isinstance(step, Stage) else None
            passes = (step,) if isinstance(step, Pass) else step.passes(given or {})
            done = (*done, json.dumps(sorted((given or {}).items())))
            if not passes:
                continue
            if done not in self._kept:
                self._kept[done] = self._applied(passes, gm, few=few)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(done)
            gm = self._kept[done]
        return gm

    def _applied(self, passes: Sequence[Pass], gm: fx.GraphModule, *, few: bool) -> fx.GraphModule:
        own = private_copy(gm)
        for pass_ in passes:
            apply_pass(pass_, own, self._example, self._data[few], _silent)
        return own


def _silent(event: Event) -> None:
    """Tell nobody: it is one of hundreds."""
