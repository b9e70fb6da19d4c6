"""The part of the page about sensitivity: how the error follows a setting, a chart for each kind of setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxcompress.reporting.markup import Markup, number, tag

__all__ = ["charts"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 340, 62, 14, 12, 44

Points = Sequence[tuple[float, float]]


def charts(curves: Sequence[Mapping[str, Any]]) -> Markup:
    """A chart for each knob, with a list of its layers to choose one from."""
    by_knob: dict[str, list[tuple[str, Points]]] = {}
    for curve in curves:
        points = sorted((float(x), float(y)) for x, y in curve["points"])
        finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        if finite:
            by_knob.setdefault(curve["knob"], []).append((curve["layer"], finite))
    return Markup("".join(_chart(i, knob, found) for i, (knob, found) in enumerate(by_knob.items())))


def _chart(i: int, knob: str, curves: Sequence[tuple[str, Points]]) -> Markup:
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    across, x_ticks = _linear(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    logarithmic = _is_wide(ys)
    scale = _logarithmic if logarithmic else _linear
    lowest = min(y for y in ys if y > 0) if logarithmic else min(0.0, min(ys))
    up, y_ticks = scale(lowest, max(ys), _HEIGHT - _BOTTOM, _TOP)
    lines = [_line(k, layer, points, across, up, lowest) for k, (layer, points) in enumerate(curves)]
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    y_name = "error (logarithmic)" if logarithmic else "error"
    drawing = tag(
        "svg",
        (_grid_line(_LEFT, up(y), _WIDTH - _RIGHT, up(y), text, "end") for y, text in y_ticks),
        (_grid_line(across(x), _TOP, across(x), _HEIGHT - _BOTTOM, text, "middle") for x, text in x_ticks),
        lines,
        tag("text", knob, class_="axis", x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 6, text_anchor="middle"),
        tag("text", y_name, class_="axis", x=14, y=middle, text_anchor="middle", transform=f"rotate(-90 14 {middle})"),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"Error by {knob} of {len(curves)} layers",
    )
    items = (_item(i, k, layer, points) for k, (layer, points) in enumerate(curves))
    listing = tag(
        "ul", items, class_="choices", role="listbox", tabindex=0, aria_label=f"Layers with a curve over {knob}"
    )
    return tag(
        "figure",
        tag("figcaption", f"Error by {knob}"),
        tag("div", tag("div", drawing, class_="plot"), listing, class_="chart"),
        class_="curves",
        data_knob=knob,
    )


def _is_wide(ys: Sequence[float]) -> bool:
    positive = [y for y in ys if y > 0]
    return bool(positive) and min(ys) >= 0 and max(positive) / min(positive) > 30


def _line(
    k: int,
    layer: str,
    points: Points,
    across: Callable[[float], float],
    up: Callable[[float], float],
    lowest: float,
) -> Markup:
    places = [(across(x), up(max(y, lowest))) for x, y in points]
    line = tag("polyline", points=" ".join(f"{number(x)},{number(y)}" for x, y in places))
    dots = [tag("circle", cx=number(x), cy=number(y), r=3) for x, y in places]
    return tag("g", tag("title", layer), line, dots, class_="curve", data_curve=k)


def _grid_line(x1: float, y1: float, x2: float, y2: float, text: str, anchor: str) -> Markup:
    line = tag("line", x1=number(x1), y1=number(y1), x2=number(x2), y2=number(y2), class_="grid")
    x, y = (x1 - 6, y1 + 4) if anchor == "end" else (x1, y2 + 16)
    return Markup(line + tag("text", text, x=number(x), y=number(y), text_anchor=anchor, class_="tick"))


def _item(i: int, k: int, layer: str, points: Points) -> Markup:
    values = (Markup(tag("span", f"{x:.3g} → {y:.2g}") + " ") for x, y in points)
    return tag(
        "li",
        tag("span", layer, class_="path"),
        tag("span", values, class_="points"),
        role="option",
        id=f"curve-{i}-{k}",
        data_curve=k,
        aria_selected="false",
    )


Ticks = list[tuple[float, str]]


def _linear(low: float, high: float, start: float, stop: float) -> tuple[Callable[[float], float], Ticks]:
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    ticks = [(n * step, f"{n * step:.6g}") for n in range(first, first + 12) if n * step <= high + 1e-9 * span]

    def place(value: float) -> float:
        return start + (value - low) / span * (stop - start)

    return place, ticks


def _logarithmic(low: float, high: float, start: float, stop: float) -> tuple[Callable[[float], float], Ticks]:
    bottom, top = math.log10(low), math.log10(high)
    every = max(1, math.ceil((top - bottom) / 7))
    powers = range(math.floor(bottom), math.floor(top) + 1, every)
    factors = (1, 2, 5) if top - bottom < 3 else (1,)
    values = [factor * 10.0**n for n in powers for factor in factors if low <= factor * 10.0**n <= high * (1 + 1e-9)]

    def place(value: float) -> float:
        return start + (math.log10(value) - bottom) / ((top - bottom) or 1.0) * (stop - start)

    return place, [(value, f"{value:.0e}" if value < 1e-3 or value > 1e4 else f"{value:g}") for value in values]
