"""The tables of ``zoo.py``: counts, what is left and how far off it is, a row for each network, what did not work."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import publish

__all__ = ["details", "summary"]

Record = dict[str, Any]
_MEANINGS = {
    "fold": "batch norms into layers",
    "prune": "half of the channels",
    "alds": "half of the parameters",
    "int8": "fold, integers, their kernels",
    "all": "fold, prune 30%, ALDS 30%, int8",
}
_LONGEST = 160


def summary(records: Sequence[Record], models: Mapping[str, int], columns: Sequence[str]) -> str:
    """How often each column worked, by set, and medians of what it left."""
    whole = _of(records, lambda r: True)
    sets = [s for s in models if models[s]]
    rows = [[s, _models(records, s, models), *(_count(_of(records, _is(s, c))) for c in columns)] for s in sets]
    if len(sets) > 1:
        seen = len({(r["set"], r["model"]) for r in records})
        rows.append(["all", _part(seen, sum(models.values())), *(_count(_of(records, _is("", c))) for c in columns)])
    text = publish.markdown(rows, ["worked", "models", *columns])
    headers = [
        "column",
        "worked",
        "refused",
        "failed",
        "of them silent",
        "nothing to do",
        "parameters",
        "MACs",
        "bytes",
    ]
    headers += ["seconds", "error"]
    return "\n\n".join([text, publish.markdown([_column(whole, c) for c in columns], headers)])


def _of(records: Sequence[Record], wanted: Callable[[Record], bool]) -> list[Record]:
    return [r for r in records if wanted(r)]


def _is(set_: str, column: str) -> Callable[[Record], bool]:
    return lambda r: r["column"] == column and set_ in ("", r["set"])


def _models(records: Sequence[Record], set_: str, models: Mapping[str, int]) -> str:
    return _part(len({r["model"] for r in records if r["set"] == set_}), models[set_])


def _part(some: int, of: int) -> str:
    return str(of) if some == of else f"{some} of {of} so far"


def _number(records: Sequence[Record], status: str) -> int:
    return sum(r["status"] == status for r in records)


def _count(records: Sequence[Record]) -> str:
    """``worked of those on which there was something to do``."""
    idle = _number(records, "nothing to do") + _number(records, "not traced")
    return f"{_number(records, 'worked')} of {len(records) - idle}"


def _column(records: Sequence[Record], column: str) -> list[str]:
    found = _of(records, _is("", column))
    worked = _of(found, lambda r: r["status"] == "worked")
    silent = sum(r["status"] == "failed" and r["reason"].startswith("silent error") for r in found)
    idle = _number(found, "nothing to do") + _number(found, "not traced")
    share = _number(found, "worked") / max(len(found) - idle, 1)
    row = [f"{column} ({_MEANINGS[column]})", f"{share:.1%}", str(_number(found, "refused"))]
    row += [str(_number(found, "failed")), str(silent), str(_number(found, "nothing to do"))]
    row += [_median(worked, lambda r, of=of: _left(r, of)) for of in ("parameters", "macs", "bytes")]
    seconds = sorted(r["compile_seconds"] for r in worked)
    row.append(f"{statistics.median(seconds):.1f}" if seconds else "")
    return [*row, _error(worked, column)]


def _median(records: Sequence[Record], of: Callable[[Record], float]) -> str:
    return f"{statistics.median([of(r) for r in records]):.0%}" if records else ""


def _left(record: Record, of: str) -> float:
    return float(record["after"][of] / max(record["before"][of], 1))


def _error(worked: Sequence[Record], column: str) -> str:
    if not worked:
        return ""
    if column == "fold":
        proved = max(r["exact_float64"] for r in worked)
        return f"at most {max(r['error'] for r in worked):.0e} in float32, {proved:.0e} in float64"
    key = "integer_l2" if "integer_l2" in worked[0] else "relative_l2"
    found = sorted(r[key] for r in worked)
    whose = "of the integers" if key == "integer_l2" else "without training"
    return f"median {statistics.median(found):.2f}, at most {found[-1]:.2f} {whose}"


# --------------------------------------------------------------------------------------------------- every network
def details(records: Sequence[Record], columns: Sequence[str]) -> str:
    """What did not work, and a row for each network."""
    bad = [r for r in records if r["status"] not in ("worked", "nothing to do")]
    lines = [f"- {r['set']} {r['model']}, {r['column']}: {r['status']}: {_short(r['reason'])}" for r in bad]
    text = "\n".join(["What did not work:", "", *lines] if lines else ["Nothing failed or was refused."])
    return "\n\n".join([text, _every(records, columns)])


def _short(reason: str) -> str:
    line = reason.splitlines()[0] if reason else ""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def _every(records: Sequence[Record], columns: Sequence[str]) -> str:
    cells: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        cells.setdefault((record["set"], record["model"]), {})[record["column"]] = record
    headers = ["set", "model", "M parameters"]
    headers += [f"{c}: parameters / MACs left, error" if c != "fold" else "fold: error" for c in columns]
    return publish.markdown([_network(key, of, columns) for key, of in cells.items()], headers)


def _network(key: tuple[str, str], of: Mapping[str, Record], columns: Sequence[str]) -> list[str]:
    sizes = [r["parameters"] for r in of.values() if "parameters" in r]
    return [*key, f"{sizes[0] / 1e6:.1f}" if sizes else "", *(_cell(of[c]) if c in of else "-" for c in columns)]


def _cell(record: Record) -> str:
    if record["status"] != "worked":
        return str(record["status"])
    if record["column"] == "fold":
        return f"{record['error']:.0e}"
    error = record.get("integer_l2", record["relative_l2"])
    return f"{_left(record, 'parameters'):.0%} / {_left(record, 'macs'):.0%}, {error:.2f}"
