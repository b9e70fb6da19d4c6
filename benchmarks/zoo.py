"""What each technique, and all of them in a row, do to 223 public networks: which worked, which not, and why.

Networks (see ``models.py``: torchvision, the smallest of each module of timm, tiny Hugging Face configurations) have
random live weights and are in eval mode. Columns are *fold* (batch norms into layers), *prune* (half of the channels),
*alds* (half of the parameters), *int8* (fold, then integers on integer kernels) and *all* (fold, 30% of the channels,
30% of the parameters, int8, in this order). A network has a process of its own, in which it is built and traced once;
images are as small as it takes them. What ``compile`` verifies is verified.

*Worked* means more than that nothing was raised. The passes that a column is about have each rewritten something (else
there was *nothing to do*, or it is *refused* with the first reason), ``compile`` has verified each of them, and this
script, with a comparison of its own on inputs and a batch size that nothing has seen, finds the same containers,
shapes and dtypes, only finite numbers, fewer parameters (prune, alds) or bytes (int8), an output that depends on the
input (unless integers round it away), the same first row alone as in the batch (where the network's own is), the traced
graph as it was, and an error below a bound: fold to the last half of the digits (or ten times the network's own
rounding; where that is above 1% of the output the same is asked of folding in float64), int8 less than the output
itself, and its kernels about as near to the quantised graph as that is to the real one. If any of these does not hold
although ``compile`` said nothing, that is a *silent error* and counts as failed, as do crashes and time limits.

Run ``python benchmarks/zoo.py [--sets timm,hf] [--models REGEX] [--columns fold,int8] [--timeout 300] [--memory 14]``.
Results are appended to ``--out`` as they come; what is there is not run again, unless ``--again`` names its
status. With ``--write`` the tables go to benchmarks/results/zoo.md. ``--tables`` runs nothing.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import math
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import isolated
import publish
import torch
import zoo_tables
from agreement import distance, forward, tensors
from models import SETS, Inputs, Model, Run, select
from torch import fx, nn
from torch.utils import _pytree as pytree

import fxcompress
from fxcompress.errors import PreconditionError, TraceError, UsageError
from fxcompress.pass_base import Example
from fxcompress.report import plain

_SETS = [name for name in SETS if name not in ("tv-detection", "tv-flow")]
_FOLD = ("fold-batch-norm",)
_INT8 = ("quantize", "lower-int8")
_SIZES = (64, 96, 128, 160)
_BATCH, _STATISTICS = 3, 16
_EXACT = 2.0**-11.5
"""Half of the digits of float32: more than rounding does, less than what a wrong fold does."""
_CHAOS = 0.01
_MORE_BITS = 2.0**-29
"""What rounding is in float64, relative to float32."""
_TWO_ROUNDINGS, _QUANTUM = 1.5, 0.02
"""Two graphs that each round by an error e on their own are sqrt(2) e apart; where e is next to nothing, a quantum."""
_ROWS = {"fold": 1e-3, "prune": 1e-3, "alds": 1e-3, "int8": 0.2, "all": 0.2}


@dataclasses.dataclass(frozen=True)
class Column:
    """A pipeline: ``real`` passes, then ``integer`` ones; ``about`` are those that must act, ``shrinks`` what must."""

    real: tuple[str, ...]
    about: tuple[str, ...]
    integer: tuple[str, ...] = ()
    shrinks: str = ""


COLUMNS = {
    "fold": Column(_FOLD, ("fold-batch-norm",)),
    "prune": Column(("prune-channels:ratio=0.5",), ("prune-channels",), shrinks="parameters"),
    "alds": Column(("alds:ratio=0.5",), ("alds",), shrinks="parameters"),
    "int8": Column(_FOLD, _INT8, _INT8, "bytes"),
    "all": Column(
        (*_FOLD, "prune-channels:ratio=0.3", "alds:ratio=0.3"), ("prune-channels", "alds", *_INT8), _INT8, "bytes"
    ),
}


# --------------------------------------------------------------------------------------------------------- the network
@dataclasses.dataclass
class Subject:
    """A network with its graph, and what it gives on ``inputs`` that are for the comparison alone: a batch, if it takes
    another batch size than 1; ``single`` is the first row of that, ``another`` another row."""

    run: Run
    graph: fx.GraphModule
    inputs: Inputs
    single: Inputs
    another: Inputs
    expected: Any
    of_single: Any
    rows: float | None
    seconds: float

    @functools.cached_property
    def folded(self) -> fx.GraphModule:
        """The graph with batch norms folded, which is made once."""
        return self._compile(self.graph, _FOLD)

    def compiled(self, column: Column) -> list[fx.GraphModule]:
        """The real graph of a column, and then what each step to integers makes of it."""
        starts = column.real[: len(_FOLD)] == _FOLD
        rest = column.real[len(_FOLD) :] if starts else column.real
        real = self.folded if starts else self.graph
        made = [self._compile(real, rest) if rest else real]
        for step in column.integer:
            made.append(self._compile(made[-1], (step,)))
        return made

    def _compile(self, graph: fx.GraphModule, passes: tuple[str, ...]) -> fx.GraphModule:
        """Verified, with two batches of calibration data."""
        args, kwargs = self.run.inputs(seed=0)
        calibration = [Example(*self.run.inputs(seed=s, batch=2)) for s in (3, 4)]
        return fxcompress.compile(graph, list(passes), args, example_kwargs=kwargs, calibration=calibration)


def _cropped(inputs: Inputs, size: int) -> Inputs:
    def crop(value: Any) -> Any:
        return value[..., :size, :size].contiguous() if isinstance(value, torch.Tensor) and value.dim() > 3 else value

    return pytree.tree_map(crop, inputs)


def _economical(model: Model) -> tuple[Model, nn.Module]:
    """``model`` for the smallest images that it takes, and the module, which is built once."""
    module = _built(model.build)
    own = model.draw(module, torch.Generator().manual_seed(0), 1)
    images = [t for t in pytree.tree_leaves(own) if isinstance(t, torch.Tensor) and t.dim() > 3]
    for size in [s for s in _SIZES if images and s < min(t.shape[-1] for t in images)]:
        for build in (None, model.build_for):
            try:
                made = module if build is None else _built(functools.partial(build, size))
                forward(made, _cropped(own, size))
            except Exception:  # too small for it, or no such option: whatever its own code raises
                continue

            def draw(module: nn.Module, generator: torch.Generator, batch: int, size: int = size) -> Inputs:
                return _cropped(model.draw(module, generator, batch), size)

            return dataclasses.replace(model, build=lambda made=made: made, draw=draw), made
    return dataclasses.replace(model, build=lambda: module), module


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def _first_row(inputs: Inputs) -> Inputs:
    def cut(value: Any) -> Any:
        whole = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == _BATCH
        return value[:1] if whole else value

    return pytree.tree_map(cut, inputs)


def _rows(of_batch: Any, of_single: Any) -> float:
    """How far the first row of a batch's output is from what it is alone; infinite where outputs are no batches."""
    whole, single = dict(tensors(of_batch)), dict(tensors(of_single))
    if list(whole) != list(single) or any(t.dim() == 0 or t.shape[0] != _BATCH for t in whole.values()):
        return math.inf
    return max(distance(single[path], whole[path][:1]) for path in whole)


