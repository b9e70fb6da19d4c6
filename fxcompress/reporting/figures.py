"""Numbers in the words of a report."""

from __future__ import annotations

__all__ = ["bytes_", "change", "count", "percent_change", "relative", "seconds", "shortened"]


def count(number: float | None) -> str:
    """``4647072`` -> ``"4.65 M"``; ``"-"`` if it is not known."""
    return "-" if number is None else _scaled(number, 1000, ("", " k", " M", " G", " T", " P"))


def bytes_(number: float | None) -> str:
    """``2048`` -> ``"2.00 KiB"``; ``"-"`` if it is not known."""
    return "-" if number is None else _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def seconds(number: float | None) -> str:
    """``0.0123`` -> ``"12.3 ms"``; ``"-"`` if it is not known."""
    if number is None:
        return "-"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if number * factor >= 1 or unit == "µs":
            break
    return f"{number * factor:.3g} {unit}"


def relative(error: float | str | None) -> str:
    """``0.0321`` -> ``"0.032"``; ``"-"`` if it is not known. Infinities are words in a report."""
    if error is None or isinstance(error, str):
        return error or "-"
    return f"{error:.1e}" if 0 < abs(error) < 1e-3 else f"{error:.2g}"


def change(before: str, after: str) -> str:
    """Before and after, or one of them if they are the same."""
    return before if before == after else f"{before} → {after}"


def shortened(text: str, most: int) -> str:
    """``text``, cut to ``most`` characters with an ellipsis at the end if it is longer."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def percent_change(before: float | None, after: float | None) -> str:
    """``"−30.0%"``; empty if one of them is not known, nothing changed, or there was nothing before."""
    if before is None or after is None or not before or before == after:
        return ""
    percent = 100 * (after - before) / before
    return f"{'−' if percent < 0 else '+'}{abs(percent):.1f}%"


def _scaled(number: float, base: int, units: tuple[str, ...]) -> str:
    value, power = float(number), 0
    while value >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.2f}{units[power]}" if power else f"{number:g}{units[0]}"
