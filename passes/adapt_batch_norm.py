"""Estimate the running statistics of every batch norm anew from calibration data.

After compression the activations no longer have the mean and variance that batch norm remembers; measuring them again
brings back much of the accuracy without training (Li et al. 2020, EagleEye, arXiv 2007.02491; for averaged weights
Izmailov et al. 2018, arXiv 1803.05407). Statistics depend on each other: what a batch norm sees was normalised by those
before it, so one run with the old statistics would measure all but the first wrongly.

* ``mode="sequential"`` (the default) gives each batch norm the mean and variance of what it sees once all before it
  have their new ones, which is what the network computes in evaluation mode. It takes one sweep, node by node with all
  batches abreast, so the activations of all calibration data that are alive at one node must fit in memory.
* ``mode="batch"`` runs batch after batch with batch norm in training mode and averages the batches' statistics, as
  ``update_bn`` does. Memory is that of one batch; the result depends on the batch size, and the variance misses what
  the means of the batches differ by.

Pooled over batches A and B of n_A and n_B values a channel (Chan, Golub & LeVeque 1979), with M2 the sum of squared
deviations and d = mean_B - mean_A::

    n = n_A + n_B        mean = mean_A + d n_B / n        M2 = M2_A + M2_B + d^2 n_A n_B / n

in float64, and the variance is M2 / (n - 1), unbiased, which is what PyTorch keeps. Guarantee RETRAIN: outputs are
meant to change, and the change is only reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxcompress import editing, matching
from fxcompress.analysis.inputs import bind_inputs
from fxcompress.analysis.running import GraphRunner, SteppedRun, copied, undisturbed
from fxcompress.calibration import check_batch, checked
from fxcompress.errors import PreconditionError, UsageError
from fxcompress.pass_base import Example, Guarantee, Need, Pass, PassContext, Refusal, Site, Stage

__all__ = ["AdaptBatchNorm", "ChannelMoments"]

_MODES = ("sequential", "batch")


class ChannelMoments:
    """Mean and variance per channel of a stream of ``(N, C, ...)`` tensors; the formulas of the module docstring.

    Attributes:
        count: values seen a channel.
        mean: ``(C,)``, float64.
        m2: ``(C,)``, float64, the sum of squared deviations from the mean.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros((), dtype=torch.float64)
        self.m2: Tensor = torch.zeros((), dtype=torch.float64)

    def update(self, value: Tensor) -> None:
        """Take in one tensor."""
        near = value.cpu() if value.device.type == "mps" else value  # which has no float64
        channels = near.detach().transpose(0, 1).flatten(1).double()
        n = channels.shape[1]
        if n == 0:
            return
        mean = channels.mean(1)
        m2 = (channels - mean[:, None]).square().sum(1)
        self._add(n, mean, m2)

    def merge(self, other: ChannelMoments) -> None:
        """Take in what ``other`` saw."""
        if other.count:
            self._add(other.count, other.mean, other.m2)

    def _add(self, n: int, mean: Tensor, m2: Tensor) -> None:
        d, total = mean - self.mean.to(mean.device), self.count + n
        self.m2 = self.m2.to(mean.device) + m2 + d.square() * (self.count * n / total)
        self.mean = self.mean.to(mean.device) + d * (n / total)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, each ``(C,)``; the variance of fewer than two values is NaN or infinite."""
        return self.mean, self.m2 / (self.count - 1) if self.count > 1 else torch.full_like(self.m2, torch.nan)


@dataclasses.dataclass(frozen=True)
class _Statistics:
    norm: _BatchNorm
    mean: Tensor
    var: Tensor
    batches: int


@dataclasses.dataclass(frozen=True)
class AdaptBatchNorm(Pass):
    """Replace running means and variances by those of the calibration data; see the module docstring for the modes.

    Detail of a site: ``{"batch_norm": path, "mean_shift": largest move of a channel's mean in old standard deviations,
    "std_ratio_min" and "std_ratio_max": new over old standard deviation}``.

    Args:
        mode: ``"sequential"``: each batch norm gets the statistics of what it sees once all before it have their new
            ones; or ``"batch"``: the average over batches in training mode, in the memory of one batch.
    """

    name: ClassVar[str] = "adapt-batch-norm"
    guarantee: ClassVar[Guarantee] = Guarantee.RETRAIN
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CALIBRATION})
    before: ClassVar[frozenset[str]] = frozenset({"fold-batch-norm"})
    stage: ClassVar[Stage] = Stage.ADAPT

    mode: str = "sequential"

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise UsageError(f"adapt-batch-norm: mode is {' or '.join(map(repr, _MODES))}, not {self.mode!r}")

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """One site for each batch norm module that keeps statistics.

        Raises:
            PreconditionError: there is no calibration data.
            UsageError: a batch of it does not fit the graph.
        """
        if context.batches is None:
            raise PreconditionError("adapt-batch-norm estimates statistics from data; pass `calibration`")
        found = dict(self._candidates(context))
        wanted = {node: norm for node, norm in found.items() if isinstance(norm, _BatchNorm)}
        measure = _in_sequence if self.mode == "sequential" else _by_batch
        statistics = measure(context.gm, context.batches, wanted) if wanted else {}
        for node, norm in found.items():
            if isinstance(norm, str):
                yield Refusal(node, norm)
            elif reason := _obstacle(statistics[node]):
                yield Refusal(node, reason)
            else:
                yield Site(node, statistics[node], _detail(node, statistics[node]))

    def rewrite(self, site: Site) -> None:
        """Put the new statistics in place of the old tensors, which are left alone."""
        _set_statistics(site.data.norm, site.data)

    def _candidates(self, context: PassContext) -> Iterator[tuple[fx.Node, _BatchNorm | str]]:
        """The first call of each batch norm, or a node that is refused and why."""
        for node in context.gm.graph.nodes:
            module = context.module(node)
            if matching.is_call(node, ("batch_norm",)):
                yield node, "batch norm called as a function; tracing with example inputs makes it a module"
            elif isinstance(module, _BatchNorm):
                calls = context.aliasing.calls(module)
                if node is calls[0]:
                    yield node, self._refusal(module, len(calls)) or module
            elif module is not None and any(isinstance(m, _BatchNorm) for m in module.modules()):
                yield node, f"{type(module).__name__} is called whole and keeps its batch norms out of the graph"

    def _refusal(self, norm: _BatchNorm, calls: int) -> str | None:
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            return "it keeps no running statistics (track_running_stats=False)"
        if override := matching.override_of(norm):
            return f"it {override}"
        if calls > 1 and self.mode == "sequential":
            return (
                f"it is called {calls} times, so what it sees depends on the statistics it is to get; "
                "mode='batch' averages over the calls"
            )
        return None


def _obstacle(new: _Statistics) -> str | None:
    if bool(torch.isfinite(new.mean).all() and torch.isfinite(new.var).all()):
        return None
    return "its statistics on the calibration data are not finite (NaN or infinity in, or fewer than two values)"


def _detail(node: fx.Node, new: _Statistics) -> Mapping[str, Any]:
    norm = new.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    old_mean, mean = norm.running_mean.cpu().double(), new.mean.cpu().double()
    old_std, std = ((v.cpu().double() + norm.eps).sqrt() for v in (norm.running_var, new.var))
    return {
        "batch_norm": str(node.target),
        "mean_shift": float(((mean - old_mean).abs() / old_std).max()),
        "std_ratio_min": float((std / old_std).min()),
        "std_ratio_max": float((std / old_std).max()),
    }


def _set_statistics(norm: _BatchNorm, new: _Statistics) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.running_mean = new.mean.to(norm.running_mean)
    norm.running_var = new.var.to(norm.running_var)
    # momentum=None weighs the next batch by it
    norm.num_batches_tracked = torch.full_like(norm.num_batches_tracked, new.batches)


def _in_sequence(
    gm: fx.GraphModule, batches: Iterable[Example], wanted: Mapping[fx.Node, _BatchNorm]
) -> dict[fx.Node, _Statistics]:
    """Statistics of each node's input once all batch norms before it have theirs; one sweep over the graph."""
    twin = editing.private_copy(gm).eval()
    data = checked(gm, batches)
    found: dict[fx.Node, _Statistics] = {}
    with torch.no_grad(), undisturbed(twin, [(batch.args, dict(batch.kwargs)) for batch in data]):
        runs = [SteppedRun(twin, batch.args, dict(batch.kwargs)) for batch in data]
        for node, twin_node in zip(list(gm.graph.nodes), list(twin.graph.nodes), strict=True):
            if node in wanted:
                source = matching.tensor_input(twin_node)
                assert source is not None, "batch norm normalises a tensor"
                moments = ChannelMoments()
                for run in runs:
                    moments.update(run.env[source])
                found[node] = _Statistics(wanted[node], *moments.result(), batches=len(data))
                norm = twin.get_submodule(str(node.target))
                assert isinstance(norm, _BatchNorm)
                if _obstacle(found[node]) is None:
                    _set_statistics(norm, found[node])
            for run in runs:
                run.step(twin_node)
    return found


def _by_batch(
    gm: fx.GraphModule, batches: Iterable[Example], wanted: Mapping[fx.Node, _BatchNorm]
) -> dict[fx.Node, _Statistics]:
    """Averages of the batches' own statistics, every batch norm normalising by the batch; one run a batch."""
    twin = editing.private_copy(gm).eval()
    norms: dict[fx.Node, _BatchNorm] = {}
    for node in wanted:
        norm = twin.get_submodule(str(node.target))
        assert isinstance(norm, _BatchNorm)
        norm.train()
        norm.track_running_stats, norm.momentum = True, None  # a plain average
        norm.reset_running_stats()
        norms[node] = norm
    found: dict[fx.Node, _Statistics] = {}
    count = 0
    with torch.no_grad(), undisturbed(twin):
        for count, batch in enumerate(batches, start=1):
            check_batch(gm, batch, count - 1)
            values = bind_inputs(twin, batch.args, dict(batch.kwargs))
            GraphRunner(twin).run(*copied(values), enable_io_processing=False)
        for node, norm in norms.items():
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, var = norm.running_mean.clone(), norm.running_var.clone()  # undisturbed() will put the old ones back
            found[node] = _Statistics(wanted[node], mean, var, count)
    return found