def _subject(model: Model, stage: Callable[[str], None]) -> tuple[Subject, dict[str, Any]]:
    """Build and trace; raises where the network itself does not run, or its graph is not it."""
    stage("the model itself")
    start = time.process_time()
    cheap, module = _economical(model)
    # Of few pixels, statistics of few images would be so far from those of others that rounding decides the output.
    batch = 2 if cheap.draw is model.draw else _STATISTICS
    run = cheap.run(batch=batch)
    inputs, another = run.inputs(seed=1, batch=_BATCH), run.inputs(seed=2)
    single = _first_row(inputs)
    try:
        expected = forward(module, inputs)
    except Exception:  # a network for one batch size
        inputs, expected = single, forward(module, single)
    alone = forward(module, single)
    if distance(alone, forward(module, another)) < 1e-3:
        raise RuntimeError("its output hardly depends on its input, so that a comparison means nothing")
    built = time.process_time()
    stage("trace")
    args, kwargs = run.inputs(seed=0)
    graph = fxcompress.trace(module, args, example_kwargs=kwargs)
    traced = time.process_time()
    if not (error := distance(expected, forward(graph, inputs))) <= _EXACT:
        raise RuntimeError(f"silent error: the traced graph differs by {error:.1e}")
    rows = None if inputs is single else _rows(expected, alone)
    of_single = forward(graph, single)
    subject = Subject(run, graph, inputs, single, another, expected, of_single, rows, _seconds(graph, single))
    shape = [list(t.shape) for t in pytree.tree_leaves(run.inputs(seed=0)) if isinstance(t, torch.Tensor)]
    record = {"build_seconds": built - start, "trace_seconds": traced - built, "inputs": shape, "trace_error": error}
    record |= {"other_batch": inputs is not single, "trace_rows": rows, "statistics_of": batch}
    return subject, record | {"nodes": len(graph.graph.nodes), "parameters": _count(graph)}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _seconds(module: nn.Module, inputs: Inputs) -> float:
    """Processor time of a run that is not the first: the mean of those that fit into a twentieth of a second."""
    start, runs = time.process_time(), 0
    while not runs or time.process_time() - start < 0.05:
        forward(module, inputs)
        runs += 1
    return (time.process_time() - start) / runs


