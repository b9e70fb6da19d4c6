"""The tables of ``zoo.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["tables"]


def tables(records: Sequence[dict[str, Any]], models: dict[str, int], columns: Sequence[str]) -> str:
    """Counts."""
    return "\n".join(f"{r['set']} {r['model']} {r['column']} {r['status']} {r['reason'][:200]}" for r in records)
