"""Remove channels, and everything that goes with them, from the whole graph (guarantee RETRAIN).

Which parameters hang together is found by :func:`fxcompress.analysis.channels.channel_groups`; this pass scores the
channels of each group, chooses which go, and slices. Structured pruning with coupled parameters follows DepGraph (Fang
et al. 2023, arXiv 2301.12900); the ranking within groups of one structure follows Isomorphic Pruning (Fang et al. 2024,
arXiv 2407.04616).
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from fxcompress.analysis.channels import ChannelGroups, Group, channel_groups
from fxcompress.analysis.cost import cost
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.matching import check_patterns, check_patterns_match, matches_path
from fxcompress.pass_base import Guarantee, Knob, Need, Pass, PassContext, Refusal, Site, Stage
from fxcompress.passes.pruning.budget import Budget
from fxcompress.passes.pruning.importance import IMPORTANCES, Importance
from fxcompress.passes.pruning.reconstruct import Reconstruction
from fxcompress.passes.pruning.selection import Candidate, Selection, reach
from fxcompress.passes.pruning.surgery import Surgery

__all__ = ["PruneChannels"]

_RATIOS = (0.1, 0.25, 0.5)
"""What a search tries for each group."""


@dataclasses.dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the least important channels.

    Args:
        ratio: the fraction to remove, in [0, 1): of the channels of each group, or of what ``measure`` says.
        measure: ``"channels"``, or the whole model's ``"params"`` or ``"macs"``, met within 1%.
        scope: what is ranked together: each group by itself (``"local"``), all groups (``"global"``), or all groups of
            the same structure (``"isomorphic"``).
        importance: an :class:`~fxcompress.passes.pruning.importance.Importance` or the name of one: ``"l1"``, ``"l2"``,
            ``"filter-threshold"``, ``"batch-norm-scale"``, ``"lamp"``, ``"fpgm"`` and ``"random"`` look at weights
            alone, ``"taylor"``, ``"hessian"``, ``"activation"`` and ``"pfp"`` at calibration data.
        round_to: the number of channels left is a multiple of this, where a group has that many.
        min_channels: as many stay in every group.
        exclude: glob patterns of paths of layers, or of modules that contain them, that keep their channels.
        only: glob patterns of paths of layers; others keep theirs.
        per_layer: glob pattern -> ratio, for groups that one of these layers makes.
        attention: remove whole ``"heads"``, or part of each (``"head_dim"``).
        reconstruct: then refit the layers that read fewer channels to the outputs they had, by least squares on the
            calibration data; see :mod:`fxcompress.passes.pruning.reconstruct`. Each is a site of its own.
    """

    name: ClassVar[str] = "prune-channels"
    guarantee: ClassVar[Guarantee] = Guarantee.RETRAIN
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})
    before: ClassVar[frozenset[str]] = frozenset({"fake-quantize", "quantize", "lower-int8"})
    stage: ClassVar[Stage] = Stage.PRUNE

    ratio: float = 0.5
    measure: Literal["channels", "params", "macs"] = "channels"
    scope: Literal["local", "global", "isomorphic"] = "local"
    importance: str | Importance = "l2"
    round_to: int = 1
    min_channels: int = 1
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    per_layer: Mapping[str, float] = dataclasses.field(default_factory=dict)
    attention: Literal["heads", "head_dim"] = "heads"
    reconstruct: bool = False

    def __post_init__(self) -> None:
        for ratio in (self.ratio, *self.per_layer.values()):
            if not 0 <= ratio < 1:
                raise UsageError(f"a ratio is the fraction to remove, at least 0 and below 1, got {ratio}")
        check_patterns(exclude=self.exclude, only=self.only)
        for option, value in (("round_to", self.round_to), ("min_channels", self.min_channels)):
            if value < 1:
                raise UsageError(f"{option} must be at least 1, got {value}")
        for option, chosen, known in (
            ("measure", self.measure, ("channels", "params", "macs")),
            ("scope", self.scope, ("local", "global", "isomorphic")),
            ("attention", self.attention, ("heads", "head_dim")),
        ):
            if chosen not in known:
                raise UsageError(f"{option} must be one of {', '.join(known)}, got {chosen!r}")
        if isinstance(self.importance, str) and self.importance not in IMPORTANCES:
            near = difflib.get_close_matches(self.importance, IMPORTANCES, n=1, cutoff=0.0)[0]
            raise UsageError(
                f"there is no importance {self.importance!r}; did you mean {near!r}? There are {', '.join(IMPORTANCES)}"
            )

    def calibration_reads(self) -> int:
        """See :meth:`Pass.calibration_reads`."""
        return int(self.reconstruct) + int(self._importance().needs_data)

    def requires(self, context: PassContext) -> None:
        """See :meth:`Pass.requires`: some importances need calibration data, and so does ``reconstruct``."""
        if self.reconstruct and context.batches is None:
            raise PreconditionError(
                f"{self.name}: reconstruct=True fits weights to data; pass `calibration`, a few batches of inputs"
            )
        self._importance().requires(context)

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`: one site for each node that has to change."""
        assert context.example is not None, "declared in needs"
        args, kwargs = tuple(context.example.args), dict(context.example.kwargs)
        groups = channel_groups(context.gm, args, kwargs, attention=self.attention)
        chosen = self._chosen(groups)
        score = self._importance().scorer(context, dataclasses.replace(groups, groups=tuple(chosen)))
        selection = Selection([self._candidate(g, score(g).numpy()) for g in chosen])
        counts = self._counts(context, groups, selection)
        surgery = Surgery(context.gm, groups, selection.kept(counts, groups.classes))
        for node in surgery.nodes():
            yield Site(node, surgery)
        for frozen in groups.frozen:
            yield Refusal(frozen.node, f"{frozen.channels} channels stay: {frozen.reason}")
        for candidate in selection.floored(counts):
            group = candidate.group
            yield Refusal(group.node, f"no more of the channels of {group.name!r} go: min_channels={self.min_channels}")
        if self.reconstruct:
            assert context.batches is not None, "asked for in requires()"
            yield from Reconstruction(context.gm, context.batches, surgery).sites()

    def rewrite(self, site: Site) -> Mapping[str, Any] | None:
        """See :meth:`Pass.rewrite`."""
        work: Surgery | Reconstruction = site.data
        return work.operate(site.node)

    # ------------------------------------------------------------------------------------------------- for a search
    def knobs(self, context: PassContext) -> Iterator[Knob]:
        """See :meth:`Pass.knobs`: a ratio for each group, under the first layer that makes its channels."""
        assert context.example is not None, "declared in needs"
        args, kwargs = tuple(context.example.args), dict(context.example.kwargs)
        groups = self._chosen(channel_groups(context.gm, args, kwargs, attention=self.attention))
        for layer in dict.fromkeys(next(iter(g.producers)) for g in groups if g.channels > self.min_channels):
            yield Knob(layer, "ratio", _RATIOS)

    def turned(self, settings: Mapping[str, float]) -> PruneChannels:
        """See :meth:`Pass.turned`."""
        ratios = {glob.escape(layer): float(ratio) for layer, ratio in settings.items()}
        return dataclasses.replace(self, ratio=0.0, measure="channels", per_layer=ratios)

    # ------------------------------------------------------------------------------------------------- choices
    def _chosen(self, groups: ChannelGroups) -> list[Group]:
        makers = {path for g in groups.groups for path in g.producers} | {f.module for f in groups.frozen}
        check_patterns_match((*self.exclude, *self.only, *self.per_layer), makers)
        return [
            g for g in groups.groups
            if not _matches(g, self.exclude) and (not self.only or _matches(g, self.only))
        ]  # fmt: skip

    def _importance(self) -> Importance:
        return IMPORTANCES[self.importance]() if isinstance(self.importance, str) else self.importance

    def _candidate(self, group: Group, scores: np.ndarray) -> Candidate:
        order = np.argsort(scores, kind="stable")
        fixed = next((r for pattern, r in self.per_layer.items() if _matches(group, [pattern])), None)
        width = max((int((m.units >= 0).sum()) // group.channels for m in group.members if m.produces), default=1)
        step = self.round_to // np.gcd(self.round_to, max(width, 1))
        return Candidate(group, order, scores[order], self._cluster(group), fixed, self.min_channels, int(step))

    def _cluster(self, group: Group) -> str:
        if self.scope == "global":
            return ""
        if self.scope == "local":
            return f"{group.name} {group.classes[0]}"  # a layer may make channels of several groups
        return str(sorted((m.binding.tensor.dim(), m.binding.dim, m.produces) for m in group.members))

    def _counts(self, context: PassContext, groups: ChannelGroups, selection: Selection) -> list[int]:
        if self.measure == "channels":
            return selection.counts(self.ratio)
        assert context.example is not None
        budget = Budget(groups, cost(context.gm, context.example.args, context.example.kwargs))
        size = budget.parameters if self.measure == "params" else budget.macs

        what = "parameters" if self.measure == "params" else "MACs"
        return reach(selection, self.ratio, lambda counts: size(selection.kept(counts, groups.classes)), what)


def _matches(group: Group, patterns: Any) -> bool:
    return any(matches_path(path, pattern) for path in group.producers for pattern in patterns)