# ---------------------------------------------------------------------------------------------------------- a column
def _measured(subject: Subject, name: str) -> dict[str, Any]:
    """Compile one column, look at what came out; ``status`` and ``reason`` say how it went."""
    column = COLUMNS[name]
    start = time.process_time()
    try:
        made = subject.compiled(column)
    except (PreconditionError, UsageError) as error:
        return {"status": "refused", "reason": str(error)}
    except Exception as error:
        said = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        return {**said, "traceback": traceback.format_exc()}
    seconds = time.process_time() - start
    report = fxcompress.report(made[-1])
    record = {"compile_seconds": seconds, **_said(report, column)}
    idle = [p for p in report.passes if p.name in column.about and not _acted(p)]
    if idle and idle[0].refusals:
        reasons = Counter(r.reason for r in idle[0].refusals)
        return record | {"status": "refused", "reason": f"{idle[0].name}: {reasons.most_common(1)[0][0]}"}
    if idle:
        return record | {"status": "nothing to do", "reason": f"{idle[0].name} finds nothing to rewrite"}
    found, wrong = _compared(subject, made, name)
    wrong += [f"{p.name} is not verified: {p.verification}" for p in report.passes if not p.verified]
    if wrong:
        return record | found | {"status": "failed", "reason": f"silent error: {'; '.join(wrong)}"}
    return record | found | {"status": "worked", "reason": ""}


def _acted(record: Any) -> bool:
    """Whether the pass changed anything; a site of ALDS may be a layer that stays whole."""
    return any(d.get("rank", 1) is not None for d in record.details)


def _said(report: Any, column: Column) -> dict[str, Any]:
    first, last = report.passes[0], report.passes[-1]
    exact = [p for p in report.passes if p.guarantee == "exact"]
    return {
        "before": {"parameters": first.parameters_before, "macs": first.macs_before, "bytes": first.bytes_before},
        "after": {"parameters": last.parameters_after, "macs": last.macs_after, "bytes": last.bytes_after},
        "exact_float64": max((p.error for p in exact if p.error is not None), default=None),
        "exact_in_dtype": max((p.error_in_dtype for p in exact if p.error_in_dtype is not None), default=None),
        "passes": [
            {
                "name": p.name, "sites": p.sites, "error": p.error, "verified": p.verified,
                "verification": p.verification, "seconds": p.seconds, "warnings": list(p.warnings),
                "refusals": Counter(r.reason for r in p.refusals).most_common(3),
            }
            for p in report.passes
        ],
    }  # fmt: skip


