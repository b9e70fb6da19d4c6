"""What was done to a graph, pass by pass: measured by the engine, never by the pass itself.

A report travels with its graph as a module without parameters that no node calls. ``torch.fx`` keeps such children,
and only those, through both ``copy.deepcopy`` and pickling in any order (``gm.meta`` is lost in unpickling, and a plain
attribute in ``copy.deepcopy``).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

from fxcompress.errors import UsageError
from fxcompress.files import write_text
from fxcompress.reporting import Curve, GraphSketch, page
from fxcompress.reporting.figures import bytes_ as _bytes
from fxcompress.reporting.figures import count as _count
from fxcompress.reporting.sketch import target_of

__all__ = [
    "CARRIER",
    "PassRecord",
    "RefusalRecord",
    "Report",
    "SiteRecord",
    "Total",
    "attach",
    "detach",
    "plain",
    "report",
]

CARRIER = "_fxcompress_report"
"""The name of the child that holds a report."""


@dataclasses.dataclass(frozen=True)
class SiteRecord:
    """A place that a pass rewrites: node name, what the node calls (a module path, mostly), the pass's own details."""

    node: str
    target: str
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, node: fx.Node, detail: Mapping[str, Any]) -> SiteRecord:
        """The record of ``node``; ``detail`` is made JSON-ready."""
        return cls(node.name, target_of(node), {str(k): plain(v) for k, v in detail.items()})

    def to_dict(self) -> dict[str, Any]:
        """``{"node", "target", **detail}``."""
        return {"node": self.node, "target": self.target, **self.detail}


@dataclasses.dataclass(frozen=True)
class RefusalRecord:
    """A place that a pass looked at and left alone."""

    node: str
    target: str
    reason: str

    @classmethod
    def of(cls, node: fx.Node, reason: str) -> RefusalRecord:
        """The record of ``node``."""
        return cls(node.name, target_of(node), reason)


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """One pass over one graph. Sizes are of the graph before and after it.

    Attributes:
        name: registered name of the pass.
        options: its fields.
        guarantee: ``"exact"``, ``"approximate"`` or ``"retrain"``.
        sites: how many places were rewritten.
        refusals: places left alone, with reasons.
        error: relative error of the outputs (see ``analysis/outputs.py``): for an exact pass in the float64 rerun, else
            in the model's own dtype; ``None`` if it was not measured.
        error_in_dtype: relative error in the model's own dtype; ``None`` if it was not measured.
        verified: whether the guarantee was checked and held.
        verification: how, or why not.
        parameters_before, parameters_after: numbers of parameters.
        macs_before, macs_after: multiply-accumulates of one run on the example inputs; ``None`` without them.
        bytes_before, bytes_after: size of parameters and buffers.
        seconds: time this pass took, calibration and verification included.
        details: one plain dict a site: node, target and what the pass says.
        warnings: what the user should know.
        latency_before, latency_after: seconds of a call on the example inputs before and after the pass, medians;
            ``None`` if they were not measured (see ``reject_slower`` of :func:`fxcompress.compile`).
        rolled_back: the pass did not pay, and the graph is as it was before: no sites, sizes unchanged. The latency
            after it is the one that it would have had.
    """

    name: str
    options: dict[str, Any]
    guarantee: str
    sites: int
    refusals: tuple[RefusalRecord, ...]
    error: float | None
    error_in_dtype: float | None
    verified: bool
    verification: str
    parameters_before: int
    parameters_after: int
    macs_before: int | None
    macs_after: int | None
    bytes_before: int
    bytes_after: int
    seconds: float
    details: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    latency_before: float | None = None
    latency_after: float | None = None
    rolled_back: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PassRecord:
        """The inverse of ``dataclasses.asdict``."""
        refusals = tuple(RefusalRecord(**refusal) for refusal in data["refusals"])
        rest = {"details": tuple(data["details"]), "warnings": tuple(data["warnings"]), "refusals": refusals}
        return cls(**{**data, **rest})


