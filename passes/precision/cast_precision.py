"""Mixed precision as a rewrite: bfloat16 or float16 where that does little harm, float32 elsewhere (APPROXIMATE).

What ``torch.autocast`` decides anew in every call is decided once and written down: weights are stored in the low
dtype, so that the model is half as large, and casts are nodes, shared by all readers of a value. The rules
(Micikevicius et al. 2018, arXiv 1710.03740, and the lists of autocast) are in ``rules.py``:

* contractions compute in the low dtype;
* norms, losses, sums, ``exp``, ``log``, ``pow`` and the like, and all that is not known, compute in float32;
* whatever else acts element by element or moves elements follows its operands.

Where a value is rounded only once either way the cheaper way is taken. Softmax and means add up in float32 whatever
they read, so between contractions they stay low: the results are equal to the last bit (measured on the CPU in both
dtypes, as for average pooling and batch norm, which always follow). A cast comes before operations with which rounding
commutes, and what will be cast to float32 is computed in that, as the sums between the norms of a transformer.

Numbers that a model makes itself, such as rotary angles, are left as they are. Masks keep finite numbers finite: the
least float32 is an infinity in either low dtype, and a row of infinities makes NaN. What fails in the low dtype, gives
something else than another dtype or overflows is found by running the graph on the example (``trial.py``).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxcompress import matching
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.matching import check_patterns, check_patterns_match
from fxcompress.pass_base import Guarantee, Need, Pass, PassContext, Refusal, Site, Stage
from fxcompress.passes.precision.emission import Emission
from fxcompress.passes.precision.placement import Survey, specs
from fxcompress.passes.precision.rules import Kind, kind_of, operation
from fxcompress.passes.precision.trial import Decision, decide

__all__ = ["CastPrecision"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class CastPrecision(Pass):
    """Compute and store in bfloat16 or float16 what bears it, and the rest in float32.

    Inputs and outputs keep their dtypes. Norms keep float32 parameters. On a CPU the time depends on what it has
    instructions for: on one with those for bfloat16 (AVX512-BF16, one thread) ResNet-18 takes 0.65 of the time of
    float32, ViT-B/16 and BERT-base 0.31 to 0.32; float16 takes 2 to 25 times as long there. On a CPU with instructions
    for neither expect it to be slower, and only half as large.
    Low weights can be trained, but small steps are lost in rounding; train first, or let the optimiser keep copies.

    Args:
        dtype: ``"bfloat16"``, which has the range of float32 and 8 bits of precision, or ``"float16"`` with 11 bits and
            numbers up to 65504. Overflow is looked for on the example inputs: give some like those of use.
        keep: names of further operations that compute in float32, as the record has them: classes of modules
            (``"GELU"``) or functions (``"matmul"``).
        exclude: glob patterns of paths of modules, or of modules that contain them, that compute in float32; so do
            products of nothing but what comes from them.
        only: glob patterns of paths of layers; the contractions of others compute in float32.

    There is a site for each operation in the low dtype and each that reads or makes another dtype than before. Detail:
    ``operation``, ``module`` (its path), ``computes`` (a dtype), ``parameters`` (names of those stored low), ``casts``
    (how many were put in for it) and ``weight_error`` (the largest rounding error of these, relative to the norm).
    Contractions that stay in float32 unasked are refusals.
    """

    name: ClassVar[str] = "cast-precision"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})
    after: ClassVar[frozenset[str]] = frozenset({"quantize"})
    why_after: ClassVar[str] = "layers that compute in half precision have no integer kernels"
    stage: ClassVar[Stage] = Stage.ROUND

    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    keep: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise UsageError(f"dtype is {' or '.join(map(repr, _DTYPES))}, as a string; got {self.dtype!r}")
        check_patterns(keep=self.keep, exclude=self.exclude, only=self.only)

    def requires(self, context: PassContext) -> None:
        """See :meth:`Pass.requires`."""
        for name, parameter in context.gm.named_parameters():
            if parameter.dtype is torch.float64:
                raise PreconditionError(
                    f"{self.name}: the parameter {name!r} is float64, and what is computed in that is meant exactly; "
                    "call model.float() before if it is not"
                )

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`."""
        kept = self._kept(context)
        survey = Survey(context, _DTYPES[self.dtype], kept)
        decision = decide(survey)
        emission = Emission(survey, decision)
        for node in survey.nodes:
            if reason := decision.refused.get(node):
                yield Refusal(node, reason)
            stored = list(decision.placement.parameters(node))
            computes = node in decision.placement.low
            if computes or stored or node in decision.casts or node in decision.raised:
                detail = {
                    "operation": operation(context.gm, node),
                    "module": str(node.target) if node.op == "call_module" else "",
                    "computes": self._computes(decision, node),
                    "parameters": [name for name, _ in stored],
                }
                yield Site(node, emission, detail)

    def rewrite(self, site: Site) -> Mapping[str, Any]:
        """See :meth:`Pass.rewrite`."""
        emission: Emission = site.data
        return emission.write(site.node)

    def _computes(self, decision: Decision, node: fx.Node) -> str:
        if node in decision.placement.low or node in decision.placement.stored:
            return self.dtype
        casts = decision.casts.get(node, {})
        return self.dtype if casts and set(casts.values()) == {_DTYPES[self.dtype]} else "float32"

    # ------------------------------------------------------------------------------------------------- options
    def _kept(self, context: PassContext) -> frozenset[fx.Node]:
        """The nodes that the options keep in float32."""
        gm = context.gm
        nodes = list(gm.graph.nodes)
        names = {operation(gm, node) for node in nodes if node.op.startswith("call_")}
        for name in self.keep:
            if name not in names:
                near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.0)
                raise UsageError(f"keep: no operation of this model is called {name!r}; near it: {', '.join(near)}")
        paths = {node: self._paths(context, node) for node in nodes}
        check_patterns_match((*self.exclude, *self.only), {path for found in paths.values() for path in found})
        kept: set[fx.Node] = set()
        from_kept: set[fx.Node] = set()
        for node in nodes:
            module = context.module(node)
            by_path = bool(paths[node]) and not self._is_wanted(paths[node], kind_of(gm, node) is Kind.LOW)
            read = [n for n in node.all_input_nodes if n.op != "get_attr" and specs(context.shapes[n])]
            flows = bool(read) and from_kept.issuperset(read)
            holds = module is not None and any(True for _ in module.parameters())
            if by_path or (flows and not holds):
                from_kept.add(node)
            if by_path or (node in from_kept and not holds and kind_of(gm, node) is Kind.LOW):
                kept.add(node)
            if node.op.startswith("call_") and operation(gm, node) in self.keep:
                kept.add(node)
        return frozenset(kept)

    def _paths(self, context: PassContext, node: fx.Node) -> tuple[str, ...]:
        module = context.module(node)
        if module is not None:
            return context.aliasing.paths(module)
        return (str(node.target).rpartition(".")[0],) if node.op == "get_attr" and "." in str(node.target) else ()

    def _is_wanted(self, paths: tuple[str, ...], contracts: bool) -> bool:
        if any(matching.matches_path(path, pattern) for path in paths for pattern in self.exclude):
            return False
        if not self.only or not contracts:
            return True
        return any(matching.matches_path(path, pattern) for path in paths for pattern in self.only)
