"""Any model that runs -> a ``torch.fx.GraphModule``, by recording a run.

``torch.fx.symbolic_trace`` runs a model on stand-ins for tensors and fails where Python looks at a shape or a value.
Here the model runs on real tensors, so Python control flow, dataclasses, caches and decorators just run, and every
torch call is written down (``recording/``). Two runs at two batch sizes, on different values, tell what follows the
sizes; the finished graph is then held against the model at a third size before anyone gets to see it.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxcompress import editing
from fxcompress.analysis.outputs import Comparison, compare
from fxcompress.analysis.running import undisturbed
from fxcompress.canonical import canonicalize
from fxcompress.errors import TraceError, TraceWarning, UsageError
from fxcompress.recording import internals
from fxcompress.recording.alignment import Symbol, align
from fxcompress.recording.constants import fold_constants, follow_device
from fxcompress.recording.inputs import Dimension, Inputs, guard, read_inputs
from fxcompress.recording.retracing import Retracer
from fxcompress.recording.session import DataRead, Session
from fxcompress.recording.structure import Path, leaves
from fxcompress.recording.training import training_uses

__all__ = ["trace"]

_SEED = 0x5EED
_EPS_FACTOR = 8
"""A faithful graph makes the same calls in the same order, so it is equal to the last bit wherever kernels are
deterministic; attention written out adds in another order inside one kernel. 8 eps is 9.5e-7 in float32."""
_FUSED_ENCODER_TOLERANCE = 1e-4
"""Rounding separates the fused encoder from the layers by less than this; zeros at padded positions by far more."""


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    dynamic_batch: bool = True,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None = None,
    opaque: str | Collection[str] = (),
) -> fx.GraphModule:
    """Record ``model`` as a graph that is equal to it, and check that it is.

    The model is copied first and stays as it is. Parameters and buffers keep their names (except those of layers that
    ``canonical.py`` had to give a new place), tied ones stay tied; the graph follows ``train()`` and ``eval()``.

    Args:
        model: any module that runs on the example; a ``GraphModule`` is returned as it is.
        example_inputs: positional arguments of forward, a tuple or list (or one tensor). Without any inputs
            ``torch.fx.symbolic_trace`` is used.
        dynamic_batch: let the graph run at every batch size: dimension 0 of all input tensors whose size there is that
            of the first one. Where the model runs at no other batch size, it warns and fixes the size.
        example_kwargs: keyword arguments of forward.
        dynamic_dims: further free dimensions: argument name -> {dimension: a name}; dimensions of one name go together.
        opaque: paths of modules to keep as one call each, or ``"auto"``: those whose Python looks at tensor data.

    Returns:
        The graph. Inputs at whose sizes it would not be right are refused by it with a ``ValueError``.

    Raises:
        UsageError: no module, or inputs that do not fit the signature.
        TraceError: the model fails on the example (its own error is the cause), looks at tensor data, does other things
            at other batch sizes, or the graph is not equal to it.
    """
    if isinstance(model, fx.GraphModule):
        return model
    model = _checked(model)
    if example_inputs is None and not example_kwargs:
        return _symbolic(model)
    args = _positional(example_inputs)
    work = _private_copy(model)
    given = read_inputs(work, args, example_kwargs or {})
    inputs = given.changed({})
    with _frozen(work):
        reference = _first_run(work, inputs)
        recording = _Recording(work, inputs, opaque)
        gm = recording.graph_module(dynamic_batch, dynamic_dims or {})
        _check(gm, reference, inputs, "on the example inputs")
        recording.check_others(gm)
        recording.insert_guards(gm)
    return gm


# ------------------------------------------------------------------------------------------------- before recording
def _checked(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        hint = " Make an instance of the class first" if isinstance(model, type) else ""
        raise UsageError(f"expected a torch.nn.Module, got {type(model).__name__}: {model!r:.80}.{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "a ScriptModule cannot be recorded, since its code runs outside Python; pass the module it was made from"
        )
    original = getattr(model, "_orig_mod", None)
    if isinstance(original, nn.Module):  # torch.compile wraps modules so
        return _checked(original)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise UsageError(f"parameter {name} is not initialised yet; run the model once on real inputs first")
        if tensor.is_meta:
            raise UsageError(
                f"{name} is on the meta device and has no values; load the weights first "
                "(model.to_empty(device=...) and load_state_dict)"
            )
    return model


def _positional(example_inputs: Any) -> tuple[Any, ...]:
    if example_inputs is None:
        return ()
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs)
    raise UsageError(
        f"example_inputs must be a tensor or a tuple of positional arguments, got {type(example_inputs).__name__}; "
        "keyword arguments go into example_kwargs"
    )


def _private_copy(model: nn.Module) -> nn.Module:
    """A deep copy, with tensors that were left over from a run (which cannot be copied) detached."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            for _, leaf in leaves(value) if not isinstance(value, nn.Module) else ():
                if isinstance(leaf, torch.Tensor) and not leaf.is_leaf:
                    memo[id(leaf)] = leaf.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and the model given is never "
            "changed, so it cannot be recorded; give its classes a working __deepcopy__"
        ) from error