@dataclasses.dataclass(frozen=True)
class Total:
    """Before the first pass and after the last. Parameters, MACs and bytes as in :class:`PassRecord`."""

    parameters_before: int
    parameters_after: int
    macs_before: int | None
    macs_after: int | None
    bytes_before: int
    bytes_after: int
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def cr_p(self) -> float:
        """CR-P: reduction of parameters in percent."""
        return _reduction(self.parameters_before, self.parameters_after)

    @property
    def cr_f(self) -> float | None:
        """CR-F: reduction of FLOPs (that is, of MACs) in percent; ``None`` where MACs are not known."""
        if self.macs_before is None or self.macs_after is None:
            return None
        return _reduction(self.macs_before, self.macs_after)


@dataclasses.dataclass(frozen=True)
class Report:
    """The history of a compressed graph: a record for each pass, and the total. ``str(report)`` is a table.

    Attributes:
        passes, total: what was measured.
        graph_before, graph_after: the graph before the first pass and after the last in plain values; ``None`` in
            reports of versions that kept none.
        sensitivity: what passes, or a search, found of the error of single layers.
    """

    passes: tuple[PassRecord, ...]
    total: Total
    graph_before: GraphSketch | None = dataclasses.field(default=None, repr=False)
    graph_after: GraphSketch | None = dataclasses.field(default=None, repr=False)
    sensitivity: tuple[Curve, ...] = dataclasses.field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values with the fields as keys; see :class:`PassRecord`, :class:`Total`, and
        :class:`GraphSketch` and :class:`Curve` in ``fxcompress.reporting``.
        """
        total = {**dataclasses.asdict(self.total), "cr_p": self.total.cr_p, "cr_f": self.total.cr_f}
        whole: dict[str, Any] = {
            "passes": [dataclasses.asdict(p) for p in self.passes],
            "total": total,
            "graph_before": self.graph_before and self.graph_before.to_dict(),
            "graph_after": self.graph_after and self.graph_after.to_dict(),
            "sensitivity": [dataclasses.asdict(curve) for curve in self.sensitivity],
        }
        return {key: plain(value) for key, value in whole.items()}

    def to_html(
        self, path: str | os.PathLike[str], *, title: str | None = None, measured: Mapping[str, Any] | None = None
    ) -> None:
        """Write the report as one page for a browser that loads nothing else; the file is there whole or not at all.

        Args:
            path: the file to write.
            title: of the page; by default the class name of the model.
            measured: what you measured yourself, shown beside the totals, such as ``{"agreement": "98.4%"}``.

        Raises:
            UsageError: the file cannot be written.
        """
        write_text(path, page(self.to_dict(), title=title, measured=measured))

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as strictly valid JSON (no NaN, no Infinity)."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`.

        Raises:
            UsageError: ``data`` is no such dict.
        """
        try:
            total = {k: v for k, v in data["total"].items() if k not in ("cr_p", "cr_f")}
            total["warnings"] = tuple(total["warnings"])
            before, after = data.get("graph_before"), data.get("graph_after")
            return cls(
                tuple(PassRecord.from_dict(p) for p in data["passes"]),
                Total(**total),
                None if before is None else GraphSketch.from_dict(before),
                None if after is None else GraphSketch.from_dict(after),
                tuple(Curve.from_dict(curve) for curve in data.get("sensitivity", ())),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"this is no report of fxcompress ({error!r}); pass what to_dict() returned") from error

    def followed_by(self, later: Report) -> Report:
        """This history and then ``later``, as when a compressed graph is compressed again."""
        a, b = self.total, later.total
        warnings = (*a.warnings, *b.warnings)
        comparable = a.macs_after == b.macs_before
        if not comparable:
            warnings += ("the calls of compile ran on different example inputs, so there are no MACs in total",)
        total = Total(
            parameters_before=a.parameters_before,
            parameters_after=b.parameters_after,
            macs_before=a.macs_before if comparable else None,
            macs_after=b.macs_after if comparable else None,
            bytes_before=a.bytes_before,
            bytes_after=b.bytes_after,
            seconds=a.seconds + b.seconds,
            warnings=tuple(dict.fromkeys(warnings)),
        )
        curves = self.sensitivity + later.sensitivity
        return Report(self.passes + later.passes, total, self.graph_before, later.graph_after, curves)

    def __str__(self) -> str:
        rows = [_row(p.name, p.guarantee, str(p.sites), str(len(p.refusals)), _error(p), p) for p in self.passes]
        rows.append(_row("total", "", "", "", "", self.total))
        headers = ["pass", "guarantee", "sites", "refusals", "error", "parameters", "MACs", "bytes", "seconds"]
        if any(p.latency_before is not None for p in self.passes):
            headers.append("latency")
            for row, cell in zip(rows, [*map(_latency, self.passes), ""], strict=True):
                row.append(cell)
        align = ["left", "left", *["right"] * (len(headers) - 2)]
        table = tabulate(rows, headers=headers, disable_numparse=True, colalign=align)
        cr_f = "unknown (no MACs)" if self.total.cr_f is None else f"{self.total.cr_f:.2f}%"
        lines = [table, f"CR-P {self.total.cr_p:.2f}%   CR-F {cr_f}"]
        lines += [f"{p.name}: {p.verification}" for p in self.passes if not p.verified]
        lines += [f"{p.name}: warning: {text}" for p in self.passes for text in p.warnings]
        lines += [f"warning: {text}" for text in self.total.warnings]
        return "\n".join(lines)


