"""What a model must be before anything is done with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxcompress.errors import PreconditionError, UsageError

__all__ = ["check_model", "non_finite_state"]


def check_model(model: Any) -> nn.Module:
    """Refuse what cannot be compressed, by name of the parameter that shows it.

    Returns:
        The model; what ``torch.compile`` wrapped is unwrapped.

    Raises:
        UsageError: ``model`` is no ``nn.Module``, or one whose Python code is out of reach.
        PreconditionError: a parameter or buffer has no values yet (meta device, lazy modules).
    """
    if not isinstance(model, nn.Module):
        hint = "; call it to make one" if isinstance(model, type) and issubclass(model, nn.Module) else ""
        what = f"the class {model.__qualname__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UsageError(f"the model must be a torch.nn.Module, found {what}{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("the model is TorchScript, whose Python code is gone; pass the nn.Module it was made from")
    for name, tensor in _state(model):
        if is_lazy(tensor):
            raise PreconditionError(
                f"{name!r} is uninitialised (a lazy module); run the model once on real inputs before compressing it"
            )
        if tensor.is_meta:
            raise PreconditionError(
                f"{name!r} is on the meta device and has no values; load the weights first "
                "(model.to_empty(device='cpu'), then load_state_dict)"
            )
    original = getattr(model, "_orig_mod", None)
    return check_model(original) if isinstance(original, nn.Module) else model


def _state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def non_finite_state(model: nn.Module) -> list[str]:
    """In words, every parameter with a NaN or infinity in it and every buffer with a NaN.

    An infinite buffer is left out: attention masks are made of minus infinity.
    """
    found = []
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in _state(model):
        if tensor.layout != torch.strided or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = tensor.detach()
        values = values.float() if values.element_size() == 1 else values  # float8 has no isinf
        nans = int(torch.isnan(values).sum())
        infinities = int(torch.isinf(values).sum()) if name in parameters else 0
        counts = [f"{n} {what}" for n, what in ((nans, "NaN"), (infinities, "infinite")) if n]
        if counts:
            kind = "parameter" if name in parameters else "buffer"
            found.append(f"{kind} {name!r} has {' and '.join(counts)} of {tensor.numel()} values")
    return found
