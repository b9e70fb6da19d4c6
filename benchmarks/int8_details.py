"""Where our quantised graphs lose accuracy and time: layer by layer, beside float32 and beside OpenVINO."""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import publish
import torch
from int8_peers import Workbench
from layer_noise import decibels, signal_to_noise
from torch import fx
from torch.profiler import ProfilerActivity

__all__ = ["layers", "profile"]

_RUNS, _SHOWN = 10, 40
_OPENVINO_LAYERS = ("Convolution", "GroupConvolution", "FullyConnected", "FullyConnectedQuantizedLegacy")


class _Watch(fx.Interpreter):
    """Runs a graph and tells ``seen`` of each node, its result and its seconds."""

    def __init__(self, gm: fx.GraphModule, seen: Callable[[fx.Node, Any, float], None]) -> None:
        super().__init__(gm)
        self._seen = seen

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(n)
        self._seen(n, result, time.perf_counter() - start)
        return result


# --------------------------------------------------------------------------------------------------------- accuracy
@torch.no_grad()
def layers(bench: Workbench) -> str:
    """The signal-to-noise ratio of what each quantised layer gives, and of the outputs."""
    whole = decibels(bench.expected, bench.outputs(bench.reference))
    table = signal_to_noise(bench.folded, bench.reference, bench.calibration[-1])
    return f"{table}\n\noutputs: {whole:.1f} dB"


# ------------------------------------------------------------------------------------------------------------- time
@torch.no_grad()
def profile(bench: Workbench) -> str:
    """Time by layer, ours and OpenVINO's, the largest differences first; what is in no layer, by kind; operators."""
    mine, modules = _our_times(bench)
    theirs, kinds = _openvino_times(bench)
    rows = []
    for path in sorted(modules, key=lambda p: theirs.get(p, 0.0) - mine[p]):
        other = theirs.get(path)
        cells = ["-" if other is None else f"{1e6 * other:.0f}", kinds.get(path, "")]
        rows.append(
            [path, modules[path], f"{1e6 * mine[path]:.0f}", *cells, f"{1e6 * (mine[path] - (other or 0)):.0f}"]
        )
    parts = [_totals(mine, theirs, modules)]
    parts += [publish.markdown(rows[:_SHOWN], ["layer", "", "ours us", "OpenVINO us", "its kernel", "longer by"])]
    between = [[k, f"{1e6 * s:.0f}"] for k, s in _sorted({k: v for k, v in mine.items() if k not in modules})]
    parts += [publish.markdown(between[:_SHOWN], ["ours, in no layer", "us"])]
    between = [[k, f"{1e6 * s:.0f}"] for k, s in _sorted({k: v for k, v in theirs.items() if k not in modules})]
    parts += [publish.markdown(between[:_SHOWN], ["OpenVINO's, in no layer of ours", "us"])]
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(_RUNS):
            bench.lowered(bench.x)
    parts += [_operators(seen.key_averages())]
    return "\n\n".join(parts)


def _sorted(times: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def _totals(mine: Mapping[str, float], theirs: Mapping[str, float], modules: Mapping[str, str]) -> str:
    rows = []
    for name, times in (("ours, node by node", mine), ("OpenVINO", theirs)):
        inside = sum(v for k, v in times.items() if k in modules)
        rows.append([name, *(f"{1e3 * v:.2f}" for v in (inside, sum(times.values()) - inside))])
    return publish.markdown(rows, ["", "in layers ms", "in no layer ms"])


def _our_times(bench: Workbench) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of each layer by path, and of everything else by kind; what the layers are."""
    runs: dict[fx.Node, list[float]] = collections.defaultdict(list)

    def add(node: fx.Node, result: Any, seconds: float) -> None:
        runs[node].append(seconds)

    for _ in range(_RUNS):
        _Watch(bench.lowered, add).run(bench.x)
    times: dict[str, float] = collections.Counter()
    modules: dict[str, str] = {}
    for node, seconds in runs.items():
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        module = bench.lowered.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None and hasattr(module, "weight"):
            key = str(node.target)
            modules[key] = f"{type(module).__name__} {tuple(module.weight.shape)}".replace(" ", "")
        else:
            key = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
        times[key] += statistics.median(seconds)
    return times, modules


def _openvino_times(bench: Workbench) -> tuple[dict[str, float], dict[str, str]]:
    """The same of OpenVINO; the kernels of layers. Its layers have lost their names where something was fused into
    them, so that they are told by their order, if there are as many as ours."""
    compiled = bench.openvino_compiled(bench.openvino_integers, "f32", PERF_COUNT=True)
    request = compiled.create_infer_request()
    runs: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    for _ in range(_RUNS):
        request.infer([bench.x.numpy()])
        for part in request.get_profiling_info():
            runs[part.node_name, part.node_type, part.exec_type].append(part.real_time.total_seconds())
    seconds = {part: statistics.median(found) for part, found in runs.items()}
    theirs = [part for part in seconds if part[1] in _OPENVINO_LAYERS]
    ours = [str(n.target) for n in bench.lowered.graph.nodes if _has_weight(bench, n)]
    paths = dict(zip(theirs, ours, strict=True)) if len(theirs) == len(ours) else {}
    times: dict[str, float] = collections.Counter()
    for part, spent in seconds.items():
        times[paths.get(part, part[1])] += spent
    return times, {path: part[2] for part, path in paths.items()}


def _has_weight(bench: Workbench, node: fx.Node) -> bool:
    return node.op == "call_module" and hasattr(bench.lowered.get_submodule(str(node.target)), "weight")


def _operators(averages: Iterable[Any]) -> str:
    found = sorted(averages, key=lambda e: -e.self_cpu_time_total)
    rows = [[e.key, f"{e.count / _RUNS:.0f}", f"{e.self_cpu_time_total / _RUNS:.0f}"] for e in found[:20]]
    return publish.markdown(rows, ["operator", "calls", "itself us"])
