"""Reports for people: a graph in plain values, two of them side by side, and a page that shows them.

What is drawn is what ``Report.to_dict()`` says; nothing here knows passes, or measures anything.
"""

from fxcompress.reporting.comparing import Comparison, compare
from fxcompress.reporting.page import page
from fxcompress.reporting.sketch import CURVE, Curve, GraphSketch, NodeSketch, sketch

__all__ = ["CURVE", "Comparison", "Curve", "GraphSketch", "NodeSketch", "compare", "page", "sketch"]
