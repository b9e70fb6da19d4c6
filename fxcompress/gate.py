"""What ``compile(reject_slower=True)`` measures, and what it says of passes that do not pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import fx

from fxcompress.analysis.latency import Latency, affordable_repeats, compare_latency
from fxcompress.pass_base import Example, Pass
from fxcompress.report import PassRecord

__all__ = ["groups", "is_slower", "judged"]

MARGIN = 0.05
"""How much slower, in parts, is slower at all."""

_SECONDS, _FEWEST, _MOST = 1.0, 5, 50


def groups(passes: Sequence[Pass]) -> list[range]:
    """Positions of passes that are judged together: one by one, but from a pass to the first after it that
    it pays with."""
    found, start = [], 0
    while start < len(passes):
        end = at = start
        while at <= end:
            with_ = [i for i in range(at + 1, len(passes)) if passes[i].name in passes[at].pays_with]
            end = max([end, *with_[:1]])
            at += 1
        found.append(range(start, end + 1))
        start = end + 1
    return found


def is_slower(before: Latency, after: Latency) -> bool:
    """Whether the medians are further apart than :data:`MARGIN` and the noise of both."""
    return after.median - before.median > max(MARGIN * before.median, before.iqr, after.iqr)


def judged(
    passes: Sequence[Pass], graphs: Sequence[fx.GraphModule], records: Sequence[PassRecord], example: Example
) -> tuple[list[PassRecord], bool]:
    """Measure what a group of passes did, and say whether it stays.

    Args:
        passes: the group.
        graphs: the one before it and the one that each pass left.
        records: of each pass.
        example: inputs of all graphs.

    Returns:
        The records with latencies, or those of passes that were rolled back; and whether the group stays.
    """
    untimed = not passes[-1].timed or any(not p.timed and not p.pays_with for p in passes)
    if untimed or not any(record.sites for record in records):
        return list(records), True
    times = _measured(graphs, example)
    if is_slower(times[0], times[-1]):
        times = _measured(graphs, example)  # twice the same: what else runs here would have to be so as well
    timed = [
        dataclasses.replace(record, latency_before=a.median, latency_after=b.median)
        for record, a, b in zip(records, times[:-1], times[1:], strict=True)
    ]
    if not is_slower(times[0], times[-1]):
        return timed, True
    return [_rolled_back(record, records, times) for record in timed], False


def _measured(graphs: Sequence[fx.GraphModule], example: Example) -> list[Latency]:
    """The latency of each graph, all in turns."""
    repeats = affordable_repeats(graphs[0], example.args, example.kwargs, seconds=_SECONDS, fewest=_FEWEST, most=_MOST)
    calls: Mapping[str, fx.GraphModule] = {str(i): gm for i, gm in enumerate(graphs)}
    found = compare_latency(calls, example.args, example.kwargs, warmup=min(3, repeats // 5), repeats=repeats)
    return [found[name] for name in calls]


def _rolled_back(record: PassRecord, group: Sequence[PassRecord], times: Sequence[Latency]) -> PassRecord:
    """The record of a pass of which nothing is left in the graph."""
    first = group[0]
    who = "it" if len(group) == 1 else f"all of {', '.join(repr(other.name) for other in group)} together"
    text = (
        f"rolled back its {record.sites} sites: {who} took a call on the example inputs from {times[0]} to {times[-1]} "
        "on this machine"
    )
    return dataclasses.replace(
        record,
        sites=0,
        details=(),
        error=0.0,
        error_in_dtype=0.0,
        verified=True,
        verification="rolled back: the graph is as it was",
        parameters_before=first.parameters_before,
        parameters_after=first.parameters_before,
        macs_before=first.macs_before,
        macs_after=first.macs_before,
        bytes_before=first.bytes_before,
        bytes_after=first.bytes_before,
        rolled_back=True,
        warnings=(text,),
    )
