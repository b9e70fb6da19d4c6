"""Training a compressed graph, to make up for what compression lost; in one process or many, and through any crash."""

from fxcompress.recovery.gradual import Gradual
from fxcompress.recovery.run import recover
from fxcompress.recovery.schedules import Milestones, Rewound, Schedule, Warmup, constant, cosine, linear

__all__ = ["Gradual", "Milestones", "Rewound", "Schedule", "Warmup", "constant", "cosine", "linear", "recover"]
