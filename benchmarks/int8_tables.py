"""The tables of ``int8.py``: times, errors, and which goals are met."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import isolated
import publish
from int8_peers import COLUMNS, INTEGERS

__all__ = ["lines", "text"]

Record = dict[str, Any]
_SIZE_GOAL, _SIZE_MODEL = 0.27, "resnet50"
OURS = ("ours", "ours-compiled")


def _ratio(record: Record, name: str, peer: str, clock: str) -> float | None:
    """How many times as fast as ``peer`` is ``name``."""
    mine, other = (record["latency"].get(n) for n in (name, peer))
    return None if mine is None or other is None else other[clock]["median"] / mine[clock]["median"]


# ------------------------------------------------------------------------------------------------------------- goals
_GOALS: tuple[tuple[str, str, bool, float], ...] = (
    ("eager", "as fast as float32, eager", False, 3.5),
    ("compiled", "as fast as float32, torch.compile", False, 2.0),
    ("compiled", "never slower than that", True, 1.0),
    ("torchao", "faster than torchao", True, 1.0),
    ("openvino", "at most 1.3 times OpenVINO's time", True, 1 / 1.3),
)
"""The peer, what is asked for, whether of each model or of the mean, and the least ratio of its time to ours."""


def _goal_rows(records: Sequence[Record], batch: int, clock: str) -> list[list[str]]:
    mine = [r for r in records if r["batch"] == batch]
    return [[str(batch), *_goal_row(mine, name, goal, clock)] for goal in _GOALS for name in OURS]


def _goal_row(records: Sequence[Record], name: str, goal: tuple[str, str, bool, float], clock: str) -> list[str]:
    peer, asked, each, least = goal
    asked = asked if each else f"{least:g} times {asked}"
    found = {r["model"]: ratio for r in records if (ratio := _ratio(r, name, peer, clock)) is not None}
    if not found:
        return [asked, name, "-", "-", "not measured"]
    mean = math.exp(statistics.fmean(math.log(v) for v in found.values()))
    missed = [f"{model} {v:.2f}" for model, v in found.items() if v < least]
    met = not missed if each else mean >= least
    inverse = f" (time {1 / mean:.2f})" if peer == "openvino" else ""
    return [asked, name, f"{mean:.2f}{inverse}", "yes" if met else "no", ", ".join(missed) if each else ""]


def _size_row(records: Sequence[Record]) -> str:
    for record in records:
        if record["model"] == _SIZE_MODEL and "bytes" in record:
            sizes = record["bytes"]
            ratio = sizes["ours"] / sizes["float32"]
            met = "met" if ratio <= _SIZE_GOAL else "missed"
            numbers = f"{sizes['ours'] / 1e6:.1f} MB of {sizes['float32'] / 1e6:.1f} MB, {ratio:.3f}"
            return f"state_dict of {_SIZE_MODEL}: {numbers} (goal {_SIZE_GOAL}: {met})"
    return f"state_dict of {_SIZE_MODEL}: not measured"


# ------------------------------------------------------------------------------------------------------------ tables
def text(records: Sequence[Record], clock: str = "wall") -> str:
    """All tables, and what failed; ``clock`` is the one that times are shown by."""
    good = [r for r in records if "error" not in r]
    batches = sorted({r["batch"] for r in good})
    parts = []
    for batch in batches:
        parts += [f"Milliseconds ({clock} clock), batch {batch}: median +- interquartile range"]
        parts += [_latency_table([r for r in good if r["batch"] == batch], clock)]
    parts += ["Norm of the error of the outputs, relative to float32's; in brackets relative to what differs in these"]
    parts += [_error_table([r for r in good if r["batch"] == batches[0]]) if good else "none"]
    headers = ["batch", "goal", "of", "geometric mean", "met", "missed by"]
    rows = [row for batch in batches for row in _goal_rows(good, batch, clock)]
    parts += ["Goals: times of the peers divided by ours", publish.markdown(rows, headers), _size_row(good)]
    return "\n\n".join(parts + _failures(good)) + isolated.failures(list(records))


def _latency_table(records: Sequence[Record], clock: str) -> str:
    names = [name for name in COLUMNS if any(name in r["latency"] or name in r["failed"] for r in records)]
    rows = [[r["model"], *(_time(r, name, clock) for name in names)] for r in records]
    return publish.markdown(rows, ["model", *names])


def _time(record: Record, name: str, clock: str) -> str:
    times = record["latency"].get(name)
    if times is None:
        return "failed" if name in record["failed"] else "-"
    return f"{1e3 * times[clock]['median']:.1f} +- {1e3 * times[clock]['iqr']:.1f}"


def _error_table(records: Sequence[Record]) -> str:
    names = [name for name in INTEGERS if any(name in r["off"] for r in records)]
    rows = []
    for r in records:
        offs = [r["off"].get(name) for name in names]
        cells = ["-" if o is None else f"{o['output']:.3f} ({o['centred']:.2f})" for o in offs]
        mine = r["off"].get("ours")
        ratio = "-" if mine is None else f"{-20 * math.log10(mine['output']):.1f}"
        rows.append([r["model"], *cells, ratio])
    return publish.markdown(rows, ["model", *names, "ours, dB"])


def _failures(records: Sequence[Record]) -> list[str]:
    found = [
        f"- {r['model']}, batch {r['batch']}: {name} failed: {reason.splitlines()[0][:200]}"
        for r in records
        for name, reason in r["failed"].items()
    ]
    return ["\n".join(found)] if found else []


def lines(record: Record) -> list[str]:
    """One measured model, to print while a run goes on: times, error, and how long it took to make ready."""
    if "error" in record:
        return [f"  failed at {isolated.first_line(record)}"]
    result = []
    for name in (n for n in COLUMNS if n in record["prepared"] | record["failed"]):
        failed = record["failed"].get(name, "").splitlines()
        times = ", ".join(f"{clock} {_time(record, name, clock)}" for clock in ("wall", "cpu"))
        said = failed[0][:150] if failed else f"{times} ms, off by {record['off'][name]['output']:.4f}"
        result.append(f"  {name:20} {said} (ready in {record['prepared'].get(name, '-')} s)")
    return result
