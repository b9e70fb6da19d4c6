"""Which models half of the channels can be pruned from, beside Torch-Pruning.

Random live weights, eval mode, ``PruneChannels(ratio=0.5, importance="l1")`` against Torch-Pruning's ``BasePruner``
with the settings of its own tests: magnitude with p=1, ratio 0.5, the layers that make the output ignored, the free
parameters of torchvision's ViT and ConvNeXt declared, the widths of ViT rounded to its heads. A success is a model that
runs on inputs it has not seen, at another batch size, has outputs of the same shapes, and fewer parameters. Seconds are
processor time: *groups* from a traced graph to its groups (theirs: the dependency graph), *prune* what follows.
*Frozen* is the share of channels that may not go for any other
reason than that they are the model's output.

Run ``python benchmarks/pruning_coverage.py [--sets tv-classification,timm] [--models REGEX] [--peers] [--jobs 2]``.
Without ``--models`` the results of the sets that ran replace those in benchmarks/results/pruning_coverage.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import unittest.mock
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import isolated
import publish
import torch
from agreement import forward
from models import SETS, Inputs, Model, Run, select
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import fxcompress
from fxcompress.analysis.channels import channel_groups
from fxcompress.apply import apply_pass
from fxcompress.pass_base import Example
from fxcompress.passes.pruning import PruneChannels, prune_channels

_SETS = [name for name in SETS if name not in ("tv-detection", "tv-flow")]
_RATIO, _OTHER_BATCH = 0.5, 3
_OUTPUT = "the model's output"


# ---------------------------------------------------------------------------------------------------------- measuring
def measure(model: Model, stage: Callable[[str], None], peer: bool) -> dict[str, Any]:
    """Prune one model by one of the two; see the headers in :func:`_row` for what is kept."""
    stage("the model itself")
    run = model.run()
    fresh = run.inputs(seed=1, batch=_OTHER_BATCH)
    try:
        expected = _shapes(forward(run.module, fresh))
    except Exception:  # it runs at no other batch size
        fresh = run.inputs(seed=1)
        expected = _shapes(forward(run.module, fresh))
    before = {"parameters": _parameters(run.module), "macs": _macs(run.module, run.inputs(seed=0))}
    graph = fxcompress.trace(run.module, run.inputs(seed=0)[0], example_kwargs=run.inputs(seed=0)[1])
    stage("prune")
    pruned, record = _theirs(run, graph) if peer else _ours(run)
    stage("run")
    found = _shapes(forward(pruned, fresh))
    if found != expected:
        raise RuntimeError(f"the outputs have shapes {found}, and had {expected}")
    after = {"parameters": _parameters(pruned), "macs": _macs(pruned, run.inputs(seed=0))}
    if after["parameters"] >= before["parameters"]:
        raise RuntimeError("no parameter is gone")
    return record | {"before": before, "after": after}


def _ours(run: Run) -> tuple[nn.Module, dict[str, Any]]:
    args, kwargs = run.inputs(seed=0)
    start = time.process_time()
    graph = fxcompress.trace(run.module, args, example_kwargs=kwargs)
    traced = time.process_time()
    groups = channel_groups(graph, args, kwargs)
    seconds = {"trace": traced - start, **ours_on(graph, args, kwargs)}
    reasons = Counter[str]()
    for frozen in groups.frozen:
        if frozen.reason != _OUTPUT:
            reasons[frozen.reason] += frozen.channels
    frozen_record = {"channels": groups.channels, "frozen": sum(reasons.values()), "reasons": reasons.most_common(5)}
    return graph, {"timing": seconds, **frozen_record}


def ours_on(graph: torch.fx.GraphModule, args: Any, kwargs: Any) -> dict[str, float]:
    """Prune ``graph`` itself; processor seconds of the analysis and of what follows it."""
    seconds = {"groups": 0.0}

    def timed(*given: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return channel_groups(*given, **options)
        finally:
            seconds["groups"] += time.process_time() - start

    start = time.process_time()
    with unittest.mock.patch.object(prune_channels, "channel_groups", timed):
        apply_pass(PruneChannels(ratio=_RATIO, importance="l1"), graph, Example(args, kwargs), None, lambda event: None)
    return seconds | {"prune": time.process_time() - start - seconds["groups"]}


def _theirs(run: Run, graph: torch.fx.GraphModule) -> tuple[nn.Module, dict[str, Any]]:
    args, kwargs = run.inputs(seed=0)
    made = output_layers(graph, args, kwargs)
    start = time.process_time()
    module, pruner = peer_pruner(run, made)
    built = time.process_time()
    pruner.step()
    done = time.process_time()
    if type(module).__name__ == "VisionTransformer" and hasattr(module, "conv_proj"):
        module.hidden_dim = module.conv_proj.out_channels
    return module, {"timing": {"groups": built - start, "prune": done - built}}


def output_layers(graph: torch.fx.GraphModule, args: Any, kwargs: Any) -> set[str]:
    """Paths of the layers that make the output."""
    return {f.module for f in channel_groups(graph, args, kwargs).frozen if f.reason == _OUTPUT}


def peer_pruner(run: Run, made: Collection[str]) -> tuple[nn.Module, Any]:
    """A copy of the model, and Torch-Pruning's pruner for it; the layers ``made`` make the output."""
    import torch_pruning as tp

    args, kwargs = run.inputs(seed=0)
    module = copy.deepcopy(run.module).requires_grad_(True)
    options = _settings(module)
    options["ignored_layers"] = [m for path, m in module.named_modules() if path in made]
    pruner = tp.pruner.BasePruner(
        module,
        args if args else kwargs,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=_RATIO,
        forward_fn=lambda m, inputs: m(*args, **kwargs),
        output_transform=_scalar,
        **options,
    )
    return module, pruner


