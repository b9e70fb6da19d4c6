"""The record of a run: a CSV file with a row for every step, and a plot of it."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxcompress.errors import UsageError
from fxcompress.recovery.checkpoints import reported, written_whole

__all__ = ["Logbook"]

_FIRST, _LAST = ("step", "epoch", "stage", "lr", "loss"), ("seconds", "evaluation")


class Logbook:
    """Writes a row for every step. A run that goes on continues the file, without what came after the checkpoint.

    Args:
        path: of the CSV file; with the suffix ``.png`` a plot is drawn there, beside a CSV file of the same name.
        step: the step that the run starts or goes on from; later rows are dropped.

    Raises:
        UsageError: a plot is wanted and matplotlib is missing.
    """

    def __init__(self, path: str | os.PathLike[str], step: int) -> None:
        self._plot = Path(path) if Path(path).suffix == ".png" else None
        if self._plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise UsageError("a plot needs matplotlib: pip install 'fxcompress[plot]', or log to a .csv file")
        self._path = Path(path).with_suffix(".csv") if self._plot is not None else Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = [row for row in self._read() if int(row["step"]) <= step] if step else []
        self._columns: Sequence[str] = tuple(self._rows[0]) if self._rows else ()
        earlier = float(self._rows[-1]["seconds"]) if self._rows else 0.0
        self._start = time.perf_counter() - earlier
        written_whole(self._path, self._text(self._rows, header=True) if self._rows else "")

    def _read(self) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            # A row that a killed process did not finish has too few columns, the missing ones being None.
            return [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdigit()]

    def write(self, row: Mapping[str, Any], terms: Mapping[str, float]) -> None:
        """Append a row: ``step``, ``epoch``, ``stage``, ``lr``, ``loss``, ``evaluation`` and each term of the loss."""
        header = not self._columns
        if header:
            self._columns = (*_FIRST, *(name for name in terms if name not in _FIRST), *_LAST)
        seconds = f"{time.perf_counter() - self._start:.3f}"
        full = {**{k: v for k, v in terms.items() if k not in _FIRST}, **row, "seconds": seconds}
        self._rows.append({key: str(full.get(key, "")) for key in self._columns})
        with reported(self._path), self._path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._text(self._rows[-1:], header))

    def _text(self, rows: Sequence[Mapping[str, str]], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n", extrasaction="ignore")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def close(self) -> None:
        """Draw the plot, if one is wanted: loss and evaluation over the steps."""
        if self._plot is None or not self._rows:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        names = [c for c in self._columns if c not in (*_FIRST[:-1], *_LAST)]
        for name in names if len(names) > 2 else ["loss"]:
            values = [(int(r["step"]), float(r[name])) for r in self._rows if r[name]]
            axes.plot(*zip(*values, strict=True), label=name, linewidth=1)
        axes.set(xlabel="step", ylabel="loss")
        marks = [(int(r["step"]), float(r["evaluation"])) for r in self._rows if r["evaluation"]]
        if marks:
            right = axes.twinx()
            right.plot(*zip(*marks, strict=True), "k.-", label="evaluation")
            right.set_ylabel("evaluation")
        axes.legend(loc="upper right")
        figure.savefig(self._plot, dpi=120)