def _compared(subject: Subject, made: list[fx.GraphModule], name: str) -> tuple[dict[str, Any], list[str]]:
    """Figures, and what is wrong, on inputs that ``compile`` has not seen."""
    column, wrong, real, graph = COLUMNS[name], [], made[0], made[-1]
    output = forward(graph, subject.inputs)
    error = distance(subject.expected, output)
    if any(not bool(t.isfinite().all()) for _, t in tensors(output) if t.is_floating_point()):
        wrong.append("the output is not finite")
    elif error == math.inf:
        wrong.append("structure, shapes, dtypes or integers of the output differ")
    found: dict[str, Any] = {"error": error, "relative_l2": _relative_l2(subject.expected, output)}
    if name == "fold" and not error <= _EXACT:  # a network, then, that amplifies rounding, or a wrong fold
        found["own_rounding"] = _own_rounding(subject)
        if not error <= 10 * found["own_rounding"]:
            wrong.append(f"the output differs by {error:.1e}, and by {found['own_rounding']:.1e} from float64's own")
        elif error > _CHAOS:  # float32 tells nothing of such a network
            found["error_in_float64"] = _error_in_float64(subject, column)
            if not found["error_in_float64"] <= 10 * found["own_rounding"] * _MORE_BITS:
                wrong.append(f"done in float64, the output differs by {found['error_in_float64']:.1e}")
    if distance(output, forward(graph, subject.inputs)) != 0:
        wrong.append("another output when it is called again")
    of_real = forward(real, subject.inputs) if column.integer else output
    if column.integer:
        of_reference = forward(made[1], subject.inputs)
        found["integer_l2"] = _relative_l2(of_real, output)
        found["reference_l2"], found["lowering_l2"] = (
            _relative_l2(of_real, of_reference),
            _relative_l2(of_reference, output),
        )
        if not found["integer_l2"] < 1:
            wrong.append(f"the error of integers is {found['integer_l2']:.2f} of the output")
        if not found["lowering_l2"] < _TWO_ROUNDINGS * found["reference_l2"] + _QUANTUM:
            wrong.append(f"kernels add an error of {found['lowering_l2']:.2f} to {found['reference_l2']:.2f}")
    single = forward(graph, subject.single)
    # Integers of a layer with one output, say, may be the same for two inputs: their error tells.
    if not column.integer and distance(single, forward(graph, subject.another)) == 0:
        wrong.append("the output does not depend on the input")
    if subject.rows is not None and subject.rows <= 1e-3:
        found["rows"] = _rows(output, single)
        if not found["rows"] <= _ROWS[name]:
            wrong.append(f"the first row of a batch differs by {found['rows']:.1e} from what it is alone")
    if column.shrinks:
        before, after = _sizes(subject.graph, column.shrinks), _sizes(graph, column.shrinks)
        if after >= before:
            wrong.append(f"there were {before} {column.shrinks} and are {after}")
    if distance(subject.of_single, forward(subject.graph, subject.single)) != 0:
        wrong.append("the traced graph, which was given, has changed")
    seconds = {"forward_seconds": subject.seconds, "forward_seconds_after": _seconds(graph, subject.single)}
    return found | seconds, wrong


