"""The main job on real input: compress a trained ImageNet classifier and look at what became of it.

:func:`run` does the work and returns a :class:`DemoResult`, whose ``str()`` is what ``fxcompress demo`` prints.
:data:`PASSES` is the list of passes; a new technique joins the demo by a line there. For the model and the photographs
see :mod:`fxcompress.demo_inputs`.
"""

from __future__ import annotations

import dataclasses
import io
import platform
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxcompress
from fxcompress.analysis.latency import Latency, compare_latency
from fxcompress.demo_inputs import class_names, load_model, load_photos, preprocess
from fxcompress.errors import TraceWarning
from fxcompress.progress import Event
from fxcompress.report import Report

__all__ = ["PASSES", "STAGES", "DemoResult", "Prediction", "classify", "run", "saved_bytes", "time_compiled"]

PASSES: tuple[str, ...] = ("remove-identity", "fold-batch-norm")

STAGES = (
    "load",
    "compress",
    "classify",
    "time eager",
    "torch.compile original",
    "torch.compile result",
    "time torch.compile",
)

Tell = Callable[[str, str], None]
"""Is told the stage that goes on now, one of :data:`STAGES`, and a detail of it (may be empty)."""


def _tell_nobody(stage: str, detail: str) -> None:
    """Be silent."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable class of one photo."""

    label: str
    probability: float

    def __str__(self) -> str:
        return f"{self.label} {self.probability:.1%}"


def classify(logits: torch.Tensor, names: Sequence[str]) -> list[Prediction]:
    """The most probable class in each row of ``logits`` of shape ``(batch, classes)``."""
    probability, index = logits.softmax(dim=1).max(dim=1)
    return [Prediction(names[i], p) for i, p in zip(index.tolist(), probability.tolist(), strict=True)]


def saved_bytes(model: nn.Module) -> int:
    """The size in bytes of ``torch.save(model.state_dict())``."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo found; ``str()`` is the text that ``fxcompress demo`` prints.

    Attributes:
        report: what each pass did.
        predictions: for each photo, the classes before and after.
        logit_error: largest difference of a logit, relative to the largest logit.
        size: bytes of the saved state dict, of the original and the result.
        eager: latency of one photo, of the original and the result.
        compiled: the same under ``torch.compile``, or the reason why there is no number.
        environment: versions and threads.
    """

    report: Report
    predictions: dict[str, tuple[Prediction, Prediction]]
    logit_error: float
    size: tuple[int, int]
    eager: dict[str, Latency]
    compiled: dict[str, Latency] | str
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON; latencies in seconds."""
        compiled = self.compiled
        return {
            "model": "efficientnet-lite0",
            "environment": self.environment,
            "report": self.report.to_dict(),
            "photos": {
                photo: {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)}
                for photo, (before, after) in self.predictions.items()
            },
            "logit_error": self.logit_error,
            "state_dict_bytes": dict(zip(("original", "result"), self.size, strict=True)),
            "latency_eager": {name: dataclasses.asdict(value) for name, value in self.eager.items()},
            "latency_compiled": compiled
            if isinstance(compiled, str)
            else {name: dataclasses.asdict(value) for name, value in compiled.items()},
        }

    def __str__(self) -> str:
        photos = [(photo, str(before), str(after)) for photo, (before, after) in self.predictions.items()]
        changed = sum(before.label != after.label for before, after in self.predictions.values())
        environment = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        return "\n".join(
            [
                "EfficientNet-Lite0 with its ImageNet weights",
                "",
                str(self.report),
                "",
                tabulate(photos, headers=("photo", "top-1 before", "top-1 after"), disable_numparse=True),
                f"{changed} of {len(photos)} labels changed; largest difference of a logit: {self.logit_error:.1e} "
                "of the largest logit",
                "",
                tabulate(self._costs(), headers=("", "original", "result", ""), disable_numparse=True),
                f"latency of one photo: median +- interquartile range; {environment}",
                *([f"torch.compile was not measured: {self.compiled}"] if isinstance(self.compiled, str) else []),
            ]
        )

    def _costs(self) -> list[tuple[str, str, str, str]]:
        before, after = self.size
        rows = [("state dict on disk", f"{before / 1e6:.2f} MB", f"{after / 1e6:.2f} MB", f"{after / before - 1:+.1%}")]
        for name, times in (("latency, eager", self.eager), ("latency, torch.compile", self.compiled)):
            if isinstance(times, str):
                rows.append((name, "not measured", "not measured", ""))
            else:
                rows.append((name, str(times["original"]), str(times["result"]), _speed(times)))
        return rows


def _speed(times: dict[str, Latency]) -> str:
    """The ratio of the medians, if they are further apart than the noise."""
    original, result = times["original"], times["result"]
    if abs(original.median - result.median) <= max(original.iqr, result.iqr):
        return "same within noise"
    return f"{original.median / result.median:.2f}x as fast"


def _compiler_complaint(error: Exception) -> str:
    """The line of a failed ``torch.compile`` that says what is missing (a compiler, or ``Python.h``)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)


