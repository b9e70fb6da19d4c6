"""Chains of passes: what to draw them from, and what has to hold after every step of one.

:data:`OPTIONS` has a line for every registered pass, so that a new one cannot be forgotten.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import event
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils import _pytree as pytree

import fxcompress
from fxcompress import Guarantee, Pass, PreconditionError
from fxcompress.double import default_float64, double_graph
from fxcompress.passes.distillation import AttachDistillation, SoftTargets
from fxcompress.registry import resolve
from tests import contract
from tests.networks import Inputs, Network, assert_same_structure, relative_error, run, shells

__all__ = ["OPTIONS", "chains", "check_chain", "check_compiled"]

_ALDS = ("ratio=0.3", "ratio=0.2,error=activation", "ratio=0.4,measure=macs", "ratio=0.3,error=operator,solver=minimax")
OPTIONS: dict[str, tuple[str, ...]] = {
    "remove-identity": ("",),
    "fold-batch-norm": ("",),
    "adapt-batch-norm": ("", "mode=batch"),
    "prune-zero-channels": ("",),
    "prune-channels": (
        "ratio=0.3",
        "ratio=0.5,scope=global,attention=head_dim",
        "ratio=0.3,measure=params",
        "ratio=0.4,reconstruct=True",
        "ratio=0.3,round_to=2,importance=random",
    ),
    "alds": _ALDS,
    "alds-plus": ("ratio=0.3", "ratio=0.2,max_slices=2"),
    "svd": ("ratio=0.3",),
    "svd-energy": ("ratio=0.3",),
    "pca": ("ratio=0.3",),
    "learned-rank": ("ratio=0.3",),
    "equalize-layers": ("", "powers_of_two=False"),
    "smooth-quant": ("", "alpha=0.8,layers=False"),
    "fake-quantize": (
        "",
        "learned=True,round_addends=True",
        "weight_bits=4,granularity=tensor",
        "activation_bits=None",
    ),
    "quantize": (
        "",
        "observer=min-max,rounding=adaptive",
        "dynamic=True",
        "activation_bits=None,weight_bits=4",
        "symmetric=True,keep_ends=True",
        "round_addends=True",
    ),
    "lower-int8": ("",),
    "cast-precision": ("", "dtype=float16"),
    "attach-distillation": ("",),
    "detach-distillation": ("",),
}
"""Name of a pass -> options to draw, the simplest first."""


_AFTER = {"lower-int8": "quantize", "detach-distillation": "attach-distillation"}
"""What these would find nothing without."""


@st.composite
def chains(draw: st.DrawFn, most: int = 5) -> list[str]:
    """1 to ``most`` passes with options, each pass once, in any order."""
    names = draw(st.permutations(list(OPTIONS)))[: draw(st.sampled_from(range(most, 0, -1)))]
    wanted = [other for name, other in _AFTER.items() if name in names and other not in names]
    kept = [name for name in names if name in _AFTER or name in _AFTER.values()]
    names = [*kept, *wanted, *(name for name in names if name not in kept)][: max(most, len(kept) + len(wanted))]
    drawn = [(name, draw(st.sampled_from(OPTIONS[name]))) for name in names]
    return [f"{name}:{options}" if options else name for name, options in drawn]


def _pass(spec: str, network: Network) -> Pass:
    """The pass; who learns, learns from the network itself."""
    if spec != AttachDistillation.name:
        return resolve(spec)
    return AttachDistillation(network.module, [SoftTargets(channel_dim=-1)])


@dataclasses.dataclass
class _Chain:
    """How far a chain is."""

    network: Network
    gm: fx.GraphModule
    done: list[Pass] = dataclasses.field(default_factory=list)

    @property
    def fused(self) -> bool:
        """Whether a teacher is in the graph."""
        names = [p.name for p in self.done]
        return "attach-distillation" in names and "detach-distillation" not in names

    @property
    def student(self) -> nn.Module:
        """The graph as something that gives what the network gives."""
        return _Student(self.gm) if self.fused else self.gm

    def given(self) -> dict[str, Any]:
        """Inputs and data for ``compile``."""
        network = self.network
        return {
            "example_inputs": network.args,
            "example_kwargs": network.kwargs,
            "calibration": network.calibration(),
        }


class _Student(nn.Module):
    """The first output."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.gm = gm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.gm(*args, **kwargs)[0]


