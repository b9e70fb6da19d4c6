"""The measurements in order: single layers, whole passes, then what the knapsack says, corrected by what comes out."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from fxcompress.errors import FxCompressError
from fxcompress.pass_base import Example
from fxcompress.progress import Event, Progress
from fxcompress.reporting import Curve
from fxcompress.searching.building import Plan, Stage, Workshop, named, of_one
from fxcompress.searching.choosing import Chooser, Found, Together, Wish
from fxcompress.searching.measuring import Judge, node_seconds, sizes_of
from fxcompress.searching.result import Point
from fxcompress.searching.store import Store

__all__ = ["Clock", "Exploration"]

_PROBING = 0.5
"""The part of the time limit after which no more single layers are measured."""
_CORRECTIONS = 4
"""How often one combination of passes is tried again because it came out too large or too small."""
_CLOSE = 0.97
"""What is at least this part of what is aimed at need not be made larger."""
_MARGIN = 0.97
"""For latency this part of the target is aimed at, as it is measured again in the end and has noise."""


class OutOfTime(Exception):
    """No more is to be measured."""


class Clock:
    """How long it may take."""

    def __init__(self, limit: float | None) -> None:
        self._start, self._limit = time.perf_counter(), limit

    def check(self, part: float = 1.0, reserve: float = 0.0) -> None:
        """Raise :class:`OutOfTime` if this part of the limit, less ``reserve`` seconds, is over."""
        if self._limit is not None and time.perf_counter() - self._start > part * self._limit - reserve:
            raise OutOfTime


class Exploration:
    """Measures one plan after another.

    Attributes:
        points: what was built and measured, the original first.
        left_out: what could not be used, with reasons.
    """

    def __init__(
        self, workshop: Workshop, judge: Judge, store: Store, example: Example, clock: Clock, tell: Progress
    ) -> None:
        self._workshop, self._judge, self._store = workshop, judge, store
        self._example, self._clock, self._tell = example, clock, tell
        self._stages = workshop.stages
        self._alone: dict[tuple[int, str, int], dict[str, Any]] = {}
        self._seen: dict[str, Point | None] = {}
        self._longest = 0.0
        nothing = dict.fromkeys(("latency", *judge.sizes), 1.0)
        self.points = [Point(nothing, 0.0, 0.0, (), tuple({} for _ in self._stages))]
        self.left_out = list(workshop.left_out)

    def run(self, measure: str, target: float, tries: int) -> bool:
        """Whether it came to its end; otherwise it ran out of time."""
        complete = self._explore(measure, target, tries)
        if measure == "latency":
            self._confirm(target)
        return complete

    def _explore(self, measure: str, target: float, tries: int) -> bool:
        complete = True
        try:
            self._probe()
        except OutOfTime:
            complete = False
        try:
            together = self._try_whole_passes(measure)
            self._try_plans(
                Chooser(*self._known(measure, together), shares=measure == "latency"),
                measure,
                target * (_MARGIN if measure == "latency" else 1.0),
                tries,
            )
        except OutOfTime:
            return False
        return complete

    # ------------------------------------------------------------------------------------------------- single layers
    def _probe(self) -> None:
        """Every layer alone at every setting, the mildest of all first."""
        base = self._workshop.built(self._plan_of(0, {}), few=True)
        sizes, seconds = sizes_of(base, self._example), self._store.record("time", lambda: self._times(base))
        todo = [
            (level, i, knob.layer, knob.settings[level])
            for level in range(max(s.levels for s in self._stages))
            for i, stage in enumerate(self._stages)
            for knob in stage.knobs
            if level < len(knob.settings)
        ]
        for done, (level, i, layer, setting) in enumerate(todo):
            stage = self._stages[i]
            self._tell(Event("probe", stage.pass_.name, done, len(todo)))
            key = f"probe {i} {layer} {setting!r}"
            if self._store.get(key) is None:
                self._clock.check(_PROBING, self._longest)
            plan = self._plan_of(i, {layer: setting})
            self._alone[i, layer, level] = self._store.record(
                key,
                lambda plan=plan, layer=layer: self._alone_at(plan, layer, sizes, seconds),  # type: ignore[misc]
            )

    def _times(self, gm: Any) -> dict[str, Any]:
        return {"error": 0.0, **node_seconds(gm, self._example)}

    def _plan_of(self, index: int, settings: Mapping[str, float]) -> Plan:
        return of_one(len(self._stages), index, settings)

    def _alone_at(
        self, plan: Plan, layer: str, sizes: Mapping[str, float], seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """Error, what is saved of each measure, and the part of the time that the treated nodes take."""
        try:
            gm = self._workshop.built(plan, few=True)
        except FxCompressError as error:
            return {"refused": str(error)}
        own = sizes_of(gm, self._example)
        saved = {m: (sizes[m] - own[m]) / sizes[m] if sizes[m] else 0.0 for m in own}
        base = self._workshop.built(self._plan_of(0, {}), few=True)
        treated = _treated(base, gm, layer)
        total = sum(s for name, s in seconds.items() if name != "error")
        saved["latency"] = sum(seconds.get(name, 0.0) for name in treated) / total if total else 0.0
        return {"error": self._judge.error(gm, few=True), **saved}

    def curves(self) -> tuple[Curve, ...]:
        """What was measured of single layers."""
        found = []
        for i, stage in enumerate(self._stages):
            for knob in stage.knobs:
                records = [(s, self._alone.get((i, knob.layer, n), {})) for n, s in enumerate(knob.settings)]
                points = tuple(
                    (float(s), float(r["error"])) for s, r in records if math.isfinite(r.get("error", math.inf))
                )
                if points:
                    found.append(Curve(knob.layer, f"{stage.pass_.name} {knob.option}", points))
        return tuple(found)

    def _known(self, measure: str, together: list[dict[int, Together]]) -> tuple[Any, Any, Any]:
        found: list[dict[tuple[str, int], Found]] = [{} for _ in self._stages]
        for (i, layer, level), record in self._alone.items():
            if "refused" not in record:
                found[i][layer, level] = Found(record["error"], record[measure])
        return self._stages, found, together

    # ------------------------------------------------------------------------------------------------- whole pipelines
    def _try_whole_passes(self, measure: str) -> list[dict[int, Together]]:
        """Each pass by itself on all layers, at each setting."""
        found: list[dict[int, Together]] = [{} for _ in self._stages]
        for i, stage in enumerate(self._stages):
            for level in range(stage.levels):
                point = self._try(self._plan_of(i, stage.level(level)), f"{stage.name} {_setting(stage, level)}")
                if point is not None:
                    found[i][level] = Together(point.error, point.cost[measure])
        return found

    def _try_plans(self, chooser: Chooser, measure: str, target: float, tries: int) -> None:
        """Combinations of passes, the most promising first; each again until it is just within the target."""
        left = tries
        wishes = {subset: chooser.wish(subset, target) for subset in chooser.subsets()}
        lines = [s for s, w in sorted(wishes.items(), key=lambda item: _promise(item[1])) if w is not None]
        best = math.inf
        for subset in lines:
            goal, refused = target, 0
            for _ in range(_CORRECTIONS):
                wish = chooser.wish(subset, goal)
                if wish is None or left == 0:
                    break
                known = named(wish.plan) in self._seen
                left -= not known
                point = self._try(wish.plan, f"{len(self.points)}: {measure} {wish.left:.2f}")
                if point is None:
                    refused += 1
                    break
                got = point.cost[measure]
                if got <= target:
                    best = min(best, point.error)
                if known or _CLOSE * target <= got <= target or point.error > 2 * best:
                    break
                goal = min(goal * target / got * (0.995 if got > target else 1.0), 1.0)

    def _try(self, plan: Plan, note: str) -> Point | None:
        """Build and measure a plan; ``None`` if a pass refuses it."""
        name = named(plan)
        if name in self._seen:
            return self._seen[name]
        self._tell(Event("try", None, len(self.points) - 1, None, note))
        if self._store.get(f"try {name}") is None:
            self._clock.check(reserve=self._longest)
        start = time.perf_counter()
        record = self._store.record(f"try {name}", lambda: self._whole(plan))
        self._longest = max(self._longest, time.perf_counter() - start)
        point = None
        if "refused" in record:
            self.left_out.append((note, record["refused"]))
        else:
            passes = tuple(self._workshop.passes(plan))
            point = Point(record["cost"], record["drop"], record["error"], passes, plan)
            self.points.append(point)
        self._seen[name] = point
        return point

    def _confirm(self, target: float) -> None:
        """Measure the latency of what would be the result again, and take the longer one, until that stays the result:
        the best of many measured with noise is likely to be one that was lucky."""
        confirmed: set[str] = set()
        while True:
            inside = [i for i, p in enumerate(self.points) if p.cost["latency"] <= target]
            place = min(inside, key=lambda i: self.points[i].order("latency"), default=None)
            if place is None or named(self.points[place].settings) in confirmed:
                return
            point = self.points[place]
            name = named(point.settings)
            self._tell(Event("try", None, len(self.points) - 1, None, f"again: latency {point.cost['latency']:.3f}"))

            def timed(point: Point = point) -> dict[str, float]:
                again = self._judge.latency(self._workshop.built(point.settings))
                return {"error": point.error, "latency": again}

            record = self._store.record(f"again {name}", timed)
            cost = {**point.cost, "latency": max(point.cost["latency"], record["latency"])}
            self.points[place] = dataclasses.replace(point, cost=cost)
            confirmed.add(name)

    def _whole(self, plan: Plan) -> dict[str, Any]:
        try:
            gm = self._workshop.built(plan)
        except FxCompressError as refusal:
            return {"refused": str(refusal)}
        error = self._judge.error(gm)
        return {"error": error, "drop": self._judge.drop(gm, error), "cost": self._judge.cost(gm)}


def _promise(wish: Wish | None) -> float:
    return math.inf if wish is None else wish.error


def _setting(stage: Stage, level: int) -> str:
    return json.dumps(sorted(set(stage.level(level).values())))


def _treated(before: Any, after: Any, layer: str) -> set[str]:
    """Names of the nodes of ``before`` that are gone or whose layer has other parameters in ``after``."""
    kept = {node.name: node for node in after.graph.nodes}
    found = set()
    for node in before.graph.nodes:
        if node.op != "call_module":
            continue
        same = kept.get(node.name)
        if (
            same is None
            or (same.op, same.target) != (node.op, node.target)
            or _shapes(before, str(node.target)) != _shapes(after, str(same.target))
        ):
            found.add(node.name)
    return found


def _shapes(gm: Any, path: str) -> list[tuple[type, tuple[int, ...], Any]]:
    module = gm.get_submodule(path)
    return [(type(module), tuple(p.shape), p.dtype) for p in (*module.parameters(), *module.buffers())]