def time_compiled(
    models: dict[str, nn.Module], example: torch.Tensor, repeats: int, tell: Tell
) -> dict[str, Latency] | str:
    """Latency of ``models`` under ``torch.compile``, or why it cannot work here (it needs a C++ compiler on CPU)."""
    from torch._dynamo.exc import BackendCompilerFailed

    compiled: dict[str, Callable[..., Any]] = {}
    for name, model in models.items():
        tell(f"torch.compile {name}", "")
        compiled[name] = torch.compile(model)
        try:
            with torch.no_grad():
                compiled[name](example)
        except BackendCompilerFailed as error:
            return _compiler_complaint(error)
    tell("time torch.compile", "")
    return compare_latency(compiled, (example,), repeats=repeats)


def run(
    *,
    passes: Sequence[str] = PASSES,
    repeats: int = 20,
    with_torch_compile: bool = True,
    tell: Tell = _tell_nobody,
) -> DemoResult:
    """Compress the demo's model and compare it with the original.

    Args:
        passes: what to run, as for :func:`fxcompress.compile`.
        repeats: timed calls for each latency.
        with_torch_compile: also time both models under ``torch.compile``, which first takes about a minute each.
        tell: is told what goes on.

    Raises:
        UsageError: the extra ``demo`` is not installed, or ``repeats`` is below 1.
    """
    tell("load", "")
    model, names = load_model(), class_names()
    photos = {name: preprocess(photo) for name, photo in load_photos().items()}
    batch = torch.stack(list(photos.values()))
    example = batch[:1]
    tell("compress", "")

    def on_event(event: Event) -> None:
        tell("compress", f"{event.pass_name or ''} {event.stage}".strip())

    with warnings.catch_warnings():
        # In training mode the network drops whole blocks too, by Python code that no graph keeps; nothing trains it.
        warnings.simplefilter("ignore", TraceWarning)
        result = fxcompress.compile(model, list(passes), (example,), progress=on_event)
    tell("classify", "")
    with torch.no_grad():
        before, after = model(batch), result(batch)
    pairs = zip(classify(before, names), classify(after, names), strict=True)
    models: dict[str, nn.Module] = {"original": model, "result": result}
    tell("time eager", "")
    eager = compare_latency(models, (example,), repeats=repeats)
    compiled: dict[str, Latency] | str = "it was left out"
    if with_torch_compile:
        compiled = time_compiled(models, example, repeats, tell)
    return DemoResult(
        report=fxcompress.report(result),
        predictions=dict(zip(photos, pairs, strict=True)),
        logit_error=((after - before).abs().max() / before.abs().max()).item(),
        size=(saved_bytes(model), saved_bytes(result)),
        eager=eager,
        compiled=compiled,
        environment=_environment(),
    )


def _environment() -> dict[str, Any]:
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
