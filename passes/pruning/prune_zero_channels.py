"""Remove channels that make no difference (guarantee EXACT).

Three kinds of channels do not matter, all provable from the parameters alone:

* unread: every weight by which a layer reads the channel is zero, and nothing else uses it up;
* zero: what makes the channel is zero (a row of a weight with its bias, the scale and shift of a batch norm; a ReLU
  that never fires, as bounds of what comes in show), and so is what is made of it, wherever it is used up;
* constant: what makes the channel leaves a number (a bias behind a row of zeros, the shift of a batch norm whose scale
  is zero), the same at every place. The layers that read it take that number, times their weights, into their bias.

Channels hang together as :func:`fxcompress.analysis.channels.channel_groups` says. Groups in which removing a channel
is not the same as setting it to zero (something takes a mean or a norm over it) are left alone, and every group keeps a
channel. Nothing is concluded from activations: constants are worked out from parameters, in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress.analysis.channels import ChannelGroups, channel_groups
from fxcompress.matching import name_of_call
from fxcompress.modules import ScaledDotProductAttention
from fxcompress.pass_base import Guarantee, Need, Pass, PassContext, Refusal, Site, Stage
from fxcompress.passes.pruning.known_running import constants_of
from fxcompress.passes.pruning.needless import Fold, Needless, find_needless
from fxcompress.passes.pruning.surgery import Surgery

__all__ = ["PruneZeroChannels"]

_MULTIPLY = frozenset("matmul bmm einsum scaled_dot_product_attention".split())


@dataclasses.dataclass(frozen=True)
class PruneZeroChannels(Pass):
    """Remove channels that are never read, always zero, or constant.

    A layer that takes constants in keeps its path and the names of its parameters; a bias that was not there becomes
    ``<path>.bias``, trainable if the weight is.

    Detail of a site: sizes before and after; where channels are made ``{"unread": n, "zero": n, "constant": n}``, as
    far as there are any; where constants are taken in ``{"taken_in": n}``.
    """

    name: ClassVar[str] = "prune-zero-channels"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EXAMPLE_INPUTS})
    repeat: ClassVar[bool] = True
    before: ClassVar[frozenset[str]] = frozenset({"fake-quantize", "quantize", "lower-int8"})
    stage: ClassVar[Stage] = Stage.PRUNE

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        """See :meth:`Pass.sites`: one site for each node that has to change. Heads of attentions first, then parts of
        all heads."""
        assert context.example is not None, "declared in needs"
        args, kwargs = tuple(context.example.args), dict(context.example.kwargs)
        calls = constants_of(context.gm, args, kwargs).calls
        refusals: dict[fx.Node, str] = {}
        for attention in ("heads", "head_dim") if _attends(context.gm) else ("heads",):
            groups = channel_groups(context.gm, args, kwargs, attention=attention)
            needless = find_needless(context.gm, groups, calls, context.aliasing)
            refusals = {**needless.refusals, **refusals}
            if needless.removed.any():
                yield from _sites(context, groups, needless, refusals)
                return
        yield from (Refusal(node, refusals[node]) for node in context.gm.graph.nodes if node in refusals)

    def rewrite(self, site: Site) -> Mapping[str, Any] | None:
        """See :meth:`Pass.rewrite`."""
        job: _Job = site.data
        said = job.surgery.operate(site.node)
        if job.fold is not None:
            layer = job.surgery.gm.get_submodule(str(site.node.target))
            _shift(layer, job.fold.shift[job.stays])
        return said


@dataclasses.dataclass(frozen=True)
class _Job:
    """A site: the surgery that is done there and, for a layer that takes constants in, these, and which of its outputs
    stay."""

    surgery: Surgery
    fold: Fold | None = None
    stays: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0))


def _sites(
    context: PassContext, groups: ChannelGroups, needless: Needless, refusals: Mapping[fx.Node, str]
) -> Iterator[Site | Refusal]:
    surgery = Surgery(context.gm, groups, ~needless.removed)
    counts = _counts(context.gm, groups, needless)
    operated = set(surgery.nodes())
    for node in context.gm.graph.nodes:
        if node in operated:
            module = context.module(node)
            detail = dict(counts.get(module, {})) if module is not None else {}
            fold = needless.folds.get(module) if module is not None else None
            job = _Job(surgery)
            if fold is not None and module is not None:
                detail["taken_in"] = fold.channels
                out, weight = surgery.out(node), module.weight
                assert isinstance(weight, torch.Tensor), "of linear layers and convolutions"
                dim = len(out.shape) - 1 if isinstance(module, nn.Linear) else len(out.shape) - weight.dim() + 1
                job = _Job(surgery, fold, torch.from_numpy(surgery.stays(out, dim)))
            yield Site(node, job, detail)
        elif node in refusals:
            yield Refusal(node, refusals[node])


def _counts(gm: fx.GraphModule, groups: ChannelGroups, needless: Needless) -> dict[nn.Module, dict[str, int]]:
    """For the first layer that makes a group, how many channels go, and why."""
    counts: dict[nn.Module, dict[str, int]] = {}
    for group in groups.groups:
        gone = group.classes[needless.removed[group.classes]]
        constant, zero = needless.constant[gone], needless.zero[gone] & ~needless.constant[gone]
        kinds = {"unread": ~constant & ~zero, "zero": zero, "constant": constant}
        found = counts.setdefault(gm.get_submodule(group.name), {}) if group.producers else {}
        for kind, of in kinds.items():
            if of.any():
                found[kind] = found.get(kind, 0) + int(of.sum())
    return counts


def _shift(layer: nn.Module, by: torch.Tensor) -> None:
    """Add ``by`` to the bias, which there may not have been."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor), "of linear layers and convolutions"
    # on the CPU, since not every accelerator has float64
    old = bias.detach().to("cpu", torch.float64) if isinstance(bias, torch.Tensor) else 0.0
    new = (old + by).to(weight.device, weight.dtype)
    asks = bias.requires_grad if isinstance(bias, torch.Tensor) else weight.requires_grad
    layer.bias = nn.Parameter(new, requires_grad=asks)


def _attends(gm: fx.GraphModule) -> bool:
    """Whether activations may be multiplied, so that it matters which part of heads goes."""
    for node in gm.graph.nodes:
        if name_of_call(node) in _MULTIPLY:
            return True
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), ScaledDotProductAttention):
            return True
    return False
