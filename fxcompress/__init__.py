"""Model compression by rewriting ``torch.fx`` graphs: record any model, rewrite it, prove every step.

>>> import torch, fxcompress
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
>>> smaller = fxcompress.compile(model, ["fold-batch-norm"], torch.randn(1, 3, 8, 8))
>>> print(fxcompress.report(smaller))
"""

from importlib import metadata as _metadata

from fxcompress.errors import (
    FxCompressError,
    PassError,
    PreconditionError,
    RecoveryError,
    SerializationError,
    TraceError,
    UsageError,
    VerificationError,
)
from fxcompress.exporting import export, export_onnx
from fxcompress.order import recommended_order
from fxcompress.pass_base import (
    Example,
    Guarantee,
    Knob,
    Need,
    Observation,
    Observer,
    Pass,
    PassContext,
    Refusal,
    Site,
    Stage,
)
from fxcompress.pipeline import PassPlan, Plan, compile, plan
from fxcompress.presets import presets
from fxcompress.recovery import Gradual, Rewound, Schedule, recover
from fxcompress.registry import registered_passes
from fxcompress.report import PassRecord, Report, report
from fxcompress.searching import Point, SearchResult, search
from fxcompress.serialization import load, save
from fxcompress.storable import storable
from fxcompress.trace import trace

__all__ = [
    "Example",
    "FxCompressError",
    "Gradual",
    "Guarantee",
    "Knob",
    "Need",
    "Observation",
    "Observer",
    "Pass",
    "PassContext",
    "PassError",
    "PassPlan",
    "PassRecord",
    "Plan",
    "Point",
    "PreconditionError",
    "RecoveryError",
    "Refusal",
    "Report",
    "Rewound",
    "Schedule",
    "SearchResult",
    "SerializationError",
    "Site",
    "Stage",
    "TraceError",
    "UsageError",
    "VerificationError",
    "__version__",
    "compile",
    "export",
    "export_onnx",
    "load",
    "plan",
    "presets",
    "recommended_order",
    "recover",
    "registered_passes",
    "report",
    "save",
    "search",
    "storable",
    "trace",
]

try:
    __version__ = _metadata.version("fxcompress")
except _metadata.PackageNotFoundError:  # on sys.path but not installed
    __version__ = "0+uninstalled"
