"""Refit the layers that read fewer channels, so that they give what they gave before: reconstruction without training.

As in channel pruning (He, Zhang & Sun 2017, arXiv 1707.06168) and ThiNet (Luo, Wu & Lin 2017, arXiv 1707.06342), each
layer gets the weights that best map what it reads *now*, after the layers before it were refitted, to what the same
layer gave in the *original* network, so that errors do not pile up. With x a row of the layer's input (for a
convolution the patch under the kernel at one place), y the original output there, W and b what pruning left, D and s
the change::

    minimise over D, s:   sum |y - (W + D) x - (b + s)|^2  +  ridge |D|^2

    D (G + ridge I) = C,   G = sum (x - mean x)(x - mean x)',   C = sum (r - mean r)(x - mean x)',   r = y - W x - b

and s = mean r - D mean x. A layer without a bias keeps none; there s = 0 and the sums are not centred. Everything is in
float64. Each group of a grouped convolution is a problem of its own.

**The ridge** draws towards the weights as they are and not to zero: what the data say nothing about stays. It is
``lambda * mean(diag G)``, with a lambda for each layer: every fourth sample is held out, the others are fitted with
lambda = 100, 10, 1, 0.1 ... until the error on those held out grows, and the best lambda is used with all samples. If
none is better on what was held out than the weights as they are, these stay. As D = 0 is among what the minimum is
taken over, the error on the calibration data never grows.

**Rows** are at most 64 places of each sample (each index of the first dimension), drawn from a fixed seed. Where they
are fewer than the unknowns, the problem is solved in the space that they span, which is where its solution lies.

**Memory.** One sweep over both networks, node by node with all calibration data abreast: what is alive at one node must
fit in memory, for both, beside three copies of the model. Of the layer in hand there are a few matrices of
``min(rows, unknowns)`` squared.

**Batch norm** keeps its statistics, which are those of the outputs that the fits aim at. Estimating them anew in the
sweep, or by ``adapt-batch-norm`` afterwards, scales each channel, with the error in it, to unit variance under layers
that were fitted to it unscaled; see benchmarks/reconstruction.py for what that costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress import matching
from fxcompress.analysis.aliasing import Aliasing, aliasing
from fxcompress.analysis.channels import Labelled
from fxcompress.analysis.patches import READABLE, Readable, output_places, rows_at
from fxcompress.analysis.running import SteppedRun
from fxcompress.calibration import checked
from fxcompress.editing import private_copy
from fxcompress.pass_base import Example, Site
from fxcompress.passes.pruning.scoring import as_double
from fxcompress.passes.pruning.sizes import first_input
from fxcompress.passes.pruning.surgery import Surgery

__all__ = ["Reconstruction"]

_PLACES = 64
_ONE_IN = 4
"""One sample in as many is held out."""
_RIDGES = tuple(10.0**-i for i in range(-2, 13))

_READERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_FUNCTIONS = ("linear", "bilinear", *(f"conv{t}{i}d" for t in ("", "_transpose") for i in (1, 2, 3)))


class Reconstruction:
    """Refits the layers of ``gm`` that read fewer channels once ``surgery`` is done. To be made before it is done.

    :meth:`sites` are the layers and :meth:`operate` refits one of them, in their order: the sweep over the calibration
    data goes on from one to the next.
    """

    def __init__(self, gm: fx.GraphModule, batches: Iterable[Example], surgery: Surgery) -> None:
        self._gm, self._surgery, self._data = gm, surgery, checked(gm, batches)
        self._original = private_copy(gm).eval()
        self._was = dict(zip(gm.graph.nodes, self._original.graph.nodes, strict=True))
        bindings = [b for b in surgery.groups.bindings if b.dim == 0]
        self._kept = {name: torch.from_numpy(surgery.kept[b.classes]) for b in bindings for name in b.names}
        shared = aliasing(gm)
        self._obstacles = {node: _obstacle(gm, node, shared) for node in gm.graph.nodes if self._reads_fewer(node)}
        self._sweep: _Sweep | None = None

    def sites(self) -> Iterator[Site]:
        """The layers that read fewer channels, in graph order."""
        for node in self._obstacles:
            yield Site(node, self)

    def operate(self, node: fx.Node) -> Mapping[str, Any]:
        """Refit the layer that ``node`` calls; returns what to say of it.

        Returns:
            ``rows``, ``ridge`` (the lambda) and the errors before and after, each the norm of the difference to the
            original output relative to the norm of that output, over all rows; or ``not_refitted``, why.
        """
        if reason := self._obstacles[node]:
            return {"not_refitted": reason}
        if self._sweep is None:
            self._sweep = _Sweep(self._original, self._gm, self._was, self._data)
        with torch.no_grad(), torch.random.fork_rng(devices=self._sweep.cuda):
            layer, twin, values = self._sweep.until(node)
            try:
                fit = _fit(twin, values, self._kept.get(f"{node.target}.weight"))
            except _NotRefitted as reason:
                return {"not_refitted": str(reason)}
            for module in (layer, twin):
                module.weight.copy_(fit.weight)
                if module.bias is not None and fit.bias is not None:
                    module.bias.copy_(fit.bias)
        return fit.detail

    def _reads_fewer(self, node: fx.Node) -> bool:
        module = self._gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, _READERS) and not matching.is_call(node, _FUNCTIONS):
            return False
        x = self._surgery.groups.found.get(first_input(node))
        return isinstance(x, Labelled) and self._surgery.new_sizes(x) != tuple(x.shape)


def _obstacle(gm: fx.GraphModule, node: fx.Node, shared: Aliasing) -> str | None:
    """Why the layer at ``node`` cannot be refitted."""
    if node.op != "call_module":
        return "it is called as a function; tracing with example inputs makes it a module"
    module = gm.get_submodule(str(node.target))
    if not isinstance(module, READABLE) or type(module) not in READABLE or module.weight.is_complex():
        return f"of {type(module).__name__} there is no refit, only of real linear layers and convolutions"
    if not shared.is_private(module):
        return "it is called several times, or shares its weights"
    return matching.override_of(module)


class _NotRefitted(Exception):
    """Why a layer stays as it is."""


class _Sweep:
    """Both networks on all calibration data, node by node."""

    def __init__(
        self, original: fx.GraphModule, gm: fx.GraphModule, was: Mapping[fx.Node, fx.Node], data: list[Example]
    ) -> None:
        self._gm, self._twin, self._was = gm, private_copy(gm).eval(), was
        self._todo = zip(list(gm.graph.nodes), list(self._twin.graph.nodes), strict=True)
        self._before = [SteppedRun(original, batch.args, batch.kwargs) for batch in data]
        self._now = [SteppedRun(self._twin, batch.args, batch.kwargs) for batch in data]
        self._halted: fx.Node | None = None
        tensors = [*gm.parameters(), *gm.buffers()]
        self.cuda = sorted({t.device.index for t in tensors if t.is_cuda})

    def until(self, wanted: fx.Node) -> tuple[Readable, Readable, list[tuple[Tensor, Tensor]]]:
        """Go on to the layer that ``wanted`` calls.

        Returns:
            The layer, its twin in the network that runs, and for each batch what it reads now and what it gave before.
        """
        if self._halted is not None:
            self._step(self._halted)
        for node, twin in self._todo:
            before = self._was.get(node)
            if before is not None:
                for run in self._before:
                    run.step(before)
            if node is wanted:
                break
            self._step(twin)
        assert before is not None, "surgery adds no layers"
        self._halted = twin
        source = matching.tensor_input(twin)
        assert source is not None, "a layer reads a tensor"
        values = [(n.env[source], b.env[before]) for b, n in zip(self._before, self._now, strict=True)]
        layers = [g.get_submodule(str(wanted.target)) for g in (self._gm, self._twin)]
        return layers[0], layers[1], values  # type: ignore[return-value]

    def _step(self, node: fx.Node) -> None:
        for run in self._now:
            run.step(node)


# ------------------------------------------------------------------------------------------------- one layer
@dataclasses.dataclass(frozen=True)
class _Fit:
    weight: Tensor
    bias: Tensor | None
    detail: Mapping[str, Any]


def _fit(layer: Readable, values: list[tuple[Tensor, Tensor]], kept: Tensor | None) -> _Fit:
    """The weights with which ``layer`` comes nearest to what it gave.

    Args:
        layer: as pruning left it.
        values: for each batch its input now, and its original output.
        kept: which of the original outputs are still there; ``None`` if all.

    Raises:
        _NotRefitted: nothing would be better, or can be worked out.
    """
    rows = _Rows(layer, values, kept)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight = as_double(layer.weight)
    w = weight.reshape(groups, len(weight) // groups, -1).mT  # (groups, unknowns, outputs)
    basis = _basis(rows) if groups == 1 and rows.count <= w.shape[1] else None
    fitted, held, total = _moments(layer, rows, w, basis)
    everything = fitted.merged(held)
    before = everything.error(*everything.nothing())
    if not math.isfinite(before) or not bool(torch.isfinite(everything.gram).all()):
        raise _NotRefitted("its values on the calibration data are not finite")
    ridge = _ridge(fitted, held)
    d = None if ridge is None else everything.solution(ridge)
    if d is None:
        raise _NotRefitted("no change that fits most of the calibration data is better on the rest of it")
    s = everything.shift(d)
    error = [math.sqrt(max(e, 0.0) / total) if total else 0.0 for e in (before, everything.error(d, s))]
    return _Fit(
        (w + (d if basis is None else basis @ d)).mT.reshape(weight.shape),
        None if layer.bias is None else as_double(layer.bias) + s.flatten(),
        {"rows": rows.count, "ridge": ridge, "error_before": error[0], "error_after": error[1]},
    )


def _moments(layer: Readable, rows: _Rows, w: Tensor, basis: Tensor | None) -> tuple[_Sums, _Sums, float]:
    """Of inputs and what is missing at the outputs: for rows to fit and for those held out; and the sum of |y|^2."""
    parts: list[_Sums | None] = [None, None]
    total = 0.0
    for x, y, hold in rows:
        total += float(y.square().sum())
        r = y.reshape(len(y), len(w), -1).transpose(0, 1) - x @ w
        if layer.bias is not None:
            r = r - as_double(layer.bias).reshape(len(w), 1, -1)
        x = x if basis is None else x @ basis
        for i, some in enumerate((~hold, hold)):
            sums, earlier = _Sums.of(x[:, some], r[:, some], layer.bias is not None), parts[i]
            parts[i] = sums if earlier is None else earlier.merged(sums)
    fitted, held = parts
    assert fitted is not None, "there are rows"
    assert held is not None, "there are rows"
    return fitted, held, total


def _ridge(fitted: _Sums, held: _Sums) -> float | None:
    """The lambda whose fit to the ones is best on the others; ``None`` if that is no better than no change."""
    least, last, best = held.error(*held.nothing()), math.inf, None
    for ridge in _RIDGES:
        d = fitted.solution(ridge)
        error = math.inf if d is None else held.error(d, fitted.shift(d))
        if not error < last:
            break
        last = error
        if error < least:
            least, best = error, ridge
    return best


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Moments of rows x and r; two of them merge as Chan, Golub & LeVeque (1979) have it for one variable.

    Attributes:
        count: how many rows.
        mean_x, mean_r: ``(groups, 1, unknowns)`` and ``(groups, 1, outputs)``; zero if not centred.
        gram, cross: sums of ``x x'`` and ``x r'`` about the means; a matrix for each group.
        square: the sum of ``|r|^2`` about the mean.
    """

    count: int
    mean_x: Tensor
    mean_r: Tensor
    gram: Tensor
    cross: Tensor
    square: float

    @classmethod
    def of(cls, x: Tensor, r: Tensor, centred: bool) -> _Sums:
        """Of rows ``(groups, rows, unknowns)`` and ``(groups, rows, outputs)``."""
        count = x.shape[1]
        mean_x, mean_r = (v.sum(1, keepdim=True) * (centred / max(count, 1)) for v in (x, r))
        x, r = x - mean_x, r - mean_r
        return cls(count, mean_x, mean_r, x.mT @ x, x.mT @ r, float(r.square().sum()))

    def merged(self, other: _Sums) -> _Sums:
        """Of the rows of both."""
        count = self.count + other.count
        part, weight = other.count / max(count, 1), self.count * other.count / max(count, 1)
        x, r = other.mean_x - self.mean_x, other.mean_r - self.mean_r
        return _Sums(
            count,
            self.mean_x + part * x,
            self.mean_r + part * r,
            self.gram + other.gram + weight * (x.mT @ x),
            self.cross + other.cross + weight * (x.mT @ r),
            self.square + other.square + weight * float(r.square().sum()),
        )

    def solution(self, ridge: float) -> Tensor | None:
        """The best D, of the shape of :attr:`cross`; ``None`` where rounding makes the matrix singular."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        added = ridge * diagonal.mean(1, keepdim=True) + torch.finfo(diagonal.dtype).tiny
        factor, failed = torch.linalg.cholesky_ex(self.gram + torch.diag_embed(added.expand_as(diagonal)))
        return None if bool(failed.any()) else torch.cholesky_solve(self.cross, factor)

    def nothing(self) -> tuple[Tensor, Tensor]:
        """The D and s that change nothing."""
        return torch.zeros_like(self.cross), torch.zeros_like(self.mean_r)

    def shift(self, d: Tensor) -> Tensor:
        """The s that belongs to ``d``."""
        return self.mean_r - self.mean_x @ d

    def error(self, d: Tensor, s: Tensor) -> float:
        """The sum of ``|r - D x - s|^2``."""
        inside = self.square - 2 * (d * self.cross).sum() + (d * (self.gram @ d)).sum()
        return float(inside + self.count * (self.mean_r - self.mean_x @ d - s).square().sum())


# ------------------------------------------------------------------------------------------------- rows
class _Rows:
    """The rows of one layer, batch by batch and the same ones every time: ``(groups, rows, unknowns)`` of the input,
    ``(rows, outputs)`` of the original output, and which of them are held out; float64."""

    def __init__(self, layer: Readable, values: list[tuple[Tensor, Tensor]], kept: Tensor | None) -> None:
        self._layer, self._kept = layer, kept
        self._values = [_with_samples(layer, x, y) for x, y in values]
        counts = [(len(y), min(math.prod(_places(layer, y)), _PLACES)) for _, y in self._values]
        self.count = sum(n * places for n, places in counts)
        if self.count < _ONE_IN:
            raise _NotRefitted(f"the calibration data have {self.count} rows for it")
        self._by_sample = sum(n for n, _ in counts) >= _ONE_IN

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        samples = rows = 0
        for x, y in self._values:
            n, places = len(y), math.prod(_places(self._layer, y))
            if places > _PLACES:
                chosen = torch.randint(places, (n, _PLACES), generator=generator)
            else:
                chosen = torch.arange(places).expand(n, places)
            taken, given = _take(self._layer, x, y, chosen.to(x.device))
            number = torch.arange(chosen.numel())
            number = samples + number // max(chosen.shape[1], 1) if self._by_sample else rows + number
            samples, rows = samples + n, rows + chosen.numel()
            given = given if self._kept is None else given[:, self._kept.to(given.device)]
            hold = (number % _ONE_IN == _ONE_IN - 1).to(given.device)
            yield as_double(taken).transpose(0, 1), as_double(given), hold.to(as_double(given).device)


def _basis(rows: _Rows) -> Tensor:
    """Orthonormal columns that span all rows of a layer with one group."""
    spanned: Tensor = torch.linalg.qr(torch.cat([x[0] for x, _, _ in rows]).mT)[0]
    return spanned


def _places(layer: Readable, y: Tensor) -> tuple[int, ...]:
    """The sizes of an output without samples and channels."""
    return tuple(y.shape[1:-1] if isinstance(layer, nn.Linear) else y.shape[2:])


def _with_samples(layer: Readable, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Input and original output with samples in the first dimension."""
    if y.dim() == (1 if isinstance(layer, nn.Linear) else layer.weight.dim() - 1):
        x, y = x[None], y[None]
    if len(x) != len(y) or output_places(layer, x) != _places(layer, y):
        raise _NotRefitted("its output had other places in the original network")
    return x, y


def _take(layer: Readable, x: Tensor, y: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows at ``chosen`` places, ``(samples, places)``: ``(rows, groups, unknowns)`` and ``(rows, outputs)``."""
    samples = torch.arange(len(y), device=chosen.device)[:, None]
    given = y.reshape(len(y), -1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.flatten(2).transpose(1, 2)
    return rows_at(layer, x, chosen), given[samples, chosen].flatten(0, 1)
