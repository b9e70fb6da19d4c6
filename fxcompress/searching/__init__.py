"""Choosing passes and what they do to each layer, within a target; knows passes by name and by their knobs only."""

from fxcompress.searching.result import Point, SearchResult
from fxcompress.searching.run import DEFAULT_PASSES, search

__all__ = ["DEFAULT_PASSES", "Point", "SearchResult", "search"]
