import dataclasses
from collections.abc import Iterator

from torch import nn

from fxcompress import Guarantee, Pass, PassContext, Refusal, Site, editing, layers, matching


@dataclasses.dataclass(frozen=True)
class MergeLinear(Pass):
    """Merge linear layers with nothing between them: W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)."""

    name = "merge-linear"
    guarantee = Guarantee.EXACT
    repeat = True  # a merged layer may be merged again

    def sites(self, context: PassContext) -> Iterator[Site | Refusal]:
        found, _ = layers.called_layers(context, (nn.Linear,))  # no hooks, no tied weights, every call known
        by_call = {call: layer for layer in found for call in layer.calls}
        taken = set()
        for node, second in by_call.items():
            first = by_call.get(matching.tensor_input(node))
            if first is None or first in taken or second in taken:
                continue
            a, b = first.layer, second.layer
            if len(first.calls) > 1 or len(second.calls) > 1 or len(first.calls[0].users) > 1:
                yield Refusal(node, "one of the layers, or what is between them, has other readers or calls")
            elif a.in_features * b.out_features > a.weight.numel() + b.weight.numel():
                yield Refusal(node, f"one layer from {a.in_features} to {b.out_features} features would be larger")
            else:
                taken |= {first, second}
                yield Site(node, (first, second), {"first": first.path, "second": second.path})

    def rewrite(self, site: Site) -> None:
        first, second = site.data
        a, b = first.layer, second.layer
        weight = b.weight.detach().double()
        if a.bias is not None:
            bias = weight @ a.bias.double() + (0 if b.bias is None else b.bias.double())
            b.bias = nn.Parameter(bias.detach().to(b.weight.dtype))
        b.weight = nn.Parameter((weight @ a.weight.double()).detach().to(b.weight.dtype))
        b.in_features = a.in_features
        first.calls[0].target = second.path  # where the first was: its input may be written to in between
        editing.replace(site.node, first.calls[0])
