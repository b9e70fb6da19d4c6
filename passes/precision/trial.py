"""One run of a graph under the rules, which finds out what no table says.

PyTorch itself decides what dtype a value gets, whether there is a kernel for it, and whether it overflows. Where an
operation fails on low operands, gives anything but the same thing in another dtype, or leaves the range of the low
dtype, it is forced into float32, and the run made again. A value that is written to in place is one tensor in one
dtype, read through all of its views, so nothing is cast there; if it must be float32 it is *raised* where it is made.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress import matching
from fxcompress.analysis.channels.arithmetic import is_pointwise
from fxcompress.analysis.running import GraphRunner
from fxcompress.analysis.shapes import TensorSpec
from fxcompress.editing import is_inplace
from fxcompress.errors import PreconditionError
from fxcompress.passes.precision.placement import Placement, Survey, specs
from fxcompress.passes.precision.rules import Kind, attention_mask, is_cast_to_float32, operation

__all__ = ["Decision", "decide", "fitted"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was found.

    Attributes:
        placement: of contractions and parameters.
        casts: for each node the values that it is to read in another dtype.
        raised: nodes whose value is cast to float32 as soon as it is made, for all of its readers.
        dtypes: the dtype of each node that gives one floating-point tensor.
        refused: contractions that compute in float32, and why.
    """

    placement: Placement
    casts: Mapping[fx.Node, Mapping[fx.Node, torch.dtype]]
    raised: frozenset[fx.Node]
    dtypes: Mapping[fx.Node, torch.dtype]

    @property
    def refused(self) -> Mapping[fx.Node, str]:
        """See above."""
        return self.placement.obstacles


def decide(survey: Survey) -> Decision:
    """Run until nothing new comes to light; each further run knows of one more node at least."""
    forced: dict[fx.Node, str] = {}
    raised: set[fx.Node] = set()
    for node in survey.nodes:
        if is_inplace(node) and survey.kinds[node] is Kind.FLOAT32:
            raised.update(survey.memory.sharing(node))
    example = survey.context.example
    assert example is not None, "the engine sees to it that there is one"
    while True:
        trial = _Trial(survey, Placement(survey, forced), forced, raised)
        try:
            trial.observe(example.args, example.kwargs)
        except _MustRaise as found:
            if raised.issuperset(found.nodes):
                raise PreconditionError(
                    f"{matching.describe(survey.gm, found.nodes[0])} shares memory that is written to in place, and "
                    "could not be kept in float32; write the model without that"
                ) from found
            raised.update(found.nodes)
            continue
        if not trial.found:
            return Decision(trial.placement, trial.casts, frozenset(trial.raised_here), trial.dtypes)
        forced.update(trial.found)


