"""Where a functional call's parameters live, and how a module takes their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxcompress import editing

__all__ = ["Layers", "TrainingUse", "fill", "linear"]


@dataclasses.dataclass(frozen=True)
class TrainingUse:
    """What a recording knows of one functional call.

    Attributes:
        rank: number of dimensions of the first tensor argument.
        follows: whether the call does by the training flag of its module what it does.
        training: that flag, when it was recorded.
        probability: of dropping, in training mode.
        mask_rank: number of dimensions of ``attn_mask``, 0 without one.
        float_masks: whether all masks are of floating point.
    """

    rank: int
    follows: bool
    training: bool = False
    probability: float = 0.0
    mask_rank: int = 0
    float_masks: bool = True


class Layers:
    """Puts modules at the paths of the parameters they take over."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._made: dict[Any, str] = {}
        self._called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}

    def parameter(self, value: Any) -> nn.Parameter | None:
        """The parameter that a ``get_attr`` node reads, else ``None``."""
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        found = editing.get_attribute(self.gm, str(value.target))
        return found if isinstance(found, nn.Parameter) else None

    def parameters(self, *values: Any) -> bool:
        """Whether every one of ``values`` is ``None`` or reads a parameter."""
        return all(v is None or self.parameter(v) is not None for v in values)

    def tensor(self, value: Any) -> torch.Tensor | None:
        """What a ``get_attr`` node reads, parameter or buffer."""
        return None if value is None else editing.get_attribute(self.gm, str(value.target))

    def read_once(self, node: fx.Node) -> bool:
        """Whether the parameter behind ``node`` is read nowhere else, neither by name nor by a called module."""
        target = str(node.target)
        owner = target.rpartition(".")[0]
        parts = owner.split(".")
        inside = any(".".join(parts[: i + 1]) in self._called for i in range(len(parts)))
        return len(node.users) == 1 and not inside

    def put(self, kind: str, sources: Mapping[str, Any], module: nn.Module, key: Any = None) -> str:
        """The path of ``module``, whose attributes named in ``sources`` are what those ``get_attr`` nodes read.

        Args:
            kind: name below the owner, used where the owner's own path will not do.
            sources: attribute of the new module -> ``get_attr`` node or ``None``.
            module: the new module, parameters in place.
            key: calls with equal keys (and equal sources) share one module.
        """
        targets = {name: str(node.target) for name, node in sources.items() if node is not None}
        identity = (type(module), tuple(sorted(targets.items())), key)
        if identity in self._made:
            return self._made[identity]
        owners = {t.rpartition(".")[0] for t in targets.values()}
        owner = min(owners, key=len) if owners else ""
        bare = bool(owner) and type(self.gm.get_submodule(owner)) is nn.Module
        if bare and len(owners) == 1 and self._at_home(owner, targets):
            path = owner
            self._move_children(owner)
            editing.set_attribute(self.gm, path, module)
        else:
            joint = "." if bare else "_"  # nothing is put inside a real layer
            path = editing.add_module(self.gm, f"{owner}{joint}{kind}" if owner else kind, module)
        self._made[identity] = path
        self._called.add(path)
        return path

    def _at_home(self, owner: str, targets: Mapping[str, str]) -> bool:
        """Whether the container ``owner`` holds the tensors of the new module, under its names, and no others."""
        container = self.gm.get_submodule(owner)
        held = {name for name, _ in [*container.named_parameters(), *container.named_buffers()]}
        return all(t == f"{owner}.{n}" for n, t in targets.items()) and held == set(targets)

    def _move_children(self, owner: str) -> None:
        """Modules without tensors that the graph calls below ``owner`` (an activation inside a norm) move beside it,
        since a layer that has others inside could not be replaced."""
        container = self.gm.get_submodule(owner)
        for name, child in list(container.named_children()):
            path = editing.add_module(self.gm, f"{owner}_{name}", child)
            for node in self.gm.graph.nodes:
                if node.op == "call_module" and f"{node.target}.".startswith(f"{owner}.{name}."):
                    node.target = path + str(node.target)[len(f"{owner}.{name}") :]
                    self._called.add(str(node.target))


def fill(module: nn.Module, like: torch.Tensor, training: bool, **tensors: torch.Tensor | None) -> nn.Module:
    """Give ``module``, made on the meta device, its tensors: parameters as they are, ``None`` for none."""
    for name, value in tensors.items():
        if name in module._buffers:
            module._buffers[name] = value
        else:
            module.register_parameter(name, value)  # type: ignore[arg-type]
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=like.device)
    module.train(training)
    return module


def linear(layers: Layers, weight: Any, bias: Any, tensor: nn.Parameter, kind: str = "linear") -> str:
    """The path of an ``nn.Linear`` with this weight (out, in) and bias."""
    module = nn.Linear(tensor.shape[1], tensor.shape[0], bias=bias is not None, device="meta", dtype=tensor.dtype)
    fill(module, tensor, layers.gm.training, weight=tensor, bias=layers.parameter(bias))
    return layers.put(kind, {"weight": weight, "bias": bias}, module)