@contextlib.contextmanager
def _frozen(work: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient while the model is run, so that runs keep no graph for backward."""
    flags = [(p, p.requires_grad) for p in work.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _run(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    call = module.forward if isinstance(module, fx.GraphModule) else module  # calling one prints when it fails
    with torch.no_grad(), undisturbed(module, (tuple(args), dict(kwargs))):
        torch.manual_seed(_SEED)
        return call(*args, **kwargs)


def _first_run(work: nn.Module, inputs: Inputs) -> Any:
    args, kwargs = inputs.changed({}).call()
    try:
        output = _run(work, args, kwargs)
        if any(isinstance(m, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) for m in work.modules()):
            with internals.without_fused_encoder():
                output, fused = _run(work, *inputs.changed({}).call()), output
            difference = compare(output, fused, equal_nan=True)
            if difference.error > _FUSED_ENCODER_TOLERANCE or difference.structural:
                warnings.warn(
                    "torch's fused nn.TransformerEncoder kernel, used in eval mode without gradients, gives other values "
                    "than the layers do (it writes zeros at padded positions); the graph does what the layers do",
                    TraceWarning,
                    stacklevel=3,
                )
        return output
    except Exception as error:
        shapes = {".".join(map(str, (name, *path))): tuple(t.shape) for (name, path), t in inputs.tensors().items()}
        raise TraceError(
            f"{type(work).__name__} itself fails on the example inputs (shapes {shapes}): "
            f"{type(error).__name__}: {error}. The traceback above is the model's own"
        ) from error


def _symbolic(model: nn.Module) -> fx.GraphModule:
    work = _private_copy(model)
    try:
        gm = fx.symbolic_trace(work)
    except Exception as error:
        raise TraceError(
            f"torch.fx.symbolic_trace cannot trace {type(model).__name__} ({type(error).__name__}: {error}); give "
            "example_inputs, and the model is recorded by running it instead"
        ) from error
    canonicalize(gm)
    return gm


# ------------------------------------------------------------------------------------------------- recording
class _Recording:
    """The recordings of one model, and the graph that comes of them."""

    def __init__(self, work: nn.Module, inputs: Inputs, opaque: str | Collection[str]) -> None:
        self.work, self.inputs = work, inputs
        self.auto = opaque == "auto"
        paths = () if isinstance(opaque, str) else opaque
        if isinstance(opaque, str) and not self.auto:
            raise UsageError(f'opaque must be "auto" or a collection of module paths, got {opaque!r}')
        modules = dict(work.named_modules())
        for path in paths:
            if path not in modules or path == "":
                raise UsageError(f"opaque names {path!r}, and the model has no submodule of that path")
        self.opaque = frozenset(paths)
        self.session: Session | None = None
        self.free: dict[Dimension, str] = {}
        self.others: list[tuple[str, Inputs, Any]] = []

    def graph_module(self, dynamic_batch: bool, dynamic_dims: Mapping[str, Mapping[int, str]]) -> fx.GraphModule:
        """Record, align and build; ``self.others`` then holds runs to check against."""
        named = self._named_dimensions(dynamic_dims)
        batch = {d: "batch" for d in self._batch_dimensions() if d not in named} if dynamic_batch else {}
        session = self._record_free(batch | named, required=bool(named))
        session.graph._tracer_cls = Retracer
        self.session = session
        uses = training_uses(session, lambda: self._record(self.inputs.changed({}), "in the other mode")[0])
        for path, value in session.attributes.items():
            editing.set_attribute(self.work, path, value)
        fold_constants(session, self.work)
        self._follow_device(session)
        gm = fx.GraphModule(self.work, session.graph, type(self.work).__name__)
        _restore_flags(gm, self.work)
        canonicalize(gm, uses)
        _restore_counters(gm, self.work)
        if session.buffer_reads:
            warnings.warn(
                f"the model reads the value of a buffer by {session.buffer_reads[0]}; the graph keeps what followed "
                "from the value it has now",
                TraceWarning,
                stacklevel=4,
            )
        return gm

    def _named_dimensions(self, dynamic_dims: Mapping[str, Mapping[int, str]]) -> dict[Dimension, str]:
        tensors = self.inputs.tensors()
        result: dict[Dimension, str] = {}
        for name, dims in dynamic_dims.items():
            tensor = tensors.get((name, ()))
            if tensor is None:
                known = sorted(n for n, path in tensors if not path)
                raise UsageError(f"dynamic_dims names {name!r}, which is no tensor argument; there are {known}")
            for dim, label in dims.items():
                if not -tensor.dim() <= dim < tensor.dim():
                    raise UsageError(f"dynamic_dims names dimension {dim} of {name}, which has {tensor.dim()}")
                result[name, (), dim % tensor.dim()] = label
        return result

    def _batch_dimensions(self) -> list[Dimension]:
        tensors = [(key, t) for key, t in self.inputs.tensors().items() if t.dim() > 0]
        return [(name, path, 0) for (name, path), t in tensors if t.shape[0] == tensors[0][1].shape[0] > 0]

    def _size_of(self, label: str, dims: Mapping[Dimension, str]) -> int:
        tensors = self.inputs.tensors()
        sizes = {tensors[name, path].shape[dim] for (name, path, dim), of in dims.items() if of == label}
        if len(sizes) != 1:
            raise UsageError(f"the dimensions named {label!r} in dynamic_dims have different sizes: {sorted(sizes)}")
        return sizes.pop()

    def _record_free(self, dims: dict[Dimension, str], required: bool) -> Session:
        """Record with ``dims`` free; fix them, with a warning, if the model runs at no other sizes."""
        failure: Exception | None = None
        for sizes in self._size_choices(dims):
            try:
                session = self._record_pair(dims, sizes)
            except TraceError:
                raise
            except Exception as error:
                failure = failure or error
                continue
            self.free = dims
            return session
        if required:
            raise TraceError(
                f"the model does not run at other sizes of {sorted(set(dims.values()))}: "
                f"{type(failure).__name__}: {failure}"
            ) from failure
        if failure is not None:
            warnings.warn(
                f"the model runs at no other batch size than the example's ({type(failure).__name__}: {failure}); the "
                "graph is fixed to it",
                TraceWarning,
                stacklevel=5,
            )
        session, output = self._record(self.inputs.changed({}, seed=1), "at the example's sizes")
        self.others.append(("on other values", self.inputs.changed({}, seed=1), output))
        return session

    def _size_choices(self, dims: Mapping[Dimension, str]) -> Iterator[dict[str, tuple[int, int]]]:
        """Sizes for the two recordings. Small batches first, then multiples of the example's, for models that fold
        something else into the batch. Each label changes by another factor, so that it can be told from the others; the
        larger size comes first, so that what a model counts up from run to run does not look like a size."""
        labels = sorted(set(dims.values()), key=lambda label: label != "batch")
        if not labels:
            return
        base = {label: self._size_of(label, dims) for label in labels}
        named = {label: (base[label] * (k + 2), base[label]) for k, label in enumerate(labels) if label != "batch"}
        if "batch" not in base:
            yield named
            return
        n = base["batch"]
        larger, smaller = [s for s in (4, 3, 2) if s != n][-2:]
        yield {"batch": (larger, smaller), **named}
        if n > 1:
            yield {"batch": (3 * n, 2 * n), **named}

    def _record_pair(self, dims: dict[Dimension, str], sizes: dict[str, tuple[int, int]]) -> Session:
        first_inputs = self.inputs.changed({d: sizes[label][0] for d, label in dims.items()})
        second_inputs = self.inputs.changed({d: sizes[label][1] for d, label in dims.items()}, seed=1)
        first, _ = self._record(first_inputs, "")
        while True:
            opaque = self.opaque
            second, output = self._record(second_inputs, "")
            if self.opaque == opaque:
                break
            first, _ = self._record(first_inputs, "")
        source: dict[str, tuple[fx.Node, int]] = {}
        for (name, path, dim), label in dims.items():
            source.setdefault(label, (first.input_node(name, path), dim))
        symbols = [Symbol(label, sizes[label], *source[label]) for label in source]
        align(first, second, symbols)
        shown = ", ".join(f"{label} {pair[1]}" for label, pair in sizes.items())
        self.others.append((f"at {shown}", second_inputs, output))
        return first

    def _record(self, inputs: Inputs, why: str) -> tuple[Session, Any]:
        """One recorded run; with ``opaque="auto"`` again for each module that turns out to look at data."""
        while True:
            session = Session(self.work, self.opaque)
            run = inputs.changed({})
            try:
                with undisturbed(self.work, run.values()):
                    torch.manual_seed(_SEED)
                    return session, session.run(run)
            except DataRead as error:
                if not self.auto or error.module == "" or error.module in self.opaque:
                    raise
                self.opaque = self.opaque | {error.module}

    def _follow_device(self, session: Session) -> None:
        for (name, path), tensor in self.inputs.tensors().items():
            follow_device(session.graph, session.input_node(name, path), tensor.device)
            return

    # --------------------------------------------------------------------------------------------- afterwards
    def check_others(self, gm: fx.GraphModule) -> None:
        """Hold ``gm`` against the runs made while recording: other values, another batch size."""
        for where, inputs, expected in self.others:
            _check(gm, expected, inputs, where)

    def insert_guards(self, gm: fx.GraphModule) -> None:
        """Let ``gm`` refuse inputs that it was not recorded for."""
        fixed = self._fixed_dimensions(gm)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        arguments = {a.name: a for a in self.inputs.arguments}
        if not placeholders:
            return
        with gm.graph.inserting_before(placeholders[-1].next):
            for node in placeholders:
                argument = arguments[str(node.target)]
                guard(gm.graph, node, argument, lambda path, t, n=argument.name: _sizes(n, path, t, fixed))
        gm.recompile()

    def _fixed_dimensions(self, gm: fx.GraphModule) -> set[Dimension]:
        """The dimensions at whose other sizes ``gm`` is not known to be right. If Python has seen no size, there are
        none: the graph is then all tensor operations. Else each group of equal sizes is tried at another one."""
        session = self.session
        if session is None or not session.sizes_were_read:
            return set()
        groups: dict[int, list[Dimension]] = {}
        for (name, path), tensor in self.inputs.tensors().items():
            for dim, size in enumerate(tensor.shape):
                if (name, path, dim) not in self.free:
                    groups.setdefault(size, []).append((name, path, dim))
        fixed: set[Dimension] = set()
        for size, dims in groups.items():
            other = 2 * size if size < 64 else size + 32
            if not self._agrees(gm, self.inputs.changed(dict.fromkeys(dims, other), seed=2)):
                fixed.update(dims)
        return fixed

    def _agrees(self, gm: fx.GraphModule, inputs: Inputs) -> bool:
        """Whether model and graph both run on ``inputs`` and give the same."""
        args, kwargs = inputs.changed({}).call()
        try:
            expected = _run(self.work, args, kwargs)
            got = _run(gm, inputs.changed({}).values(), {})
        except Exception:  # whatever goes wrong at a size that nobody asked for: the answer is no, and a guard says so
            return False
        return _difference(expected, got) is None


def _sizes(name: str, path: Path, tensor: torch.Tensor, fixed: set[Dimension]) -> tuple[int | None, ...] | None:
    sizes = tuple(s if (name, path, d) in fixed else None for d, s in enumerate(tensor.shape))
    return sizes if any(s is not None for s in sizes) else None


def _restore_flags(gm: fx.GraphModule, work: nn.Module) -> None:
    """What ``GraphModule`` forgets: training flags of containers, and which buffers stay out of the state_dict."""
    for path, module in gm.named_modules():
        original = work.get_submodule(path) if path else work
        module.training = original.training
        hidden = internals.non_persistent_buffers(original)
        for name in module._buffers:
            if name in hidden or name not in original._buffers:
                internals.non_persistent_buffers(module).add(name)


def _restore_counters(gm: fx.GraphModule, work: nn.Module) -> None:
    """A functional batch norm does not read its batch counter, so the graph has lost its value."""
    counters = {n: b for n, b in work.named_buffers() if n.endswith("num_batches_tracked")}
    for name, buffer in gm.named_buffers():
        if name in counters:
            buffer.data = counters[name].data


# ------------------------------------------------------------------------------------------------- checking
def _difference(expected: Any, got: Any) -> str | None:
    found: Comparison = compare(expected, got, equal_nan=True)
    if found.structural:
        return found.structural[0]
    if found.discrete:
        return found.discrete[0]
    if found.error > _tolerance(expected):
        return (
            f"{found.where} is off by {found.error:.3g} of its largest value"
            if math.isfinite(found.error)
            else (f"{found.where} differs in what is finite")
        )
    return None


def _tolerance(output: Any) -> float:
    kinds = {leaf.dtype for _, leaf in leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()}
    return _EPS_FACTOR * max((torch.finfo(k).eps for k in kinds), default=0.0)


def _check(gm: fx.GraphModule, expected: Any, inputs: Inputs, where: str) -> None:
    try:
        got = _run(gm, inputs.changed({}).values(), {})
    except Exception as error:
        raise TraceError(
            f"the recorded graph fails {where} ({type(error).__name__}: {error}) where the model runs; something that "
            "follows the inputs was recorded as a constant. Please report it; dynamic_batch=False may help"
        ) from error
    difference = _difference(expected, got)
    if difference is not None:
        raise TraceError(
            f"the recorded graph is not equal to the model {where}: {difference}. The model does something that torch "
            "calls do not show (state kept between runs, numpy, its own random numbers)"
        )
