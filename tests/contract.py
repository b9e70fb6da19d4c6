"""What every pass owes, whatever it does. Each function takes a pass (an instance or a registered name) and a network.

Most take the compiled ``result`` too, so that :func:`check_contract` compiles once; without it they compile themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.errors import PreconditionError
from fxcompress.pass_base import Guarantee, Pass
from tests.networks import Network, assert_same_structure, leaves, relative_error, run

__all__ = [
    "assert_untouched",
    "check_arithmetic",
    "check_contract",
    "check_copies",
    "check_equivalence",
    "check_idempotence",
    "check_outputs",
    "check_plan",
    "check_state_dict",
    "check_trains",
    "check_untouched",
    "compress",
    "instance",
    "snapshot",
]

FLOAT32_TOLERANCE = 1e-3
"""Relative. Not the proof of equality, which is made in float64: this only finds what is wrong in float32 alone."""


def instance(pass_: Pass | str) -> Pass:
    """The pass itself, or the registered one of that name with its default options."""
    return fxcompress.registered_passes()[pass_]() if isinstance(pass_, str) else pass_


def _given(pass_: Pass, network: Network) -> dict[str, Any]:
    data = network.calibration() if pass_.calibration_reads() else None
    return {"example_inputs": network.args, "example_kwargs": network.kwargs, "calibration": data}


def compress(pass_: Pass | str, network: Network, verify: bool = True) -> fx.GraphModule:
    """The network after this one pass."""
    pass_ = instance(pass_)
    return fxcompress.compile(network.module, [pass_], verify=verify, **_given(pass_, network))


# --- outputs ---


def check_equivalence(pass_: Pass | str, network: Network, result: fx.GraphModule | None = None) -> None:
    """The outputs keep the pass's guarantee on inputs that it never saw, at other batch sizes too."""
    pass_ = instance(pass_)
    result = compress(pass_, network) if result is None else result
    # Mere containers have no forward, and so nothing that the flag could change.
    computing = {n: m for n, m in result.named_modules() if type(m).forward is not nn.Module.forward}
    training = [name for name, module in computing.items() if module.training]
    assert not training, f"the model was in eval mode, these modules are not: {training}"
    if pass_.guarantee is Guarantee.EXACT:
        check_outputs(network, result, FLOAT32_TOLERANCE)
        double = network.double()
        # Without the engine's verification: this is the check of the pass, that would be one of the engine.
        check_outputs(double, compress(pass_, double, verify=False), network.tolerance)
    else:
        check_outputs(network, result)


def check_outputs(network: Network, result: nn.Module, tolerance: float | None = None) -> None:
    """On fresh inputs of several batch sizes: outputs in the same containers, finite, equal within ``tolerance``."""
    for seed, batch in ((11, network.batch), (12, network.batch + 2), (13, 1)):
        inputs = network.fresh(seed, batch)
        expected, found = run(network.module, inputs), run(result, inputs)
        assert_same_structure(expected, found)
        finite = all(leaf.isfinite().all() for _, leaf in leaves(found) if isinstance(leaf, Tensor))
        assert finite, f"outputs that are not finite at batch size {batch}"
        if tolerance is not None:
            error = relative_error(expected, found)
            assert error <= tolerance, f"off by {error:.1e} at batch size {batch} in {network.dtype}"


# --- the caller's model ---