def _reduction(before: int, after: int) -> float:
    return 100.0 * (before - after) / before if before else 0.0


def _row(name: str, guarantee: str, sites: str, refusals: str, error: str, sizes: PassRecord | Total) -> list[str]:
    return [
        name,
        guarantee,
        sites,
        refusals,
        error,
        _change(_count(sizes.parameters_before), _count(sizes.parameters_after)),
        _change(_count(sizes.macs_before), _count(sizes.macs_after)),
        _change(_bytes(sizes.bytes_before), _bytes(sizes.bytes_after)),
        f"{sizes.seconds:.2f}",
    ]


def _latency(record: PassRecord) -> str:
    if record.latency_before is None or record.latency_after is None:
        return "-"
    text = _change(*(f"{1e3 * seconds:.3g} ms" for seconds in (record.latency_before, record.latency_after)))
    return f"{text}, rolled back" if record.rolled_back else text


def _error(record: PassRecord) -> str:
    if record.rolled_back:
        return "-"
    if not record.verified:
        return "unverified"
    return "-" if record.error is None else f"{record.error:.1e}"


def _change(before: str, after: str) -> str:
    return f"{before} -> {after}"


def plain(value: Any) -> Any:
    """``value`` as something JSON has: numbers, strings, lists, dicts; infinities and NaN become strings."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, nn.Module) and next(value.children(), None) is not None:
        return type(value).__name__  # all of it would be pages
    return str(value)


class _Carrier(nn.Module):
    """Holds the report of the graph module that it is a child of. Is called by nothing."""

    def __init__(self, contents: Report) -> None:
        super().__init__()
        self.contents = contents

    def extra_repr(self) -> str:
        """The names of the passes."""
        return ", ".join(p.name for p in self.contents.passes)


def attach(gm: fx.GraphModule, contents: Report) -> None:
    """Give ``gm`` its report, in place of the one it had."""
    setattr(gm, CARRIER, _Carrier(contents).train(gm.training))


def detach(gm: fx.GraphModule) -> Report | None:
    """Take the report of ``gm`` away and return it, if there is one."""
    carrier = getattr(gm, CARRIER, None)
    if not isinstance(carrier, _Carrier):
        return None
    delattr(gm, CARRIER)
    return carrier.contents


def report(gm: nn.Module) -> Report:
    """The history of ``gm``, which :func:`fxcompress.compile` returned (also after a copy, or pickling and back).

    Raises:
        UsageError: ``gm`` has no history.
    """
    carrier = getattr(gm, CARRIER, None)
    if not isinstance(carrier, _Carrier):
        raise UsageError(
            f"this {type(gm).__name__} has no report: it does not come from fxcompress.compile, or a tool that drops "
            "modules which no node calls went over it"
        )
    return carrier.contents
