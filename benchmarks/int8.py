"""How fast networks are on 8-bit integers, beside everything else that runs them on this processor.

Ours are ``remove-identity, fold-batch-norm, quantize, lower-int8`` run eagerly, and the reference graph (without the
last) under ``torch.compile`` with Inductor's freezing. The peers are in ``int8_peers.py``: float32 eager, under
``torch.compile`` and frozen, torchao, OpenVINO with NNCF, and ONNX Runtime. Weights are random and live, data are
random, the same for all.

A model and a batch size have a process of their own, in which everything is made ready (what fails, or takes longer
than ``--limit``, is left out with the reason; so is what ends the process, which starts again without it). Then all are
timed in turns: a turn is a call that is not timed, so that no variant pays for the caches that another left, and one
that is. ``--clock cpu`` shows processor time, which says more than the wall's where the machine does other things.

Run ``python benchmarks/int8.py [--models resnet18,swin_t] [--batch 1,8] [--variants ours,openvino] [--rounds 20]``. The
results are written after each model if all models, batch sizes and variants are asked for, and with ``--resume`` (go on
where a run was stopped) and ``--merge`` (what is measured takes the place of what is there); else only printed.
``--layers MODEL`` prints the signal-to-noise ratio of each layer instead, ``--profile MODEL`` where the time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import clock
import int8_details
import int8_tables
import isolated
import publish
import torch
from int8_peers import VARIANTS, Call, Workbench
from models import Inputs, Model, select
from torch import Tensor, nn

_MODELS = (
    "resnet18,resnet50,mobilenet_v2,mobilenet_v3_large,efficientnet_b0,regnet_y_400mf,convnext_tiny,vit_b_16,swin_t,"
    "bert_base"
).split(",")
_ROUNDS = {1: 20, 8: 10}
_TOKENS = 128
_MEMORY = 20 << 30


# ----------------------------------------------------------------------------------------------------------- models
class _LastHidden(nn.Module):
    """A language model of token ids that gives its last hidden state alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids).last_hidden_state
        return hidden


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return _LastHidden(BertModel(BertConfig(), add_pooling_layer=False))


def _tokens(module: nn.Module, generator: torch.Generator, batch: int) -> Inputs:
    return (torch.randint(1000, 30000, (batch, _TOKENS), generator=generator),), {}


def models(names: Sequence[str]) -> list[Model]:
    """In the order of ``names``."""
    known = {model.name: model for model in select(["tv-classification"])}
    known["bert_base"] = Model("bert_base", "transformers", _bert, _tokens)
    if unknown := set(names) - set(known):
        raise SystemExit(f"there are no models {sorted(unknown)}")
    return [known[name] for name in names]