def snapshot(module: nn.Module) -> dict[str, Any]:
    """All there is to see of a model: tensors by value and identity, flags, hooks, attributes, the tree."""
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    modules = dict(module.named_modules(remove_duplicate=False))
    return {
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "state_dict": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "grad": {name: tensor.grad is not None for name, tensor in tensors.items()},
        "tree": {name: (id(m), type(m)) for name, m in modules.items()},
        "training": {name: m.training for name, m in modules.items()},
        # `forward` patched on an instance would show among the attributes.
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "hooks": {name: {k: list(v) for k, v in vars(m).items() if k.endswith("hooks")} for name, m in modules.items()},
    }


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def assert_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two snapshots, or the parts of them in ``before``, are the same to the bit."""
    for part, expected in before.items():
        found = after[part]
        assert list(found) == list(expected), f"the caller's model has another set of {part}"
        for name, value in expected.items():
            same = _same_bits(value, found[name]) if isinstance(value, Tensor) else value == found[name]
            assert same, f"the caller's model has another {part} of {name!r}"


def check_untouched(pass_: Pass | str, network: Network) -> fx.GraphModule | None:
    """The caller's model and inputs stay as they were, to the bit.

    Returns:
        The compressed network, or ``None`` where the pass refuses the whole model.
    """
    before, inputs = snapshot(network.module), copy.deepcopy((network.args, network.kwargs))
    try:
        result: fx.GraphModule | None = compress(pass_, network)
    except PreconditionError:
        result = None
    assert_untouched(before, snapshot(network.module))
    given = [leaf for _, leaf in leaves((network.args, network.kwargs))]
    for (path, expected), found in zip(leaves(inputs), given, strict=True):
        same = _same_bits(expected, found) if isinstance(expected, Tensor) else expected == found
        assert same, f"the example input {path} was changed"
    if result is not None:
        mine = {t.untyped_storage().data_ptr() for t in network.module.state_dict().values() if t.numel()}
        shared = [k for k, t in result.state_dict().items() if t.numel() and t.untyped_storage().data_ptr() in mine]
        assert not shared, f"the result shares memory with the caller's model: {shared}"
    return result


# --- the result as a PyTorch model ---


def check_idempotence(pass_: Pass | str, network: Network, result: fx.GraphModule | None = None) -> None:
    """A second run finds no site and changes nothing. Owed by exact passes; others may compress further each time."""
    pass_ = instance(pass_)
    if pass_.guarantee is not Guarantee.EXACT:
        pytest.skip(f"{pass_.name} is not exact")
    result = compress(pass_, network) if result is None else result
    again = fxcompress.compile(result, [pass_], **_given(pass_, network))
    record = fxcompress.report(again).to_dict()["passes"][-1]
    assert record["sites"] == 0, f"{pass_.name} finds sites again: {record['details']}"
    assert again.code == result.code, f"{pass_.name} rewrote the graph again"
    assert_untouched({"state_dict": result.state_dict()}, {"state_dict": again.state_dict()})


def check_state_dict(pass_: Pass | str, network: Network, result: fx.GraphModule | None = None) -> None:
    """The result's ``state_dict`` loads strictly into a copy of it and brings back what was zeroed there."""
    result = compress(pass_, network) if result is None else result
    other = copy.deepcopy(result)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.copy_(torch.zeros_like(tensor))
    other.load_state_dict(result.state_dict(), strict=True)
    inputs = network.fresh(21)
    assert relative_error(run(result, inputs), run(other, inputs)) == 0, "state_dict does not carry the whole model"


def check_copies(pass_: Pass | str, network: Network, result: fx.GraphModule | None = None) -> None:
    """``deepcopy`` and pickle, in either order, give the same outputs, the same ties and the same report."""
    result = compress(pass_, network) if result is None else result
    inputs = network.fresh(22)
    expected, history = run(result, inputs), fxcompress.report(result).to_dict()
    copied = copy.deepcopy(result)
    pickled = pickle.loads(pickle.dumps(result))
    both = pickle.loads(pickle.dumps(copied))
    for name, other in (("deepcopy", copied), ("pickle", pickled), ("deepcopy and pickle", both)):
        assert relative_error(expected, run(other, inputs)) == 0, f"other outputs after {name}"
        assert _parameters(other) == _parameters(result), f"ties between parameters are lost in {name}"
        assert fxcompress.report(other).to_dict() == history, f"another report after {name}"