def check_chain(network: Network, specs: Sequence[str], *, thorough: bool = False) -> list[Pass]:
    """Run a chain in its recommended order, step by step, and check what holds after each.

    Args:
        network: what is compressed.
        specs: the passes.
        thorough: also export and compile after every step, and not only at the end.

    Returns:
        The passes that did not refuse the network.
    """
    before = contract.snapshot(network.module)
    chain = _Chain(network, fxcompress.trace(network.module, network.args, example_kwargs=network.kwargs))
    for spec in fxcompress.recommended_order(specs):
        pass_ = _pass(spec, network)
        try:
            after = fxcompress.compile(chain.gm, [pass_], **chain.given())
        except PreconditionError as refusal:
            event(f"refused: {pass_.name}: {str(refusal)[:60]}")
            continue
        earlier = chain.gm
        chain.gm, chain.done = after, [*chain.done, pass_]
        _check_guarantee(chain, earlier)
        _check_model(chain)
        if thorough:
            check_exported(chain)
    contract.assert_untouched(before, contract.snapshot(network.module))
    if chain.done:
        check_exported(chain)
        check_compiled(chain.student, network, "eager")
        _check_in_one_call(chain)
    return chain.done


# ------------------------------------------------------------------------------------------------- after every step
def _check_guarantee(chain: _Chain, before: fx.GraphModule) -> None:
    """What the record says of the last pass, and for an exact one equality in float64, on inputs that it never saw."""
    pass_, record = chain.done[-1], fxcompress.report(chain.gm).passes[-1]
    assert (record.name, record.guarantee) == (pass_.name, pass_.guarantee.value)
    if not record.verified:
        mixed = any(p.guarantee is Guarantee.APPROXIMATE for p in chain.done[:-1])
        own = chain.network.tolerance > 1e-10
        assert "not proved" in record.verification, record.verification
        assert mixed or own, f"{pass_.name} was not proved: {record.verification}"
    _check_error(chain, before, record.error)
    if pass_.guarantee is not Guarantee.EXACT:
        return
    if record.verified and record.sites:
        assert record.error is not None
        assert record.error <= 1e-9
    if all(p.guarantee is not Guarantee.APPROXIMATE for p in chain.done) and not chain.fused:
        _check_in_double(chain, before)


def _check_in_double(chain: _Chain, before: fx.GraphModule) -> None:
    """The pass that ended ``chain``, on the graph before it in float64, at another batch size too."""
    pass_, double = chain.done[-1], chain.network.double()
    if pass_.name == "detach-distillation" and "attach-distillation" in [p.name for p in chain.done[:-1]]:
        return  # the student was compared when it was attached
    given = {"example_inputs": double.args, "example_kwargs": double.kwargs, "calibration": double.calibration()}
    with default_float64():
        wide = double_graph(before)
        found = fxcompress.compile(wide, [pass_], verify=False, **given)
        for seed, batch in ((31, double.batch), (32, double.batch + 1)):
            inputs = double.fresh(seed, batch)
            error = relative_error(run(wide, inputs), run(found, inputs))
            assert error <= max(1e-9, double.tolerance), f"{pass_.name} is off by {error:.1e} in float64"


