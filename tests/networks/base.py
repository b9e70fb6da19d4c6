"""What drawn and named networks share: signals, blocks, parameters, inputs, and how two outputs are compared."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

MAPS = ("1d", "2d", "3d")
KINDS = ("2d", "vector", "sequence", "1d", "3d")
WIDEST = 8

CONV = {"1d": nn.Conv1d, "2d": nn.Conv2d, "3d": nn.Conv3d}
TRANSPOSED = {"1d": nn.ConvTranspose1d, "2d": nn.ConvTranspose2d, "3d": nn.ConvTranspose3d}
BATCH_NORM = {
    "1d": nn.BatchNorm1d,
    "2d": nn.BatchNorm2d,
    "3d": nn.BatchNorm3d,
    "vector": nn.BatchNorm1d,
    "sequence": nn.BatchNorm1d,
}
INSTANCE_NORM = {"1d": nn.InstanceNorm1d, "2d": nn.InstanceNorm2d, "3d": nn.InstanceNorm3d}

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Options = Mapping[str, tuple[Any, ...]]
Sampler = Callable[[torch.Generator, int, torch.dtype], Inputs]


@dataclasses.dataclass(frozen=True)
class Signal:
    """The shape of an activation without its batch: ``vector`` (C), ``sequence`` (T, C), ``1d``-``3d`` (C, *sizes)."""

    kind: str
    channels: int
    sizes: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"{self.kind}({'x'.join(map(str, self.shape))})"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.sizes, self.channels) if self.kind == "sequence" else (self.channels, *self.sizes)

    @property
    def axis(self) -> int:
        """The channel dimension, batch included."""
        return 2 if self.kind == "sequence" else 1

    @property
    def positions(self) -> int:
        return math.prod(self.sizes)

    def along_channels(self) -> tuple[int, ...]:
        """The shape in which a vector of one number per channel broadcasts against this signal."""
        return tuple(-1 if dim == self.axis else 1 for dim in range(1, 1 + len(self.shape)))

    def widened(self, channels: int) -> Signal:
        return dataclasses.replace(self, channels=channels)

    def resized(self, sizes: tuple[int, ...]) -> Signal:
        return dataclasses.replace(self, sizes=sizes)


class Block(nn.Module):
    """A piece of a drawn network: built from the signal it reads and plain options, it says what it emits in ``out``.

    Attributes:
        OPTIONS: the values that each constructor option may take, the simplest first (hypothesis shrinks to it).
        KINDS: the kinds of signal it reads.
        KEEPS: whether kind and sizes pass through unchanged, so that the block may stand inside a residual.
    """

    OPTIONS: ClassVar[Options] = {}
    KINDS: ClassVar[tuple[str, ...]] = KINDS
    KEEPS: ClassVar[bool] = True

    def __init__(self, signal: Signal) -> None:
        super().__init__()
        self.out = signal
        self.label = type(self).__name__

    @classmethod
    def accepts(cls, signal: Signal) -> bool:
        return signal.kind in cls.KINDS


class Stack(Block):
    """Blocks one after the other."""

    def __init__(self, signal: Signal, blocks: list[Block]) -> None:
        super().__init__(blocks[-1].out if blocks else signal)
        self.blocks = nn.ModuleList(blocks)
        self.label = f"[{' > '.join(block.label for block in blocks)}]"

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def build(cls: type[Block], signal: Signal, **options: Any) -> Block:
    """A block and its label, without touching the global random state (``fill`` sets every parameter anyway)."""
    with torch.random.fork_rng(devices=[]):
        block = cls(signal, **options)
    shown = ", ".join(f"{k}={v.label if isinstance(v, Block) else repr(v)}" for k, v in options.items())
    block.label = f"{cls.__name__}({shown})"
    return block


def project(signal: Signal, channels: int, bias: bool = True) -> nn.Module:
    """The pointwise layer of this kind of signal: a 1x1 convolution or a linear layer."""
    if signal.kind in MAPS:
        return CONV[signal.kind](signal.channels, channels, 1, bias=bias)
    return nn.Linear(signal.channels, channels, bias=bias)


def fill(module: nn.Module, seed: int) -> None:
    """Set every parameter and running statistic from ``seed``: well-conditioned, and none at a value that hides a bug
    (no zero bias, no unit variance, some negative scales)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64)

    def uniform(t: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(t.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(normal(parameter) * (1.3 / math.prod(parameter.shape[1:])) ** 0.5)
            elif name.rpartition(".")[2].endswith(("weight", "scale")):
                sign = torch.where(uniform(parameter, 0, 1) < 0.2, -1.0, 1.0)
                parameter.copy_(uniform(parameter, 0.6, 1.5) * sign)
            else:
                parameter.copy_(normal(parameter) * 0.3)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(normal(buffer) * 0.3)
            elif name.endswith("running_var"):
                buffer.copy_(uniform(buffer, 0.4, 2.0))
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(7)


@dataclasses.dataclass(repr=False)
class Network:
    """A model in eval mode, inputs for it, and more inputs of the same kind on demand.

    Attributes:
        tolerance: relative error that float64 arithmetic allows two equal networks; larger than 1e-10 only for models
            that compute in float32 inside (Llama's norms do) whatever their own dtype.
    """

    module: nn.Module
    sample: Sampler
    description: str
    batch: int = 2
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        self.module.to(self.dtype).eval()
        self.args, self.kwargs = self.fresh(0)

    def __repr__(self) -> str:
        return f"<{self.description}, batch={self.batch}, {str(self.dtype).removeprefix('torch.')}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print the fields

    def fresh(self, seed: int, batch: int | None = None) -> Inputs:
        """Other inputs of the same kind, and of another batch size if asked for."""
        generator = torch.Generator().manual_seed(seed)
        return self.sample(generator, self.batch if batch is None else batch, self.dtype)

    def double(self) -> Network:
        """The same network with float64 parameters and inputs; nothing is shared with this one."""
        return dataclasses.replace(self, module=copy.deepcopy(self.module), dtype=torch.float64)

    def calibration(self, batches: int = 2) -> list[Any]:
        """Calibration data in the form that ``compile`` takes: tuples, or dicts where keywords are needed."""
        drawn = [self.fresh(100 + index) for index in range(batches)]
        signature = inspect.signature(self.module.forward)
        return [dict(signature.bind(*args, **kwargs).arguments) if kwargs else args for args, kwargs in drawn]


def run(module: nn.Module, inputs: Inputs) -> Any:
    """The outputs on a private copy of ``inputs``, without gradients."""
    args, kwargs = copy.deepcopy(inputs)
    with torch.no_grad():
        return module(*args, **kwargs)


def children(value: Any) -> Iterator[tuple[str, Any]] | None:
    """The named parts of a container, ``None`` for anything that is not one."""
    if isinstance(value, Mapping):
        return ((f"[{key!r}]", part) for key, part in value.items())
    if isinstance(value, tuple | list):
        return ((f"[{index}]", part) for index, part in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))
    return None


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested tuples, lists, mappings and dataclasses, with its path."""
    parts = children(value)
    if parts is None:
        yield path, value
    else:
        for name, part in parts:
            yield from leaves(part, path + name)


def assert_same_structure(expected: Any, found: Any, path: str = "output") -> None:
    """Containers of the same types with the same keys, and leaves of the same types, shapes and dtypes."""
    assert type(found) is type(expected), f"{path}: expected a {type(expected)}, found a {type(found)}"
    parts = children(expected)
    if parts is not None:
        one, other = list(parts), list(children(found) or ())
        assert [name for name, _ in one] == [name for name, _ in other], f"{path}: different keys"
        for (name, a), (_, b) in zip(one, other, strict=True):
            assert_same_structure(a, b, path + name)
    elif isinstance(expected, Tensor):
        assert found.shape == expected.shape, f"{path}: expected shape {expected.shape}, found {found.shape}"
        assert found.dtype == expected.dtype, f"{path}: expected {expected.dtype}, found {found.dtype}"
    else:
        assert found == expected, f"{path}: expected {expected!r}, found {found!r}"


def relative_error(expected: Any, found: Any) -> float:
    """The largest relative error in the Euclidean norm over all tensors of two outputs of one structure."""
    assert_same_structure(expected, found)
    worst = 0.0
    for (_, a), (_, b) in zip(leaves(expected), leaves(found), strict=True):
        if isinstance(a, Tensor) and a.numel():
            a, b = a.double(), b.double()
            difference, size = (b - a).norm().item(), a.norm().item()
            worst = max(worst, difference / size if size else difference)
            assert not math.isnan(worst), "the outputs hold NaNs"
    return worst


def unresponsive_inputs(network: Network, seed: int = 1, batch: int | None = None) -> list[str]:
    """The tensor inputs whose exchange for other ones leaves every output as it was."""
    base, other = network.fresh(seed, batch), network.fresh(seed + 1, batch)
    reference = run(network.module, base)
    names = [path for path, leaf in leaves(base) if isinstance(leaf, Tensor)]
    dead = []
    for index, name in enumerate(names):
        count = iter(range(len(names)))
        replacements = [leaf for _, leaf in leaves(other) if isinstance(leaf, Tensor)]

        def swap(leaf: Any, count: Any = count, index: int = index, replacements: Any = replacements) -> Any:
            return replacements[index] if isinstance(leaf, Tensor) and next(count) == index else leaf

        if relative_error(reference, run(network.module, tree_map(swap, base))) < 1e-3:
            dead.append(name)
    return dead


def settle(network: Network, seed: int, attempts: int = 8) -> bool:
    """Fill the network from the first seed that lets every input reach an output (tiny ReLU layers die easily)."""
    for attempt in range(attempts):
        fill(network.module, seed + attempt)
        if not unresponsive_inputs(network):
            return True
    return False
