"""Pure questions about a graph. Nothing here changes a graph, a module or an input."""

from fxcompress.analysis.aliasing import Aliasing, aliasing
from fxcompress.analysis.cost import Cost, cost
from fxcompress.analysis.inputs import bind_inputs
from fxcompress.analysis.latency import Latency, compare_latency, latency
from fxcompress.analysis.running import GraphRunner, undisturbed
from fxcompress.analysis.shapes import Shapes, TensorSpec, shapes

__all__ = [
    "Aliasing",
    "Cost",
    "GraphRunner",
    "Latency",
    "Shapes",
    "TensorSpec",
    "aliasing",
    "bind_inputs",
    "compare_latency",
    "cost",
    "latency",
    "shapes",
    "undisturbed",
]