def _settings(module: nn.Module) -> dict[str, Any]:
    """What Torch-Pruning's tests tell it of torchvision's models."""
    from torchvision.models.convnext import CNBlock
    from torchvision.models.vision_transformer import VisionTransformer

    free: list[tuple[Any, int]] = [(m.layer_scale, 0) for m in module.modules() if isinstance(m, CNBlock)]
    options: dict[str, Any] = {}
    if isinstance(module, VisionTransformer):
        free += [(module.class_token, 2), (module.encoder.pos_embedding, 2)]
        options["round_to"] = module.encoder.layers[0].num_heads
    return options | ({"unwrapped_parameters": free} if free else {})


def _scalar(output: Any) -> torch.Tensor:
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not leaves and hasattr(output, "to_tuple"):
        leaves = [t for t in pytree.tree_leaves(output.to_tuple()) if isinstance(t, torch.Tensor)]
    return torch.stack([t.sum() for t in leaves]).sum()


def _shapes(output: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _macs(module: nn.Module, inputs: Inputs) -> int:
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)  # the counter fails where a parameter is given to a module as an argument
        with FlopCounterMode(display=False) as flops:
            forward(module, inputs)
    finally:
        for p in trained:
            p.requires_grad_(True)
    return int(flops.get_total_flops()) // 2


# ------------------------------------------------------------------------------------------------------------- tables
def tables(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """A line for each set, then a row for each model."""
    summary = [_summary(name, of) for name, of in results.items()]
    headers = ["set", "models", "ours", "theirs", "at least as much removed", "frozen", "seconds, ours/theirs"]
    rows = [_row(ours, theirs) for of in results.values() for ours, theirs in _pairs(of)]
    columns = ["model", "ours", "theirs", "parameters left", "theirs", "MACs left", "theirs", "groups s", "theirs"]
    return "\n\n".join([publish.markdown(summary, headers), publish.markdown(rows, [*columns, "prune s", "theirs"])])


def _pairs(of: dict[str, list[dict[str, Any]]]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    theirs = {r["model"]: r for r in of.get("theirs", [])}
    return [(r, theirs.get(r["model"])) for r in of["ours"]]


def _left(record: dict[str, Any], what: str) -> float:
    return float(record["after"][what] / max(record["before"][what], 1))


def _seconds(record: dict[str, Any]) -> float:
    return max(float(record["timing"]["groups"] + record["timing"]["prune"]), 1e-3)


def _summary(name: str, of: dict[str, list[dict[str, Any]]]) -> list[str]:
    pairs = _pairs(of)
    good = [r for r, _ in pairs if "error" not in r]
    both = [(r, t) for r, t in pairs if t is not None and "error" not in r and "error" not in t]
    more = sum(_left(r, "parameters") <= _left(t, "parameters") + 0.005 for r, t in both)
    ratios = sorted(_seconds(r) / _seconds(t) for r, t in both)
    frozen = 100 * sum(r["frozen"] for r in good) / max(sum(r["channels"] for r in good), 1)
    theirs = sum(t is not None and "error" not in t for _, t in pairs) if "theirs" in of else "-"
    return [
        name, str(len(pairs)), str(len(good)), str(theirs), f"{more} of {len(both)}" if both else "-",
        f"{frozen:.2f}%", f"{ratios[len(ratios) // 2]:.2f}" if ratios else "-",
    ]  # fmt: skip


def _row(ours: dict[str, Any], theirs: dict[str, Any] | None) -> list[str]:
    def said(record: dict[str, Any] | None) -> str:
        if record is None:
            return "-"
        return "yes" if "error" not in record else record["error"].splitlines()[0][:60]

    def value(record: dict[str, Any] | None, of: Callable[[dict[str, Any]], str]) -> str:
        return of(record) if record is not None and "error" not in record else ""

    row = [ours["model"], said(ours), said(theirs)]
    for what in ("parameters", "macs"):
        row += [value(r, lambda r, what=what: f"{100 * _left(r, what):.1f}%") for r in (ours, theirs)]
    for what in ("groups", "prune"):
        row += [value(r, lambda r, what=what: f"{r['timing'][what]:.2f}") for r in (ours, theirs)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default=",".join(_SETS))
    parser.add_argument("--models", default="", help="regular expression; the results are only printed")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    limits = isolated.Limits(seconds=120, jobs=arguments.jobs)
    path = publish.RESULTS / "pruning_coverage.json"
    whole = not arguments.models
    results = json.loads(path.read_text())["results"] if whole and path.exists() else {}
    for name in arguments.sets.split(","):
        models = select([name], arguments.models)
        if not models:
            continue
        results[name] = {"ours": isolated.collect(models, lambda m, s: measure(m, s, peer=False), limits)}
        if arguments.peers:
            results[name]["theirs"] = isolated.collect(models, lambda m, s: measure(m, s, peer=True), limits)
        publish.publish("pruning_coverage", tables(results), results, write=whole)


if __name__ == "__main__":
    main()