def _double(inputs: Inputs) -> Inputs:
    def double(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return pytree.tree_map(double, inputs)


def _own_rounding(subject: Subject) -> float:
    """How far the traced graph is from itself in float64, as far as that can be told."""
    try:
        exact = forward(copy.deepcopy(subject.graph).double(), _double(subject.inputs))
    except Exception:  # a dtype that the network's code names
        return 0.0
    found, rounded = dict(tensors(exact)), tensors(forward(subject.graph, subject.inputs))
    return max(distance(found[path], t.double()) for path, t in rounded if t.is_floating_point())


def _error_in_float64(subject: Subject, column: Column) -> float:
    """What the column does to a graph that is in float64 before."""
    graph = copy.deepcopy(subject.graph).double()
    args, kwargs = _double(subject.run.inputs(seed=0))
    made = fxcompress.compile(graph, list(column.real), args, example_kwargs=kwargs)
    return distance(forward(graph, _double(subject.inputs)), forward(made, _double(subject.inputs)))


def _relative_l2(expected: Any, output: Any) -> float:
    """The largest ``|a - b| / |a|`` over the tensors of the output."""
    a, b = dict(tensors(expected)), dict(tensors(output))
    pairs = [(a[p].double(), b[p].double()) for p in a if p in b and a[p].shape == b[p].shape]
    return max((float((x - y).norm() / x.norm().clamp(min=1e-30)) for x, y in pairs), default=math.inf)


def _sizes(graph: nn.Module, of: str) -> int:
    if of == "bytes":
        return sum(t.nbytes for t in (*graph.parameters(), *graph.buffers()))
    return _count(graph)


# ------------------------------------------------------------------------------------------------------------ a sweep
def measure(model: Model, stage: Callable[[str], None], todo: dict[str, list[str]], out: Path, timeout: int) -> Any:
    """Every column that is missing for one network, each written to ``out`` when it is there."""
    _limit(timeout)
    subject, facts = _subject(model, stage)
    for name in todo[_key(model)]:
        stage(name)
        _limit(timeout)
        start = time.process_time()
        record = _measured(subject, name)
        _append(out, {**_identity(model, name), **facts, "seconds": time.process_time() - start, **record})
    return {}


def _limit(seconds: int) -> None:
    """From now on, so many seconds of processor time."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(time.process_time()) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (min(soft, hard), hard))


def _append(out: Path, record: dict[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(record)) + "\n")


def _key(model: Model) -> str:
    return f"{model.set} {model.name}"


def _identity(model: Model, column: str) -> dict[str, Any]:
    return {"model": model.name, "set": model.set, "column": column}


def read(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The last record of each network and column."""
    if not out.exists():
        return {}
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {(r["set"], r["model"], r["column"]): r for r in records}


def _missing(models: Sequence[Model], columns: Sequence[str], out: Path, again: str) -> dict[str, list[str]]:
    done = read(out)
    statuses = again.split(",")
    return {
        _key(m): [c for c in columns if done.get((m.set, m.name, c), {"status": statuses[0]})["status"] in statuses]
        for m in models
    }


def _fates(record: dict[str, Any], columns: list[str], model: Model) -> Iterator[dict[str, Any]]:
    """What became of the columns that a process did not write, if that is known: one died, or all of them did."""
    reason, where = record["error"], record["stage"]
    if where in columns:
        yield {**_identity(model, where), "status": "failed", "reason": reason, "traceback": record["traceback"]}
        return
    status = "not traced" if reason.startswith(TraceError.__name__) else "failed"
    for column in columns:
        yield {**_identity(model, column), "status": status, "reason": f"{where}: {reason}"} | {
            "traceback": record["traceback"]
        }


def sweep(models: Sequence[Model], columns: Sequence[str], arguments: argparse.Namespace) -> None:
    """Run what is missing; a process that dies in a column is started again for those after it."""
    out, again = arguments.out, arguments.again
    for _ in columns:
        todo = _missing(models, columns, out, again)
        waiting = [m for m in models if todo[_key(m)]]
        limits = isolated.Limits(arguments.timeout * (len(columns) + 1), arguments.memory << 30, arguments.jobs)
        task = functools.partial(measure, todo=todo, out=out, timeout=arguments.timeout)
        by_key = {_key(m): m for m in waiting}
        for number, record in enumerate(isolated.sweep(waiting, task, limits)):
            model = by_key[f"{record['set']} {record['model']}"]
            if "error" in record:
                for fate in _fates(record, todo[_key(model)], model):
                    _append(out, fate)
            found = read(out)
            said = [f"{c} {found.get((model.set, model.name, c), {}).get('status', '-')}" for c in columns]
            print(
                f"[{number + 1}/{len(waiting)}] {_key(model)}, {record['seconds']:.0f} s: {', '.join(said)}", flush=True
            )
        again = ""
    print("done", flush=True)


def _small_first(models: Sequence[Model]) -> list[Model]:
    """By number of parameters, as far as an earlier benchmark has noted it."""
    path = publish.RESULTS / "pruning_coverage.json"
    of_sets = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    known = {
        (r["set"], r["model"]): r["before"]["parameters"]
        for of in of_sets.values() for records in of.values() for r in records if "before" in r
    }  # fmt: skip
    return sorted(models, key=lambda m: known.get((m.set, m.name), 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default=",".join(_SETS))
    parser.add_argument("--models", default="", help="regular expression")
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--timeout", type=int, default=300, help="seconds of processor time for each column")
    parser.add_argument("--memory", type=int, default=14, help="GiB of address space for each network")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", default="", help="run again what has one of these statuses: failed,refused,...")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "fxcompress-zoo.jsonl")
    parser.add_argument("--tables", action="store_true", help="run nothing, only make the tables")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/zoo.md and zoo.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models, columns = select(arguments.sets.split(","), arguments.models), arguments.columns.split(",")
    if not arguments.tables:
        sweep(_small_first(models), columns, arguments)
    found = read(arguments.out)
    records = [found[m.set, m.name, c] for m in models for c in columns if (m.set, m.name, c) in found]
    text = zoo_tables.summary(records, {s: sum(m.set == s for m in models) for s in _SETS}, columns)
    publish.publish("zoo_summary", text, None, write=arguments.write)
    publish.publish("zoo", f"{text}\n\n{zoo_tables.details(records, columns)}", records, write=arguments.write)


if __name__ == "__main__":
    main()