def _check_error(chain: _Chain, before: fx.GraphModule, recorded: float | None) -> None:
    """The error that was recorded is not below that on the example inputs."""
    network, names = chain.network, [p.name for p in chain.done]
    if recorded is None or names[-1] in ("attach-distillation", "detach-distillation"):
        return  # these take other outputs than they leave
    inputs = (network.args, network.kwargs)
    # Of a teacher's pupil the output alone: a loss may well have been 0 before.
    expected, found = (
        pytree.tree_leaves(run(gm, inputs)[0] if chain.fused else run(gm, inputs)) for gm in (before, chain.gm)
    )
    for a, b in zip(expected, found, strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel():
            error = float((a - b).abs().max() / (a.abs().max() or 1.0))
            assert error <= 1.001 * recorded + 1e-4, f"{names[-1]} records {recorded:.1e} and is off by {error:.1e}"


def _check_model(chain: _Chain) -> None:
    """What a graph is good for, whatever passes made it."""
    network, gm, last = chain.network, chain.gm, chain.done[-1]
    contract.check_outputs(network, chain.student)
    contract.check_state_dict(last, network, gm)
    contract.check_arithmetic(gm, network)
    if all(p.trainable for p in chain.done):
        contract.check_trains(last, network, gm)
    inputs = network.fresh(33)
    expected, history = run(gm, inputs), fxcompress.report(gm).to_dict()
    for name, copied in COPIES.items():
        other = copied(gm)
        assert relative_error(expected, run(other, inputs)) == 0, f"other outputs after {name}"
        assert fxcompress.report(other).to_dict() == history, f"another report after {name}"
        flags = {n: m.training for n, m in gm.named_modules() if type(m).forward is not nn.Module.forward}
        kept = {n: m.training for n, m in other.named_modules() if n in flags}
        assert kept == flags, f"other modes after {name}"
    back = copy.deepcopy(gm).train().eval()
    assert relative_error(expected, run(back, inputs)) == 0, "train() and eval() leave something behind"


def _pickled(gm: fx.GraphModule) -> fx.GraphModule:
    return pickle.loads(pickle.dumps(gm))  # type: ignore[no-any-return]


def _saved(gm: fx.GraphModule) -> fx.GraphModule:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "loading this graph will take trusted")
        fxcompress.save(gm, Path(folder) / "saved")
        return fxcompress.load(Path(folder) / "saved", trusted=(shells.Output, shells.Pair))


COPIES: dict[str, Callable[[fx.GraphModule], fx.GraphModule]] = {
    "deepcopy": copy.deepcopy, "pickle": _pickled, "save and load": _saved,
}  # fmt: skip
"""Ways in which a graph comes back the same."""


# ------------------------------------------------------------------------------------------------- ways out
def check_exported(chain: _Chain) -> None:
    """``torch.export`` of the graph gives what it gives, unless the network's own graph cannot be exported."""
    args, kwargs = chain.network.fresh(34)
    student = chain.student
    try:
        program = torch.export.export(student, args, kwargs, strict=False)
    except Exception:
        plain = fxcompress.trace(chain.network.module, chain.network.args, example_kwargs=chain.network.kwargs)
        try:
            torch.export.export(plain, args, kwargs, strict=False)
        except Exception as own:
            event(f"the network cannot be exported: {type(own).__name__}")
            return
        raise
    inputs = chain.network.fresh(35)
    # Leaves alone: of what is a list export makes a list of a class of its own.
    expected, found = map(pytree.tree_leaves, (_run_as_compiled(student, inputs), run(program.module(), inputs)))
    assert relative_error(expected, found) < 1e-4


def _run_as_compiled(gm: nn.Module, inputs: Inputs) -> Any:
    """What ``gm`` gives where modules show what they stand for: kernels round where that rounds, within a quantum."""
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        return run(gm, inputs)


def check_compiled(gm: nn.Module, network: Network, backend: str) -> None:
    """``torch.compile`` gives what the graph gives, at two batch sizes."""
    torch._dynamo.reset()
    fast: Any = torch.compile(gm, backend=backend, dynamic=False)
    for seed, batch in ((36, network.batch), (37, network.batch + 1)):
        inputs = network.fresh(seed, batch)
        expected, found = _run_as_compiled(gm, inputs), run(fast, inputs)
        assert_same_structure(expected, found)
        assert relative_error(expected, found) < 1e-3, f"torch.compile with {backend}"


def _check_in_one_call(chain: _Chain) -> None:
    """One call of ``compile`` ends where a call for each pass does."""
    once = fxcompress.compile(chain.network.module, chain.done, **chain.given())
    inputs = chain.network.fresh(38)
    assert relative_error(run(chain.gm, inputs), run(once, inputs)) == 0, "one call gives another graph"
    for one, many in zip(fxcompress.report(once).passes, fxcompress.report(chain.gm).passes, strict=True):
        found, expected = ((r.name, r.sites, r.bytes_after, r.error) for r in (one, many))
        assert found == expected, "one call gives another record"