# --------------------------------------------------------------------------------------------------------- measuring
def measure(
    model: Model,
    stage: Callable[[str], None],
    *,
    batch: int,
    variants: Sequence[str],
    rounds: int,
    threads: int,
    limit: int,
    without: Mapping[str, str],
) -> dict[str, Any]:
    """Make everything ready, compare outputs, and time in turns.

    Args:
        model: which one.
        stage: is told what comes next.
        batch: of the inputs.
        variants: names in :data:`VARIANTS`.
        rounds: timed calls of each.
        threads: for each runtime.
        limit: seconds to make one variant ready.
        without: variants not to try, with reasons.
    """
    stage("the model itself")
    torch.set_num_threads(threads)
    bench = Workbench(model.run(), batch, threads)
    expected = bench.expected
    calls: dict[str, Call] = {}
    record: dict[str, Any] = {"batch": batch, "threads": threads, "failed": dict(without), "off": {}, "prepared": {}}
    for name in variants:
        if name in without:
            continue
        stage(f"prepare {name}")
        start = time.monotonic()
        try:
            with _within(limit):
                calls[name] = VARIANTS[name](bench)
                record["off"][name] = off(expected, bench.outputs(calls[name]))
        except Exception as error:
            calls.pop(name, None)
            record["failed"][name] = f"{type(error).__name__}: {error}"[:600]
        record["prepared"][name] = round(time.monotonic() - start, 1)
    stage("size")
    if set(calls) & {"ours", "ours-compiled"}:
        record["bytes"] = {"float32": _bytes(bench.module), "ours": _bytes(bench.reference)}
    stage("time")
    record["latency"] = in_turns(calls, bench.x, rounds)
    record["load"] = os.getloadavg()[0]
    return record


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    """Raise ``TimeoutError`` if that is over; what does not come back to Python ends with the process."""

    def over(number: int, frame: Any) -> None:
        raise TimeoutError(f"not ready after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def off(expected: Tensor, found: Tensor) -> dict[str, float]:
    """Norms of the error: relative to the output, and to what of it differs between samples."""
    error = float((found - expected).norm())
    centred = expected - expected.mean(0)
    return {"output": error / float(expected.norm()), "centred": error / float(centred.norm())}


def _bytes(module: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.getbuffer().nbytes


@torch.no_grad()
def in_turns(calls: Mapping[str, Call], x: Tensor, rounds: int) -> dict[str, Any]:
    times: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    turns = list(calls.items())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(rounds):
        for name, call in turns:
            call(x)
            times[name].append(clock.seconds(functools.partial(call, x)))
        turns.append(turns.pop(0))
    if torch._dynamo.utils.counters["stats"]["unique_graphs"] != graphs:
        raise RuntimeError("something was compiled while it was timed")
    return {name: {c: _summary([t[c] for t in taken]) for c in clock.CLOCKS} for name, taken in times.items()}


def _summary(times: Sequence[float]) -> dict[str, float]:
    if len(times) == 1:
        return {"median": times[0], "iqr": 0.0}
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "iqr": upper - lower}


def measured(model: Model, limit: int, **options: Any) -> dict[str, Any]:
    """The record of ``model``, without the variants that ended the process."""
    without: dict[str, str] = {}
    limits = isolated.Limits(seconds=limit * (len(options["variants"]) + 3), memory=_MEMORY)
    while True:
        record = next(
            isolated.sweep([model], functools.partial(measure, limit=limit, without=without, **options), limits)
        )
        ended = re.fullmatch(r"prepare (\S+)", record.get("stage", "")) if "error" in record else None
        if ended is None:
            return {"batch": options["batch"], **record}
        without[ended[1]] = record["error"]


# ------------------------------------------------------------------------------------------------------- a whole run
def run(arguments: argparse.Namespace) -> None:
    """Measure what is asked for; print, and write where it should be kept."""
    wanted = [(model, batch) for batch in arguments.batch for model in models(arguments.models)]
    whole = arguments.models == _MODELS and arguments.batch == list(_ROUNDS)
    keeps = list(VARIANTS) == arguments.variants and (whole or arguments.merge or arguments.resume)
    records = _kept() if arguments.merge or arguments.resume else {}
    for number, (model, batch) in enumerate(wanted):
        if arguments.resume and "error" not in records.get((model.name, batch), {"error": "not there"}):
            continue
        options = {"variants": arguments.variants, "threads": arguments.threads, "limit": arguments.limit}
        record = measured(model, batch=batch, rounds=arguments.rounds or _ROUNDS.get(batch, 10), **options)
        records[model.name, batch] = record
        print(f"[{number + 1}/{len(wanted)}] {model.name}, batch {batch}: {record['seconds']:.0f} s", flush=True)
        print("\n".join(int8_tables.lines(record)), flush=True)
        if keeps:
            _publish(records, arguments.clock, write=True)
    _publish(records, arguments.clock, write=keeps)


def _publish(records: Mapping[tuple[str, int], dict[str, Any]], shown: str, *, write: bool) -> None:
    ordered = sorted(records.values(), key=lambda r: (r["batch"], _place(r["model"])))
    publish.publish("int8", int8_tables.text(ordered, shown), ordered, write=write)


def _kept() -> dict[tuple[str, int], dict[str, Any]]:
    path = publish.RESULTS / "int8.json"
    records = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    return {(record["model"], record["batch"]): record for record in records}


def _place(name: str) -> int:
    return _MODELS.index(name) if name in _MODELS else len(_MODELS)


def main() -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    def variants(text: str) -> list[str]:
        return sorted(names(text), key=lambda name: list(VARIANTS).index(name) if name in VARIANTS else -1)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=names, default=_MODELS)
    parser.add_argument("--variants", type=variants, default=list(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--batch", type=lambda text: [int(n) for n in text.split(",")], default=list(_ROUNDS))
    parser.add_argument("--rounds", type=int, help="20 for single samples, else 10")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=300, help="seconds to make one variant ready")
    parser.add_argument("--clock", choices=clock.CLOCKS, default="wall", help="which the tables show; both are kept")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--layers", metavar="MODEL")
    parser.add_argument("--profile", metavar="MODEL")
    arguments = parser.parse_args()
    if unknown := set(arguments.variants) - set(VARIANTS):
        parser.error(f"there are no variants {sorted(unknown)}; there are {', '.join(VARIANTS)}")
    torch.set_num_threads(arguments.threads)
    if name := arguments.layers or arguments.profile:
        bench = Workbench(models([name])[0].run(), arguments.batch[0], arguments.threads)
        print(int8_details.layers(bench) if arguments.layers else int8_details.profile(bench))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
