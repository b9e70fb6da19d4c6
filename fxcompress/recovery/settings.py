"""How to train: the options of a run, checked, and in words that tell one run from another."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from fxcompress.errors import UsageError
from fxcompress.recovery.gradual import Gradual
from fxcompress.recovery.schedules import Schedule, as_schedule

__all__ = ["Settings", "described", "digest"]

_RATES = {"sgd": 0.01, "adamw": 1e-4}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of :func:`fxcompress.recover` that say how it trains; see there."""

    loss_fn: Callable[[Any, Any], torch.Tensor] | None
    epochs: int
    steps: int | None
    optimizer: str | Callable[[Iterable[nn.Parameter]], Optimizer]
    lr: float | None
    schedule: str | Schedule
    precision: str
    batch_norm: str
    max_norm: float | None
    seed: int
    gradual: Gradual | None
    checkpoint_every: int

    def __post_init__(self) -> None:
        for option, value in (
            ("epochs", self.epochs),
            ("steps", self.steps),
            ("checkpoint_every", self.checkpoint_every),
        ):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{option} must be a whole number, at least 1, got {value!r}")
        for option, chosen, known in (
            ("precision", self.precision, ("fp32", "bf16", "fp16")),
            ("batch_norm", self.batch_norm, ("train", "frozen")),
        ):
            if chosen not in known:
                raise UsageError(f"{option} must be one of {', '.join(known)}, got {chosen!r}")
        if not callable(self.optimizer) and self.optimizer not in _RATES:
            raise UsageError(
                f"optimizer must be one of {', '.join(_RATES)}, or a function that makes one of parameters, got "
                f"{self.optimizer!r}"
            )
        if callable(self.optimizer) and self.lr is not None:
            raise UsageError("`lr` is for optimizers given by name; a function makes its optimizer with its own")
        for option, number in (("lr", self.lr), ("max_norm", self.max_norm)):
            if number is not None and not number > 0:
                raise UsageError(f"{option} must be above 0, got {number!r}")
        if self.loss_fn is not None and not callable(self.loss_fn):
            raise UsageError(f"`loss_fn` is a function of (output, labels), not {type(self.loss_fn).__name__}")
        if self.gradual is not None and not isinstance(self.gradual, Gradual):
            raise UsageError(f"`gradual` is an fxcompress.Gradual, not {type(self.gradual).__name__}")
        if self.gradual is not None and self.steps is not None and self.steps < self.gradual.steps:
            raise UsageError(
                f"{self.steps} steps are too few for {self.gradual.steps} compressions with training between"
            )
        as_schedule(self.schedule)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """The optimizer of ``parameters``.

        Raises:
            UsageError: the caller's function makes something else, or there is nothing to train.
        """
        if not parameters:
            raise UsageError("there is nothing to train: no parameter has requires_grad=True")
        if callable(self.optimizer):
            made = self.optimizer(parameters)
            if not isinstance(made, Optimizer):
                raise UsageError(f"`optimizer` must make a torch.optim.Optimizer, it made a {type(made).__name__}")
            return made
        rate = _RATES[self.optimizer] if self.lr is None else self.lr
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=rate)
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9)

    def in_words(self, gm: fx.GraphModule, distillation: Mapping[str, Any], length: int | None) -> dict[str, str]:
        """What the result depends on. How many processes there are is not in it, nor how often something is saved."""
        left_out = ("checkpoint_every",)
        words = {f.name: described(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in left_out}
        words |= {name: described(value) for name, value in distillation.items()}
        return {**words, "model": described(gm), "batches an epoch": str(length)}


def described(value: Any) -> str:
    """``value`` in words that are the same in another process, and differ for what is known to differ."""
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {digest(value)}"
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        ).hexdigest()[:12]
    if isinstance(value, functools.partial):
        return f"partial({described(value.func)}, {described(value.args)}, {described(value.keywords)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{f.name}={described(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__qualname__}({', '.join(fields)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{described(k)}: {described(v)}' for k, v in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(described(item) for item in value)}]"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (str, int, float, type(None))):
        return repr(value)
    return type(value).__qualname__


def digest(module: nn.Module) -> str:
    """A short name for a module's structure and values."""
    text = hashlib.sha256()
    if isinstance(module, fx.GraphModule):
        text.update("\n".join(str(node.format_node()) for node in module.graph.nodes).encode())
    text.update(
        "\n".join(
            f"{path} {type(child).__qualname__} {child.extra_repr()}" for path, child in module.named_modules()
        ).encode()
    )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        flag = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        text.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {flag}".encode())
        if tensor.layout is torch.strided and not tensor.is_quantized:
            text.update(described(tensor.detach()).encode())
    return text.hexdigest()[:16]