def fitted(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask`` in ``dtype``, with finite numbers kept finite: the least float32 is how models write "never", and rounds
    to an infinity that makes a row of nothing else NaN."""
    info = torch.finfo(dtype)
    return torch.where(mask.isinf(), mask, mask.clamp(info.min, info.max)).to(dtype)


class _MustRaise(Exception):
    """A value that is written to in place has to be float32: begin again."""

    def __init__(self, nodes: list[fx.Node]) -> None:
        super().__init__(f"{nodes[0].name} has to be float32 from the start")
        self.nodes = nodes


class _Trial(GraphRunner):
    def __init__(
        self, survey: Survey, placement: Placement, forced: Mapping[fx.Node, str], to_raise: set[fx.Node]
    ) -> None:
        super().__init__(survey.gm)
        self._survey, self.placement, self._forced, self._to_raise = survey, placement, forced, to_raise
        self._dtype = survey.dtype
        self._shapes = survey.context.shapes
        self.casts: dict[fx.Node, dict[fx.Node, torch.dtype]] = {}
        self.raised_here: set[fx.Node] = set()
        self.dtypes: dict[fx.Node, torch.dtype] = {}
        self.found: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        values = {source: self.env[source] for source in n.all_input_nodes}
        if n.op == "get_attr":
            result = super().run_node(n)
            result = result.to(self._dtype) if n in self.placement.stored else result
        elif n.op == "placeholder":
            result = super().run_node(n)
        elif is_inplace(n):
            result = self._in_place(n, values)
        else:
            result = self._fresh(n, values)
        if n in self._to_raise and n.op not in ("placeholder", "output"):
            result = self._raise(n, result)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.dtypes[n] = result.dtype
        return result

    # ------------------------------------------------------------------------------------------------- kinds of nodes
    def _fresh(self, n: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Run ``n`` on operands of the dtypes that it asks for; in float32 if that does not do."""
        wanted = self._wanted(n, values)
        casts = self._casts_of(n, values, wanted)
        if wanted is not torch.float32 and (casts or any(self._has_low(s, v) for s, v in values.items())):
            try:
                reason = self._number_out_of_range(n, values)
                result = None if reason else self._run(n, self._cast(n, values, casts))
            except Exception as error:  # whatever a kernel says of a dtype: it gets float32 instead
                reason = f"fails in {self._dtype}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            reason = reason or self._difference(n, result) or self._overflow(n, result, values)
            if reason is None:
                return self._done(n, casts, result)
            self.found.setdefault(n, reason)
            casts = self._casts_of(n, values, torch.float32)
        elif (fewer := self._fewest(n, values, casts)) != casts:
            try:
                result = self._run(n, self._cast(n, values, fewer))
            except Exception:  # an operation that does not promote: all of its operands are cast
                result = None
            if isinstance(result, Tensor) and self._difference(n, result, exactly=True) is None:
                return self._done(n, fewer, result)
        self._unpack_by_force(values, casts)
        run = self._reference if n in self.found else self._run
        return self._done(n, casts, run(n, self._cast(n, values, casts)))

    def _wanted(self, n: fx.Node, values: dict[fx.Node, Any]) -> torch.dtype | None:
        """The dtype of operands that ``n`` asks for; ``None`` for those that they have."""
        kind = self.placement.kind(n)
        if kind is Kind.FLOAT32:
            asks = matching.is_torch_call(n) and not specs(self._shapes[n])  # a size and the like
            return None if asks and n not in self._forced else torch.float32
        if kind is Kind.LOW:
            return self._dtype
        if kind is Kind.ONCE:
            low = any(self._has_low(s, v) for s, v in values.items())
            return None if low and n in self.placement.wants else torch.float32
        if self.placement.comes_early(n):
            return self._dtype
        if not self.placement.comes_late(n):
            return None
        casts = self._fewest(n, values, self._casts_of(n, values, torch.float32))
        return torch.float32 if len(casts) <= 1 else None

    def _in_place(self, n: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Run ``n`` on the tensor that it writes to, in the dtype that this has."""
        target = matching.tensor_input(n)
        written = values.get(target) if target is not None else None
        low = target is not None and self._has_low(target, written)
        wanted = self._dtype if low else torch.float32
        others = {s: v for s, v in values.items() if s is not target}
        product = self._survey.kinds[n] is Kind.LOW
        casts = {} if self._promotes(n) else self._casts_of(n, others, wanted)
        if target is None or not isinstance(written, Tensor) or not low:
            return self._done(n, casts, self._run(n, self._cast(n, values, casts)))
        mixed = not product and any(self._is_high(s, v) for s, v in others.items())
        if mixed or self._number_out_of_range(n, others):
            raise _MustRaise(self._survey.memory.sharing(target))
        before, state = written.float(), self._cast(n, values, casts)
        try:
            result = self._run(n, state)
        except Exception as error:  # whatever a kernel says of a dtype
            raise _MustRaise(self._survey.memory.sharing(target)) from error
        if not bool(written.isfinite().all()):
            exact = {source: self._lifted(source, value) for source, value in others.items()}
            if not _same_infinities(self._reference(n, {**exact, target: before}), result):
                raise _MustRaise(self._survey.memory.sharing(target))
        return self._done(n, casts, result)

    def _promotes(self, n: fx.Node) -> bool:
        """Whether ``n`` takes operands of any dtype and rounds what it writes."""
        return n.op == "call_module" or is_pointwise(operation(self._survey.gm, n))

    def _raise(self, n: fx.Node, result: Any) -> Any:
        """Make ``result`` float32 if it is low and the first of those that share its memory."""
        if not any(self._has_low(n, leaf) for leaf in pytree.tree_leaves(result)):
            return result
        if is_inplace(n) or any(self._survey.is_real(source) for source in self._survey.memory.passed_on(n)):
            return result
        if not isinstance(result, Tensor):
            self.found.setdefault(n, "gives several values that something writes to in float32")
            return self._lifted(n, result)
        self.raised_here.add(n)
        return result.float()

    # ------------------------------------------------------------------------------------------------- one call
    def _run(self, n: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if n.op != "call_module" or n not in self.placement.low:
            return self._reference(n, values)
        module = copy.deepcopy(self._survey.gm.get_submodule(str(n.target))).to(self._dtype)
        args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), lambda node: values[node])
        return module(*args, **kwargs)

    def _casts_of(
        self, n: fx.Node, values: Mapping[fx.Node, Any], wanted: torch.dtype | None
    ) -> dict[fx.Node, torch.dtype]:
        """The operands that must be cast so that those which were float32 have the ``wanted`` dtype."""
        if wanted is None:
            return {}
        casts: dict[fx.Node, torch.dtype] = {}
        for source, value in values.items():
            differs = (
                self._is_high(source, value, numbers=True) if wanted is self._dtype else self._has_low(source, value)
            )
            if differs:
                casts[source] = wanted
        return casts

    def _cast(
        self, n: fx.Node, values: Mapping[fx.Node, Any], casts: Mapping[fx.Node, torch.dtype]
    ) -> dict[fx.Node, Any]:
        result = dict(values)
        for source, dtype in casts.items():
            if dtype is torch.float32:
                result[source] = self._lifted(source, values[source])
            elif source is attention_mask(self._survey.gm, n):
                result[source] = fitted(values[source], dtype)
            elif isinstance(values[source], Tensor):
                result[source] = values[source].to(dtype)
            else:
                raise TypeError(f"{source.name} gives several values of other dtypes")
        return result

    def _fewest(
        self, n: fx.Node, values: Mapping[fx.Node, Any], casts: dict[fx.Node, torch.dtype]
    ) -> dict[fx.Node, torch.dtype]:
        """The ``casts`` to float32 that are left where PyTorch promotes the other operands to it."""
        if not self._promotes(n) or n.op == "call_module":
            return casts
        if any(self._is_high(s, v) for s, v in values.items()):
            return {}
        sized = [s for s in casts if isinstance(values[s], Tensor) and values[s].dim()]
        return {sized[0]: torch.float32} if sized else casts

    def _done(self, n: fx.Node, casts: dict[fx.Node, torch.dtype], result: Any) -> Any:
        """Note ``casts``, none of which may part a value from what shares its memory if something is written there."""
        for source in (*casts, *self._parted(n)):
            if source in self._survey.written and self._is_parted(n, source):
                raise _MustRaise(self._survey.memory.sharing(source))
        if casts:
            self.casts[n] = casts
        return result

    def _is_parted(self, n: fx.Node, source: fx.Node) -> bool:
        """Whether ``n`` may pass on the memory of ``source``, or write to it, and others read that later."""
        if source not in self._survey.memory.passed_on(n):
            return False
        return any(user > n for one in self._survey.memory.sharing(source) if one < n for user in one.users)

    def _parted(self, n: fx.Node) -> Iterator[fx.Node]:
        """What the model's own cast copies now, and gave back as it was when it was float32."""
        source = matching.tensor_input(n)
        if source is not None and is_cast_to_float32(n) and self._has_low(source, self.env.get(source)):
            yield source

    def _unpack_by_force(self, values: Mapping[fx.Node, Any], casts: dict[fx.Node, torch.dtype]) -> None:
        """Tuples cannot be cast by one node: what makes them has to make them of float32."""
        for source in [s for s in casts if not isinstance(values[s], Tensor)]:
            self.found.setdefault(source, "gives several values that are read together in float32")

    # ------------------------------------------------------------------------------------------------- questions
    def _has_low(self, source: fx.Node, value: Any) -> bool:
        """Whether ``value`` has a tensor of the low dtype that was float32."""
        leaves = pytree.tree_leaves(value)
        return self._survey.is_real(source) and any(isinstance(v, Tensor) and v.dtype is self._dtype for v in leaves)

    def _is_high(self, source: fx.Node, value: Any, numbers: bool = False) -> bool:
        """Whether ``value`` has a tensor of float32; single numbers, which change no dtype, count if asked for."""
        leaves = pytree.tree_leaves(value)
        return any(isinstance(v, Tensor) and v.dtype is torch.float32 and (numbers or v.dim()) for v in leaves)

    def _lifted(self, source: fx.Node, value: Any) -> Any:
        if not self._survey.is_real(source):
            return value
        return pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype is self._dtype else t, value)

    def _difference(self, n: fx.Node, result: Any, exactly: bool = False) -> str | None:
        """How ``result`` differs from what ``n`` gives in the original, apart from values and, unless ``exactly``, the
        low dtype in place of float32."""
        allowed = (torch.float32, torch.float32 if exactly else self._dtype)
        before, after = pytree.tree_leaves(self._shapes[n]), pytree.tree_leaves(result)
        if len(before) != len(after):
            return f"gives another structure in {self._dtype}"
        for old, new in zip(before, after, strict=True):
            if isinstance(old, TensorSpec):
                same = isinstance(new, Tensor) and tuple(new.shape) == old.shape
                if not same or (new.dtype is not old.dtype and (old.dtype, new.dtype) != allowed):
                    return f"gives {getattr(new, 'dtype', type(new))} in place of {old.dtype}, or another shape"
            elif isinstance(old, (int, str, torch.dtype)) and old != new:
                return f"gives {new!r} in place of {old!r} in {self._dtype}"
        return None

    def _number_out_of_range(self, n: fx.Node, values: Mapping[fx.Node, Any]) -> str | None:
        """Whether a number that takes the dtype of the operand beside it, such as the least float32 for "never", would
        be infinite in that. Whether it is chosen depends on values, of which the example shows few."""
        if self.placement.kind(n) is not Kind.FOLLOWS:
            return None
        numbers: list[Any] = [v for v in pytree.tree_leaves((n.args, dict(n.kwargs))) if isinstance(v, (int, float))]
        numbers += [
            float(v) for v in values.values() if isinstance(v, Tensor) and v.dtype is torch.float32 and not v.dim()
        ]
        largest = torch.finfo(self._dtype).max
        found = next((v for v in numbers if largest < abs(v) < math.inf), None)
        return None if found is None else f"takes in {found:.3g}, which {self._dtype} cannot hold"

    def _overflow(self, n: fx.Node, result: Any, values: Mapping[fx.Node, Any]) -> str | None:
        leaves = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor) and v.dtype is self._dtype]
        if all(bool(v.isfinite().all()) for v in leaves):
            return None
        exact = {source: self._lifted(source, value) for source, value in values.items()}
        reference = self._reference(n, exact)
        return None if _same_infinities(reference, result) else f"overflows {self._dtype} on the example inputs"

    def _reference(self, n: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """``n`` as it is, with the parameters that it has."""
        args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), lambda node: values[node])
        return getattr(self, n.op)(n.target, args, kwargs)


def _same_infinities(reference: Any, result: Any) -> bool:
    pairs = zip(pytree.tree_leaves(reference), pytree.tree_leaves(result), strict=True)
    return all(bool((b.isfinite() | ~a.isfinite()).all()) for a, b in pairs if isinstance(b, Tensor))
