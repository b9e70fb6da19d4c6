"""Layers that mix channels, as readers of channels that may go."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fxcompress.analysis.aliasing import Aliasing
from fxcompress.passes.pruning.known import Along, KnownCall
from fxcompress.passes.pruning.mixing import Mix

__all__ = ["Ids", "Mask", "Reader", "alike", "obstacle_to_bias"]

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """A call of a layer that mixes channels.

    Attributes:
        node: the call.
        module: the layer; ``None`` for a function.
        entering, leaving: the classes of the channels that come in and go out.
        mix: what each output takes of each input; ``None`` if the weights are no constants.
        x: what is sure of what comes in.
        obstacle: why no bias can take a constant in; empty if one can.
    """

    node: fx.Node
    module: nn.Module | None
    entering: Ids
    leaving: Ids
    mix: Mix | None
    x: Along
    obstacle: str

    def uses(self, removed: Mask) -> Mask:
        """Which of the inputs that are ``removed`` have a weight other than zero for an output that is not."""
        going: Mask = removed[self.entering]
        if self.mix is None or not going.any():
            return going
        groups, outputs, inputs = self.mix.weight.shape[:3]
        stays = torch.from_numpy(~removed[self.leaving]).reshape(groups, outputs, 1)
        columns = torch.from_numpy(going).reshape(groups, inputs).any(0).nonzero().flatten()
        used = torch.zeros(groups, inputs, dtype=torch.bool)
        used[:, columns] = ((self.mix.weight[:, :, columns] != 0).any(-1) & stays).any(1)
        going &= used.flatten().numpy()
        return going

    def misses(self, removed: Mask) -> Mask:
        """Which of them it cannot do without."""
        harmless = self.x.zero if self.obstacle else self.x.zero | self.x.sure
        used = self.uses(removed)
        used &= ~harmless.numpy()
        return used

    def takes_in(self, removed: Mask) -> Mask:
        """Which of them are constants that the bias must take in."""
        used = self.uses(removed)
        used &= ~self.x.zero.numpy()
        return used


def alike(readers: list[Reader]) -> list[Reader]:
    """``readers`` with nothing sure of the inputs of a layer that several calls share if these calls differ in it,
    except that they are zero."""
    calls: dict[nn.Module, list[Reader]] = {}
    for reader in readers:
        if reader.module is not None:
            calls.setdefault(reader.module, []).append(reader)
    found = []
    for reader in readers:
        same, x = calls.get(reader.module, [reader]) if reader.module is not None else [reader], reader.x
        if len(same) > 1:
            first = same[0].x.value
            sure = torch.stack([r.x.sure & (r.x.value == first) for r in same]).all(0)
            x = Along(sure, torch.where(sure, first, 0.0), x.zero)
        found.append(dataclasses.replace(reader, x=x))
    return found


def obstacle_to_bias(call: KnownCall, mix: Mix | None, aliasing: Aliasing) -> str:
    """Why the bias of the layer cannot take a constant in; empty if it can."""
    if mix is None:
        return "its weight or bias is no constant"
    module = call.module
    if module is None:
        return "it is called as a function"
    if mix.uneven:
        return mix.uneven
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor), "of linear layers and convolutions"
    if weight.dtype not in _DTYPES:
        return f"its weight has dtype {weight.dtype}"
    if isinstance(bias, torch.Tensor):
        calls = aliasing.calls(module)
        if any(reader not in calls for reader in aliasing.readers(bias)):
            return "its bias is tied or read elsewhere"
    return ""
