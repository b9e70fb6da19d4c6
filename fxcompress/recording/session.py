"""One recorded run of a model: every torch call and every call of a leaf module becomes a node of a graph."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from fxcompress.errors import TraceError
from fxcompress.modules import AutogradCall, GroupedLinear
from fxcompress.recording import functions, internals
from fxcompress.recording.arguments import Arguments
from fxcompress.recording.facts import Depends, Ledger, version
from fxcompress.recording.functions import Kind
from fxcompress.recording.inputs import Dimension, Inputs
from fxcompress.recording.methods import Method, calling_method, intercepted, method_call
from fxcompress.recording.structure import Path, children, follow, is_namedtuple, leaves

__all__ = ["DataRead", "Hint", "Session", "is_leaf"]


@dataclasses.dataclass(frozen=True)
class Hint:
    """What only the run can tell about a functional call: ranks, dtypes of masks, and the flag of its module."""

    rank: int
    mask_rank: int
    float_masks: bool
    module: str
    training: bool


class DataRead(TraceError):
    """Python looked at the data of a tensor. ``module`` is the path of the innermost module that did, and ``method``
    the method that did where that is the model itself."""

    def __init__(self, message: str, module: str, method: Method | None) -> None:
        super().__init__(message)
        self.module = module
        self.method = method


# Calls for which canonical.py wants a Hint.
_HINTED = frozenset(
    (
        "batch_norm dropout dropout1d dropout2d dropout3d alpha_dropout "
        "feature_alpha_dropout scaled_dot_product_attention multi_head_attention_forward"
    ).split()
)
_ALWAYS_RECORDED_INSIDE = (nn.MultiheadAttention,)


class Session(TorchFunctionMode):
    """Records one run of ``model``; use once.

    Args:
        model: the module to run; its parameters and buffers are known by their first name.
        opaque: paths of modules to keep as one call whatever they are.
        methods: methods to keep as one call.
        tolerant: let Python look at random numbers; the graph is then only good for a glance.
    """

    def __init__(
        self,
        model: nn.Module,
        opaque: frozenset[str] = frozenset(),
        methods: frozenset[Method] = frozenset(),
        tolerant: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.opaque = opaque
        self.methods = {m: f"methods.{'_'.join(m).replace('.', '_').lstrip('_')}" for m in sorted(methods)}
        self.graph = fx.Graph()
        self.ledger = Ledger(model)
        self.hints: dict[fx.Node, Hint] = {}
        self.attributes: dict[str, Any] = {}
        self.arguments = Arguments(model, self.graph, self.ledger, self.attributes)
        self.buffer_reads: list[str] = []
        self.sizes_were_read = self.ranks_were_read = self.dtypes_were_read = False
        self.tolerant = tolerant
        self.ends: dict[str, fx.Node] = {}
        self._inputs: dict[str, fx.Node] = {}
        self._batches: set[fx.Node] = set()
        self._offence: DataRead | None = None
        self._paths = {id(m): n for n, m in model.named_modules()}
        self._paused = 0
        self._thread = threading.get_ident()

    # ------------------------------------------------------------------------------------------------- running
    def run(self, inputs: Inputs, free: Collection[Dimension] = ()) -> Any:
        """Run the model on ``inputs``, which become the placeholders; return its output. That Python sees the size of
        a dimension 0 that is ``free`` does not count as having seen a size."""
        with self.pause():
            self._place(inputs)
            self._batches = {self.input_node(name, path) for name, path, dim in free if dim == 0}
        args, kwargs = inputs.call()
        buffers = [(path, m, dict(m._buffers)) for path, m in self.model.named_modules()]
        with (
            internals.compiling(),
            torch.compiler.set_stance("force_eager"),
            internals.without_assertions_on_data(),
            internals.without_causal_detection(),
            internals.module_calls(self._on_module),
            internals.script_function_calls(self._on_script_function),
            internals.autograd_function_calls(self._on_autograd_function),
            intercepted(self.model, self.methods, self._on_method),
            torch.enable_grad(),
            self,
        ):
            out = self.model(*args, **kwargs)
            with self.pause():
                self._check_depends(inputs, out)
                self._write_buffers(buffers)
                self.graph.output(self.arguments.argument(out))
        for method, path in self.methods.items():
            if path in self.attributes:
                self.attributes[path] = method_call(self.model, method)
        if self._offence is not None:  # the model's own code swallowed the exception and went on
            raise self._offence
        return out

    def _check_depends(self, inputs: Inputs, out: Any) -> None:
        if inputs.tensors() and not self.ledger.depends(out) & Depends.INPUT:
            raise TraceError(
                "no output of the model depends on an input, as far as a copy of it shows: a hook or a closure may "
                "point at the original model, so that the copy returns what an earlier run has left there. Keep what "
                "hooks collect in the module that they are called with"
            )

    def _write_buffers(self, before: list[tuple[str, nn.Module, dict[str, torch.Tensor | None]]]) -> None:
        """``self.mean = new`` on a buffer becomes ``mean.copy_(new)``, since a graph cannot assign attributes."""
        for path, module, buffers in before:
            for name, old in buffers.items():
                new = module._buffers.get(name)
                if new is old or old is None:
                    continue
                where = f"{path}.{name}" if path else name
                node = None if new is None else self.ledger.node_of(new)
                if node is None or new is None or new.shape != old.shape:
                    raise TraceError(
                        f"the model replaces its buffer {where} by something that cannot be copied into it"
                    )
                self.graph.call_method("copy_", (self.arguments.tensor_node(old), node))
                module._buffers[name] = old

    def _place(self, inputs: Inputs) -> None:
        """One placeholder for each argument, under its own name; then whatever is inside structured ones."""
        default: tuple[Any, ...] = ()
        for argument in inputs.arguments:
            if not argument.given:
                default = (argument.value,)
            elif default:  # Python wants a default behind a default; the guard says what is missing
                default = (None,)
            if default and isinstance(default[0], torch.Tensor):  # no text for a graph's code; what forward does with
                default = (None,)  # its own default is recorded
            self._inputs[argument.name] = (
                self.graph.placeholder(argument.name, default_value=default[0])
                if default
                else self.graph.placeholder(argument.name)
            )
        for argument in inputs.arguments:
            for path, leaf in leaves(argument.value) if argument.given else ():
                if isinstance(leaf, torch.Tensor):
                    self.ledger.note(self.input_node(argument.name, path), leaf, Depends.INPUT)

    def input_node(self, name: str, path: Path) -> fx.Node:
        """The node of the tensor at ``path`` in argument ``name``."""
        return follow(self.graph, self._inputs[name], path, self.arguments.parts)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Torch calls in here are nobody's business."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def _ignoring(self) -> bool:
        return self._paused > 0 or threading.get_ident() != self._thread

    # ------------------------------------------------------------------------------------------------- torch calls
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._ignoring():
            return func(*args, **kwargs)
        kind = functions.classify(func, args)
        if kind is Kind.QUESTION:
            self._question(func, args, kwargs)
            return func(*args, **kwargs)
        if kind is Kind.DATA_READ:
            self._data_read(functions.display_name(func), args, kwargs)
            with self.pause():
                return func(*args, **kwargs)
        if kind is Kind.ASSIGNMENT:
            return self._assignment(func, args, kwargs)
        if functions.splits(func) and isinstance(args[0], torch.Tensor):
            self.sizes_were_read = True  # Python sees how many parts there are
            if self.ledger.data_dims(args[0]):
                self._data_read(f"{functions.display_name(func)} (as often as values say)", args, kwargs)
        op, target, node_args = functions.target_of(func, args)
        return self._record(op, target, node_args, kwargs, lambda: func(*args, **kwargs), func)

    def _question(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args or not isinstance(args[0], torch.Tensor):
            return
        read = functions.sizes_read(func, args, kwargs)
        if self.ledger.depends(args[0]) & Depends.INPUT:
            of_batch = self.ledger.node_of(args[0]) in self._batches
            self.sizes_were_read |= read is None or bool(read - {0} if of_batch else read)
            self.ranks_were_read |= functions.reads_rank(func)
            self.dtypes_were_read |= functions.reads_dtype(func)
        follows = self.ledger.data_dims(args[0])
        if follows and (read is None or read & follows):
            self._data_read(f"{functions.display_name(func)} (a size that follows from values)", args, kwargs)

    def _assignment(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = functions.display_name(func)
        if name in ("Tensor.requires_grad", "Tensor.names"):
            with self.pause():
                return func(*args, **kwargs)
        raise TraceError(
            f"the model assigns to {name} at {self.ledger.here()}; an assignment to an attribute of a tensor cannot be "
            "recorded. Use an in-place operation such as copy_() instead"
        )

    def _record(self, op: str, target: Any, args: Any, kwargs: Any, call: Callable[[], Any], func: Any = None) -> Any:
        with self.pause():
            given = [t for _, t in leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if any(internals.is_transformed(t) for t in given):
                raise TraceError(
                    f"the model uses a transform of torch.func (vmap, grad ...) at {self.ledger.here()}, inside which "
                    "no tensor can be recorded; keep the module that does as one call: opaque=[its path]"
                )
            node_args = tuple(self.arguments.argument(a) for a in args)
            node_kwargs = {k: self.arguments.argument(v) for k, v in kwargs.items()}
            node = self.graph.create_node(op, target, node_args, node_kwargs)
            depends = self._node_depends(node, func)
            versions = [version(t) for t in given]
            grad = torch.is_grad_enabled()
            out = call()
            changed = [t for t, v in zip(given, versions, strict=True) if v is not None and version(t) != v]
            self._hint(node, func, given, kwargs)
            made = func is not None and functions.makes_data_sizes(func, args, kwargs)
            made = made or (op == "call_module" and (target in self.opaque or target in self.methods.values()))
            return self._bind(node, out, given, changed, depends, grad, made)

    def _bind(
        self,
        node: fx.Node,
        out: Any,
        given: list[torch.Tensor],
        changed: list[torch.Tensor],
        depends: Depends,
        grad: bool,
        made: bool,
    ) -> Any:
        self.ledger.note(node, None, depends)  # what it returns is noted part by part below
        self.ledger.changed_by(node, changed)
        inside = [leaf for _, leaf in leaves(out) if isinstance(leaf, torch.Tensor)]
        if not inside:
            return self._without_tensors(node, out, given, changed)
        untouched = {id(t) for t in given} - {id(t) for t in changed}
        out = _map_tensors(out, lambda t: internals.alias(t) if id(t) in untouched else t)
        for path, leaf in leaves(out):
            if isinstance(leaf, torch.Tensor):
                part = follow(self.graph, node, path, self.arguments.parts)
                differentiable = depends & (Depends.INPUT | Depends.PARAMETER) and leaf.is_floating_point()
                if not grad and differentiable and not changed:  # made under no_grad: no gradient may pass here
                    part = self.graph.call_method("detach", (part,))
                same = any(leaf is t for t in changed)
                dims = self.ledger.data_dims(leaf) if same else self.ledger.data_dims_of_result(given, made, leaf)
                self.ledger.note(part, leaf, depends, dims)
        if node.op == "call_module" and not isinstance(out, torch.Tensor):
            self.arguments.remember(out, node, inside)
        return out

    def _without_tensors(self, node: fx.Node, out: Any, given: list[torch.Tensor], changed: list[torch.Tensor]) -> Any:
        if node.op == "call_module" and isinstance(out, (int, float, complex, str)):
            self._data_read(f"module {node.target}, which returns {type(out).__name__},", tuple(given), {})
        if changed or node.op == "call_module":
            if children(out):
                self.arguments.remember(out, node, [])
            return out
        if out is not None and given and not _is_assertion(node):
            self._data_read(str(node.target), tuple(given), {})
        if not (given and _is_assertion(node)):
            self.ledger.forget(node)
            self.graph.erase_node(node)
        return out

    def _data_read(self, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        depends = self.ledger.depends((args, kwargs))
        if self.tolerant and not depends & (Depends.INPUT | Depends.PARAMETER):
            return
        if depends & (Depends.INPUT | Depends.PARAMETER | Depends.RANDOM):
            path = self.ledger.stack[-1][0]
            source = "an input" if depends & Depends.INPUT else "a parameter"
            if not depends & (Depends.INPUT | Depends.PARAMETER):
                source = "random numbers"
            method = calling_method(self._paths) if path == "" else None
            what_is_kept = "innermost module" if path else "method"
            advice = f', or pass opaque="auto" to keep the {what_is_kept} that does this as one call'
            if not path and method is None:
                advice = ", or move it into a submodule and pass opaque"
            self._offence = DataRead(
                f"the model reads data by {what} at {self.ledger.here()}, from a tensor that depends on {source}: what "
                "Python does with the value would be fixed in the graph. Rewrite the place with tensor operations "
                "(torch.where, masks)" + advice,
                path,
                method,
            )
            raise self._offence
        if depends & Depends.BUFFER:
            self.buffer_reads.append(f"{what} at {self.ledger.here()}")

    # ------------------------------------------------------------------------------------------------- module calls
    def _on_module(
        self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self._paths.get(id(module))
        if self._ignoring() or path is None or path == "":
            return original(module, *args, **kwargs)
        registered = all(id(p) in self.ledger.names for p in module._parameters.values() if p is not None)
        if path in self.opaque or (registered and is_leaf(module)):  # functional_call puts other parameters in
            return self._record("call_module", path, args, kwargs, lambda: original(module, *args, **kwargs))
        self.ledger.stack.append((path, module))
        try:
            result = original(module, *args, **kwargs)
        finally:
            self.ledger.stack.pop()
        end = self.ledger.node_of(result) if isinstance(result, torch.Tensor) else None
        if end is not None:
            self.ends[path] = end
        return result

    def _on_method(self, path: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._ignoring():
            return original(*args, **kwargs)
        self.attributes[path] = None  # made when the run is over, and the model's methods are its own again
        return self._record("call_module", path, args, kwargs, lambda: original(*args, **kwargs))

    def _on_script_function(
        self, original: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._ignoring():
            return original(function, *args, **kwargs)
        python = internals.source_of_script_function(function)
        if python is None:
            raise TraceError(
                f"the model calls a function compiled by torch.jit at {self.ledger.here()}, and its Python source is "
                "not known; nothing inside it can be recorded. Call the plain Python function instead"
            )
        return python(*args, **kwargs)

    def _on_autograd_function(
        self, original: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._ignoring():
            return original(*args, **kwargs)
        if function is torch.utils.checkpoint.CheckpointFunction:  # (run_function, preserve_rng_state, *its arguments)
            return args[0](*args[2:])
        path = f"autograd.{function.__name__}"
        count = 0
        while path in self.attributes and self.attributes[path].function is not function:
            count += 1
            path = f"autograd.{function.__name__}_{count}"
        self.attributes.setdefault(path, AutogradCall(function))
        return self._record("call_module", path, args, kwargs, lambda: original(*args, **kwargs))

    # ------------------------------------------------------------------------------------------------- facts
    def _node_depends(self, node: fx.Node, func: Any) -> Depends:
        depends = self.ledger.inputs_depend(node)
        if func is not None and functions.draws_random_numbers(func):
            depends |= Depends.RANDOM
        if node.op == "call_module" and str(node.target) not in self.attributes:
            module = self.model.get_submodule(str(node.target))
            if next(module.parameters(), None) is not None:
                depends |= Depends.PARAMETER
            if next(module.buffers(), None) is not None:
                depends |= Depends.BUFFER
            drops = isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU))
            if module.training or drops or not _is_torch_module(module):
                depends |= Depends.RANDOM
        return depends

    def _hint(self, node: fx.Node, func: Any, given: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
        if given and node.op == "call_function" and getattr(func, "__name__", "") in _HINTED:
            path, module = self.ledger.stack[-1]
            masks = [kwargs[k] for k in ("attn_mask", "key_padding_mask") if isinstance(kwargs.get(k), torch.Tensor)]
            mask = kwargs.get("attn_mask")
            self.hints[node] = Hint(
                given[0].dim(),
                mask.dim() if isinstance(mask, torch.Tensor) else 0,
                all(m.is_floating_point() for m in masks),
                path,
                module.training,
            )


def _is_torch_module(module: nn.Module) -> bool:
    named = type(module).__module__.startswith(("torch.nn.modules.", "torch.ao.nn."))
    return named or type(module) is GroupedLinear  # which could as well be one


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of ``module`` is one node: a plain ``torch.nn`` layer, a scripted module, or a stateless module
    that acts by its training flag (such as stochastic depth), which must go on obeying it."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if "forward" in vars(module) or any(isinstance(v, torch.Tensor) for v in vars(module).values()):
        return False  # its forward, or a weight of it, was put there by other code
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if next(module.children(), None) is not None:
        return False
    if _is_torch_module(module):
        container = type(module).__module__ == "torch.nn.modules.container"
        return not container and not isinstance(module, _ALWAYS_RECORDED_INSIDE)
    stateless = next(module.parameters(), None) is None and next(module.buffers(), None) is None
    code = getattr(type(module).forward, "__code__", None)
    return stateless and code is not None and "training" in code.co_names


def _is_assertion(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", str(node.target)) in ("_assert", "_assert_async")


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with ``change`` applied to the tensors in tuples, lists and dicts; other objects are left alone."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(v, change) for v in value)
    if is_namedtuple(value):
        parts = [_map_tensors(v, change) for v in value]
        return type(value)(parts) if type(value).__module__ == "torch.return_types" else type(value)(*parts)
    if type(value) is dict:
        return {k: _map_tensors(v, change) for k, v in value.items()}
    return value
