"""Questions about calls in a graph, the same for modules, functions and methods. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from torch import fx, nn
from torch.nn.utils import parametrize

from fxcompress.editing import is_inplace

__all__ = [
    "Memory",
    "argument",
    "called",
    "describe",
    "is_call",
    "is_torch_call",
    "keeps_shape",
    "name_of_call",
    "override_of",
    "tensor_input",
]

M = TypeVar("M", bound=nn.Module)

# Files of torch.nn.modules whose modules (but for those named) give a tensor of their input's shape.
_SHAPE_KEEPING_FILES = frozenset("activation batchnorm dropout instancenorm normalization".split())
_NOT_SHAPE_KEEPING = (nn.GLU, nn.MultiheadAttention)
_SHAPE_KEEPING_CALLS = frozenset(
    "relu relu_ relu6 gelu silu mish elu selu celu leaky_relu hardswish hardsigmoid hardtanh sigmoid tanh softplus "
    "softmax log_softmax dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout batch_norm "
    "layer_norm group_norm instance_norm contiguous clone detach neg exp log sqrt rsqrt abs".split()
)
# Files of torch.nn.modules whose modules return new tensors (unless in place), and calls that do.
_FRESH_FILES = frozenset(
    "activation batchnorm conv instancenorm normalization padding pooling sparse upsampling".split()
)
_FRESH_CALLS = frozenset(
    "add sub mul div truediv matmul bmm addmm cat stack where clone linear conv1d conv2d conv3d relu relu6 gelu silu "
    "mish elu selu leaky_relu hardswish hardsigmoid sigmoid tanh softmax log_softmax softplus exp log sqrt rsqrt neg "
    "abs pow mean sum amax amin argmax argmin batch_norm layer_norm group_norm instance_norm embedding pad interpolate "
    "scaled_dot_product_attention max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d size dim numel".split()
)
_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def called(gm: fx.GraphModule, node: Any, *types: type[M]) -> M | None:
    """The module that ``node`` calls if its type is *exactly* one of ``types``, else ``None``.

    A subclass may do anything in its ``forward``, so it does not count; ask ``isinstance`` where it should.
    """
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    return module if type(module) in types else None  # type: ignore[return-value]


def _is_torch_function(target: Any) -> bool:
    owner = getattr(target, "__objclass__", None)  # methods such as torch.Tensor.add have no __module__
    module = getattr(owner if owner is not None else target, "__module__", None) or ""
    return module in ("_operator", "operator") or module.split(".")[0] == "torch"


def is_torch_call(node: fx.Node) -> bool:
    """Whether ``node`` calls a function of ``torch`` or ``operator``, a method, or a module defined in ``torch.nn``."""
    if node.op == "call_module" and node.graph.owning_module is not None:
        module = node.graph.owning_module.get_submodule(str(node.target))
        return type(module).__module__.startswith("torch.nn.")
    return node.op == "call_method" or (node.op == "call_function" and _is_torch_function(node.target))


def name_of_call(node: fx.Node) -> str:
    """The bare name of the torch function, operator or method that ``node`` calls, without double underscores
    (``torch.add``, ``operator.add``, ``Tensor.add`` and ``Tensor.__add__`` are all ``"add"``); else ``""``."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function" and _is_torch_function(node.target):
        name = getattr(node.target, "__name__", "")
    else:
        return ""
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def is_call(node: Any, names: Collection[str]) -> bool:
    """Whether ``node`` calls a torch function, operator or method of one of these bare ``names``."""
    return isinstance(node, fx.Node) and name_of_call(node) in names


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """The argument at ``position`` or, by keyword, ``name``; ``default`` if the call does not give it."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def tensor_input(node: fx.Node) -> fx.Node | None:
    """The node that gives the first argument of ``node`` (also as ``input=`` or ``self=``), else ``None``."""
    value = argument(node, 0, "input", node.kwargs.get("self"))
    return value if isinstance(value, fx.Node) else None


def override_of(module: nn.Module) -> str | None:
    """What makes calling ``module`` differ from what its class and parameters say, in words; ``None`` if nothing."""
    if parametrize.is_parametrized(module):
        return "has parametrizations (torch.nn.utils.parametrize); remove them or make them permanent first"
    if any(getattr(module, table, None) for table in _HOOK_TABLES):
        return "has hooks (or an old weight_norm, spectral_norm or prune); remove them first"
    if "forward" in module.__dict__:
        return "has a `forward` of its own set on the instance"
    return None


def _nn_file(gm: fx.GraphModule, node: fx.Node) -> str:
    """``"conv"`` for a call of a module of ``torch.nn.modules.conv``; ``""`` if ``node`` calls no such module."""
    if node.op != "call_module":
        return ""
    package, _, file = type(gm.get_submodule(str(node.target))).__module__.rpartition(".")
    return file if package == "torch.nn.modules" else ""


def keeps_shape(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` gives one tensor of the shape of its first input, whatever that is; ``False`` when in doubt."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return type(module) is nn.Identity or (
            _nn_file(gm, node) in _SHAPE_KEEPING_FILES and not isinstance(module, _NOT_SHAPE_KEEPING)
        )
    if is_call(node, ("add", "sub", "mul", "div", "truediv")):  # with a number
        return len(node.args) == 2 and isinstance(node.args[1], int | float)
    return is_call(node, _SHAPE_KEEPING_CALLS)


class Memory:
    """Which values of a graph may lie in the same memory, and which are written in place, erring on the safe side.

    Values are classed together (union-find, near-linear time) unless an operation is known to return a new tensor. This
    is a question about activations; for parameters ask ``fxcompress.analysis.aliasing``.

    Args:
        gm: the graph; it must not change while this object is in use.
        is_tensor: whether a node gives one tensor, which tells the sum of two tensors from that of two lists.
    """

    def __init__(self, gm: fx.GraphModule, is_tensor: Callable[[fx.Node], bool]) -> None:
        self._gm = gm
        self._is_tensor = is_tensor
        self._parent: dict[fx.Node, fx.Node] = {}
        self._position: dict[fx.Node, int] = {}
        for position, node in enumerate(gm.graph.nodes):
            self._parent[node] = node
            self._position[node] = position
            for source in self._shared_by(node):
                self._parent[self._root(source)] = self._root(node)
        self._last_writer: dict[fx.Node, fx.Node] = {}
        self._outside: dict[fx.Node, set[str]] = {}
        for node in gm.graph.nodes:
            for written in self._written_by(node):
                self._last_writer[self._root(written)] = node
            if node.op in ("placeholder", "get_attr", "output"):
                for value in node.all_input_nodes or [node]:
                    self._outside.setdefault(self._root(value), set()).add(node.op)

    def obstacle_to_sharing(self, copy: fx.Node, source: fx.Node) -> str | None:
        """Why ``copy``, a node that copies ``source``, could not as well be ``source`` itself; ``None`` if it could."""
        for value in (copy, source):
            writer = self._last_writer.get(self._root(value))
            if writer is not None and self._position[writer] > self._position[copy]:
                return f"{describe(self._gm, writer)} may write to it or to its original later"
        handed_out = "output" in self._outside.get(self._root(copy), ())
        if handed_out and self._outside.get(self._root(source)):
            return "both it and its original are seen outside the graph"
        return None

    def _root(self, node: fx.Node) -> fx.Node:
        root = node
        while self._parent[root] is not root:
            root = self._parent[root]
        while self._parent[node] is not root:  # path compression
            self._parent[node], node = root, self._parent[node]
        return root

    def _shared_by(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of ``node`` that its result may share memory with."""
        if node.op == "output" or self._is_fresh(node):
            return []
        if is_torch_call(node) and is_inplace(node):
            return list(self._written_by(node))
        return list(node.all_input_nodes)

    def _is_fresh(self, node: fx.Node) -> bool:
        if is_inplace(node):
            return False
        if node.op == "call_module":
            module = self._gm.get_submodule(str(node.target))
            return _nn_file(self._gm, node) in _FRESH_FILES or type(module) is nn.Linear
        if node.op == "call_function" and node.target is getattr:
            return node.args[1] in ("shape", "dtype", "device", "ndim")
        sure = node.op == "call_method" or getattr(node.target, "__module__", "") not in ("_operator", "operator")
        return is_call(node, _FRESH_CALLS) and (sure or self._is_tensor(node))

    def _written_by(self, node: fx.Node) -> Iterator[fx.Node]:
        """The values that ``node`` may write to: what it is in place on, or anything if nothing is known of it."""
        if node.op in ("placeholder", "get_attr", "output"):
            return
        known = is_torch_call(node) or (node.op == "call_function" and node.target is getattr)
        schema = getattr(node.target, "_schema", None)  # of torch.ops, whose names tell less
        if not known or (schema is not None and schema.is_mutable):
            yield from node.all_input_nodes
        elif is_inplace(node):
            out = node.kwargs.get("out")
            first = tensor_input(node)
            targets = [first] if first is not None else node.all_input_nodes
            yield from [out] if isinstance(out, fx.Node) else targets


def describe(gm: fx.GraphModule, node: Any) -> str:
    """``node`` in words for a message: ``Conv2d 'features.0'``, ``relu (node 'relu_1')``, ``the model's output``."""
    if not isinstance(node, fx.Node):
        return f"the constant {node!r}"
    if node.op == "call_module":
        return f"{type(gm.get_submodule(str(node.target))).__name__} {str(node.target)!r}"
    if node.op == "placeholder":
        return f"the model's input {str(node.target)!r}"
    if node.op == "get_attr":
        return f"the attribute {str(node.target)!r}"
    if node.op == "output":
        return "the model's output"
    return f"{name_of_call(node) or getattr(node.target, '__name__', node.target)} (node {node.name!r})"
