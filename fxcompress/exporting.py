"""Ways out: a graph as a program of ``torch.export`` or an ONNX file, for runtimes that know nothing of this package.

A graph module is an ordinary model to ``torch.compile`` and ``torch.export``. What these functions add is a batch size
that stays free, and for ONNX the operators that quantised graphs are made of (``onnx_operators.py``). Modules that hold
packed weights (those of ``lower-int8``) show while they are exported the real arithmetic that they stand for, so that
what leaves is the quantised graph again.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.analysis.outputs import tensor_leaves
from fxcompress.checks import check_model
from fxcompress.errors import FxCompressError, UsageError
from fxcompress.examples import as_example, check_fits, evaluate, on_larger_batch
from fxcompress.pass_base import Example

__all__ = ["OPSET", "export", "export_onnx"]

OPSET = 21
"""The first version of ONNX whose ``QuantizeLinear`` and ``DequantizeLinear`` know 16 bits and groups of weights."""


def export(
    gm: fx.GraphModule, example_inputs: Any = None, *, example_kwargs: Mapping[str, Any] | None = None
) -> torch.export.ExportedProgram:
    """``gm`` as a program that PyTorch runs by itself, with neither this package nor the model's source.

    The first dimension of all inputs that are as long there as the first one, the batch size, stays free where the
    model allows it. ``torch.export`` takes sizes 0 and 1 for constants, so a batch of one is exported at two. Whoever
    loads a quantised program needs ``import torch.ao.quantization.fx._decomposed``, which registers its operators.

    Args:
        gm: a graph that :func:`fxcompress.compile` returned; it is exported in the mode that it is in.
        example_inputs: a tensor, or a tuple or list of positional arguments.
        example_kwargs: keyword arguments.

    Raises:
        UsageError: ``gm`` is no graph module, or the inputs do not fit it.
        FxCompressError: ``torch.export`` refuses the graph; its own error is the cause.
    """
    gm, example = _checked(gm, example_inputs, example_kwargs)
    return _exported(gm, example)


def export_onnx(
    gm: fx.GraphModule,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    opset: int = OPSET,
) -> Path:
    """Write ``gm`` to an ONNX file; the batch size stays free as in :func:`export`.

    Integer weights are stored as the integers that they are, and what is quantised is written with ``QuantizeLinear``
    and ``DequantizeLinear``, which runtimes turn into integer kernels. Needs the extra ``onnx``
    (``pip install "fxcompress[onnx]"``).

    Args:
        gm: see :func:`export`. The inputs of the file are the tensors in those of ``gm``, in order.
        path: of the file. Weights of more than 2 GB, which one file cannot hold, go to ``<path>.data`` beside it.
        example_inputs: see :func:`export`.
        example_kwargs: see :func:`export`.
        opset: the version of ONNX's operators, 21 or later.

    Returns:
        The path.

    Raises:
        UsageError: as in :func:`export`; the extra is missing, the version too old, or the file cannot be written.
        FxCompressError: an operator has no translation; the message names it.
    """
    if opset < OPSET:
        raise UsageError(f"opset is at least {OPSET}, the first with 16-bit and grouped integers; got {opset}")
    try:
        from fxcompress.onnx_cleanup import clean_up
        from fxcompress.onnx_operators import translations
    except ImportError as error:
        raise UsageError(f"ONNX needs packages that are not here ({error}); pip install 'fxcompress[onnx]'") from error
    gm, example = _checked(gm, example_inputs, example_kwargs)
    program = _exported(gm, example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch.onnx
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                custom_translation_table=translations(),
                verbose=False,
            )
    except Exception as error:  # of many kinds, none of them public
        raise FxCompressError(f"torch.onnx cannot write this graph: {_reason(error)}") from error
    assert converted is not None
    clean_up(converted.model)
    try:
        converted.save(os.fspath(path))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}") from error
    return Path(path)


def _checked(gm: Any, inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[fx.GraphModule, Example]:
    if not isinstance(gm, fx.GraphModule):
        raise UsageError(
            f"export takes a graph that fxcompress.compile or fxcompress.trace returned, not {type(gm).__name__}"
        )
    check_model(gm)
    example = as_example(inputs, kwargs) or Example()
    check_fits(gm, example)
    return gm, example


def _exported(gm: fx.GraphModule, example: Example) -> torch.export.ExportedProgram:
    try:
        larger = _two_or_more(gm, example)
        if larger is None:
            return torch.export.export(gm, example.args, dict(example.kwargs))
        free = torch.export.ShapesCollection()
        for tensor in _batched(larger):
            free[tensor] = {0: torch.export.Dim.AUTO}
        shapes = free.dynamic_shapes(gm, larger.args, dict(larger.kwargs))
        return torch.export.export(gm, larger.args, dict(larger.kwargs), dynamic_shapes=shapes)
    except FxCompressError:
        raise
    except Exception as error:  # of many kinds
        raise FxCompressError(f"torch.export refuses this graph: {_reason(error)}") from error


def _batched(example: Example) -> Iterator[torch.Tensor]:
    """The inputs with a batch dimension: those as long in the first one as the first of them."""
    # ShapesCollection knows tensors by identity, and only those that pytree finds.
    leaves = pytree.tree_leaves((example.args, dict(example.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
    return (tensor for tensor in tensors if tensor.shape[0] == tensors[0].shape[0])


def _two_or_more(gm: fx.GraphModule, example: Example) -> Example | None:
    """``example`` at a batch size above 1; ``None`` if it has none or ``gm`` fails there."""
    sizes = {tensor.shape[0] for _, tensor in tensor_leaves((example.args, dict(example.kwargs))) if tensor.dim()}
    if sizes and min(sizes) > 1:
        return example

    def run_on(larger: Example) -> Example:
        evaluate(gm, larger)
        return larger

    return on_larger_batch(gm, example, run_on)


def _reason(error: BaseException) -> str:
    """What went wrong in the first place, in a line or two."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
