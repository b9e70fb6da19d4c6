"""A picture of what a low-rank pass did to each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxcompress.errors import UsageError
from fxcompress.report import PassRecord, Report

__all__ = ["plot_ranks"]


def plot_ranks(report: Report, path: str | Path) -> None:
    """Draw each layer's weights before and after, with scheme, slices and rank beside them.

    Args:
        report: what :func:`fxcompress.report` gives; its last low-rank pass is drawn.
        path: of the picture; the ending says of what kind (``.png``, ``.svg``, ``.pdf``).

    Raises:
        UsageError: matplotlib is not installed, or the report has no low-rank pass.
    """
    record = next((p for p in reversed(report.passes) if p.details and _is_low_rank(p)), None)
    if record is None:
        names = ", ".join(p.name for p in report.passes) or "none"
        raise UsageError(f"there is no low-rank pass in this report; it has {names}")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UsageError('plot_ranks needs matplotlib: pip install "fxcompress[plot]"') from error
    layers = record.details
    figure = Figure(figsize=(9, 1.2 + 0.24 * len(layers)), layout="constrained")
    axes = figure.subplots()
    places = range(len(layers))
    axes.barh(places, _weights(layers, "before"), color="0.85", label="before")
    axes.barh(places, _weights(layers, "after"), height=0.5, color="tab:blue", label="after")
    for place, layer in zip(places, layers, strict=True):
        axes.annotate(f" {_said(layer)}", (layer["parameters_before"], place), va="center", fontsize=7)
    axes.set_yticks(places, [layer["module"] for layer in layers], fontsize=7)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.margins(x=0.25)
    axes.set_xlabel("weights")
    axes.set_title(
        f"{record.name}: {record.parameters_before:,} -> {record.parameters_after:,} parameters", fontsize=10
    )
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def _is_low_rank(record: PassRecord) -> bool:
    return all({"module", "rank", "slices", "scheme"} <= set(layer) for layer in record.details)


def _weights(layers: Sequence[Mapping[str, Any]], when: str) -> list[int]:
    return [layer[f"parameters_{when}"] for layer in layers]


def _said(layer: Mapping[str, Any]) -> str:
    if layer["rank"] is None:
        return "whole"
    slices = "" if layer["slices"] == 1 else f"{layer['slices']} x "
    return f"{slices}rank {layer['rank']}" + (f", scheme {layer['scheme']}" if layer["scheme"] else "")