def _gradients(module: nn.Module, network: Network) -> dict[str, Tensor | None]:
    """The gradient of every parameter after one step's backward in training mode, on a copy."""
    module = copy.deepcopy(module).train()
    args, kwargs = copy.deepcopy(network.fresh(23, batch=4))
    outputs = [leaf for _, leaf in leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if outputs:
        torch.stack([leaf.square().sum() for leaf in outputs]).sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_trains(pass_: Pass | str, network: Network, result: fx.GraphModule | None = None) -> None:
    """In training mode every parameter gets a finite gradient, unless it or its module had none before the pass."""
    if not instance(pass_).trainable:
        return
    result = compress(pass_, network) if result is None else result
    reference, found = _gradients(network.module, network), _gradients(result, network)
    idle = {name.rpartition(".")[0] for name, grad in reference.items() if grad is None}
    idle -= {name.rpartition(".")[0] for name, grad in reference.items() if grad is not None}
    for name, grad in found.items():
        if grad is None:
            had_none = name in reference and reference[name] is None
            assert had_none or name.rpartition(".")[0] in idle, f"{name} gets no gradient any more"
        else:
            assert grad.isfinite().all(), f"the gradient of {name} is not finite"
    frozen = {name for name, p in network.module.named_parameters() if not p.requires_grad}
    assert not frozen & found.keys(), f"frozen parameters train now: {frozen & found.keys()}"
    if any(grad is not None for grad in reference.values()):
        assert any(grad is not None for grad in found.values()), "nothing trains any more"


# --- the record ---


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in _unique(module.parameters()))


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in _unique([*module.parameters(), *module.buffers()]))


def check_arithmetic(result: fx.GraphModule, network: Network) -> None:
    """The report's sizes are those one counts, each record starts where the one before it ended, and totals agree."""
    report = fxcompress.report(result).to_dict()
    records, total = report["passes"], report["total"]
    traced = fxcompress.trace(network.module, network.args, example_kwargs=network.kwargs)
    for when, module in (("before", traced), ("after", result)):
        assert total[f"parameters_{when}"] == _parameters(module), f"miscounted parameters {when}"
        assert total[f"bytes_{when}"] == _bytes(module), f"miscounted bytes {when}"
    for what in ("parameters", "macs", "bytes"):
        before, after = [r[f"{what}_before"] for r in records], [r[f"{what}_after"] for r in records]
        assert before[1:] == after[:-1], f"{what}: a record does not start where the one before it ended"
        assert total[f"{what}_before"] == before[0], f"{what}: the total does not start with the first pass"
        assert total[f"{what}_after"] == after[-1], f"{what}: the total does not end with the last pass"
    for record in records:
        assert len(record["details"]) == record["sites"]
        assert all(refusal["reason"] for refusal in record["refusals"]), "a refusal without a reason"
    for name, what in (("cr_p", "parameters"), ("cr_f", "macs")):
        before, after = total[f"{what}_before"], total[f"{what}_after"]
        expected = 100 * (1 - after / before) if before else 0.0
        assert total[name] == pytest.approx(expected), f"{name} is not the reduction of {what} in percent"
    # The total covers the recording of the model too.
    assert 0 < sum(record["seconds"] for record in records) <= total["seconds"]


def check_plan(pass_: Pass | str, network: Network, result: fx.GraphModule | None = None) -> None:
    """A dry run foretells what the pass does, and changes nothing."""
    pass_ = instance(pass_)
    result = compress(pass_, network) if result is None else result
    before = snapshot(network.module)
    (planned,) = fxcompress.plan(network.module, [pass_], **_given(pass_, network)).passes
    assert_untouched(before, snapshot(network.module))
    record = fxcompress.report(result).to_dict()["passes"][-1]
    assert planned.name == record["name"] == pass_.name
    assert record["guarantee"] == pass_.guarantee.value
    assert len(planned.sites) == record["sites"], "another number of sites than planned"
    refused = [(refusal.node, refusal.reason) for refusal in planned.refusals]
    assert refused == [(r["node"], r["reason"]) for r in record["refusals"]], "other refusals than planned"


def check_contract(pass_: Pass | str, network: Network) -> int | None:
    """All of the above.

    Returns:
        How many sites were rewritten, or ``None`` where the pass refuses the whole model.
    """
    pass_ = instance(pass_)
    assert dataclasses.is_dataclass(pass_), "a pass is a frozen dataclass"
    result = check_untouched(pass_, network)
    if result is None:
        return None
    check_equivalence(pass_, network, result)
    check_state_dict(pass_, network, result)
    check_copies(pass_, network, result)
    check_trains(pass_, network, result)
    check_arithmetic(result, network)
    check_plan(pass_, network, result)
    if pass_.guarantee is Guarantee.EXACT:
        check_idempotence(pass_, network, result)
    sites: int = fxcompress.report(result).to_dict()["passes"][-1]["sites"]
    return sites
