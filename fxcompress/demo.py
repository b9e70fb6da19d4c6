"""The main job on real input: compress a trained ImageNet classifier and look at what became of it.

:func:`run` does the work and returns a :class:`DemoResult`, whose ``str()`` is what ``fxcompress demo`` prints.
:data:`VARIANTS` says which passes make which result; a new technique joins the demo by a line there. For the model and
the photographs see :mod:`fxcompress.demo_inputs`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxcompress
from fxcompress.analysis.latency import Latency, compare_latency
from fxcompress.demo_inputs import class_names, crops, load_model, load_photos, preprocess
from fxcompress.errors import TraceWarning
from fxcompress.presets import PRESETS
from fxcompress.progress import Event
from fxcompress.report import Report

__all__ = [
    "STAGES",
    "VARIANTS",
    "DemoResult",
    "Outcome",
    "Prediction",
    "classify",
    "run",
    "saved_bytes",
    "time_compiled",
]

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "folded": ("remove-identity", "fold-batch-norm"),
    "factorised": ("remove-identity", "fold-batch-norm", "alds:ratio=0.2,error=activation"),
    "int8": PRESETS["fast-cpu"],
    "both": PRESETS["small"],
    "pruned": ("remove-identity", "prune-channels:ratio=0.2,measure=macs,reconstruct=True", "fold-batch-norm"),
}
"""Name of a result -> the passes that make it, in order. One that begins with another's passes goes on from that."""

ORIGINAL = "original"

CALIBRATION_CROPS, HELD_OUT_CROPS, BATCH = 64, 128, 16

STAGES = ("load", "compress", "save and load", "classify", "time eager", "torch.compile", "time torch.compile")

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
class Outcome:
    """What is known of one model, the original or a result.

    Attributes:
        predictions: the class of each photo, in order.
        agreement: the fraction of held-out crops whose class is that which the original gives.
        logit_error: largest difference of a logit of a held-out crop, relative to the original's largest logit.
        size: bytes on disk: of the files that ``fxcompress.save`` wrote, or of the original's saved state dict.
        eager: latency of one photo.
        compiled: the same under ``torch.compile``, if it was measured.
    """

    predictions: tuple[Prediction, ...]
    agreement: float
    logit_error: float
    size: int
    eager: Latency
    compiled: Latency | None


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo found; ``str()`` is the text that ``fxcompress demo`` prints.

    Attributes:
        photos: their names.
        reports: what each pass did, for each variant.
        outcomes: the original, then each variant.
        not_compiled: why there are no latencies under ``torch.compile``; empty if there are.
        environment: versions and threads.
    """

    photos: tuple[str, ...]
    reports: dict[str, Report]
    outcomes: dict[str, Outcome]
    not_compiled: str
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON; latencies in seconds."""
        return {
            "model": "efficientnet-lite0",
            "environment": self.environment,
            "photos": list(self.photos),
            "reports": {name: report.to_dict() for name, report in self.reports.items()},
            "outcomes": {name: dataclasses.asdict(outcome) for name, outcome in self.outcomes.items()},
            "not_compiled": self.not_compiled,
        }

    def __str__(self) -> str:
        labels = zip(*(outcome.predictions for outcome in self.outcomes.values()), strict=True)
        photos = [(photo, *map(str, row)) for photo, row in zip(self.photos, labels, strict=True)]
        environment = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        parts = ["EfficientNet-Lite0 with its ImageNet weights"]
        for name, report in self.reports.items():
            parts += ["", f"{name}:", str(report)]
        return "\n".join(
            [
                *parts,
                "",
                tabulate(photos, headers=("photo", *self.outcomes), disable_numparse=True),
                "",
                tabulate(self._rows(), headers=_HEADERS, disable_numparse=True),
                f"same class: as the original, of {HELD_OUT_CROPS} other crops of the photos than the passes were "
                "shown; logit error: relative to the largest logit",
                "results are as they come back from fxcompress.save and fxcompress.load; on disk: all files of one",
                f"latency of one photo: median +- interquartile range; {environment}",
                *([f"torch.compile was not measured: {self.not_compiled}"] if self.not_compiled else []),
            ]
        )

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        first = self.outcomes[ORIGINAL]
        totals = {name: report.total for name, report in self.reports.items()}
        before = next(iter(totals.values()))
        for name, outcome in self.outcomes.items():
            total = totals.get(name)
            parameters = before.parameters_before if total is None else total.parameters_after
            macs = before.macs_before if total is None else total.macs_after
            row = [name, f"{parameters / 1e6:.2f} M", f"{(macs or 0) / 1e6:.1f} M", f"{outcome.size / 1e6:.2f} MB"]
            row += [f"{outcome.agreement:.1%}", f"{outcome.logit_error:.1e}"]
            for now, then in ((outcome.eager, first.eager), (outcome.compiled, first.compiled)):
                row.append("not measured" if now is None or then is None else f"{now}{_speed(then, now)}")
            rows.append(tuple(row))
        return rows


_HEADERS = (
    "",
    "parameters",
    "MACs",
    "on disk",
    "same class",
    "logit error",
    "latency, eager",
    "latency, torch.compile",
)


def _speed(original: Latency, result: Latency) -> str:
    """The ratio of the medians, if they are further apart than the noise."""
    if abs(original.median - result.median) <= max(original.iqr, result.iqr):
        return ""
    return f" ({original.median / result.median:.2f}x as fast)"


def _compiler_complaint(error: Exception) -> str:
    """The line of a failed ``torch.compile`` that says what is missing (a compiler, or ``Python.h``)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)


def time_compiled(
    models: dict[str, nn.Module], example: torch.Tensor, repeats: int, tell: Tell
) -> dict[str, Latency] | str:
    """Latency of ``models`` under ``torch.compile``, or why it cannot work here (it needs a C++ compiler on CPU).

    Weights are frozen (``torch._inductor.config.freezing``), as they are for who serves a model; without that there are
    no integer kernels.
    """
    import torch._inductor.config as inductor
    from torch._dynamo.exc import BackendCompilerFailed

    compiled: dict[str, Callable[..., Any]] = {}
    for name, model in models.items():
        tell("torch.compile", name)
        compiled[name] = torch.compile(model)
        try:
            with torch.no_grad(), inductor.patch(freezing=True):
                compiled[name](example)
        except BackendCompilerFailed as error:
            return _compiler_complaint(error)
    tell("time torch.compile", "")
    return compare_latency(compiled, (example,), repeats=repeats)


def run(
    *,
    variants: Mapping[str, Sequence[str]] = VARIANTS,
    repeats: int = 20,
    with_torch_compile: bool = False,
    out: Path | None = None,
    tell: Tell = _tell_nobody,
) -> DemoResult:
    """Compress the demo's model in several ways and compare the results with the original.

    Args:
        variants: name of a result -> passes, as for :func:`fxcompress.compile`.
        repeats: timed calls for each latency.
        with_torch_compile: also time the models under ``torch.compile``, which first takes about a minute each.
        out: where to leave every result as it was saved, and its report as a page; by default nowhere.
        tell: is told what goes on.

    Raises:
        UsageError: the extra ``demo`` is not installed, or ``repeats`` is below 1.
    """
    tell("load", "")
    model, names, photos = load_model(), class_names(), load_photos()
    batch = torch.stack([preprocess(photo) for photo in photos.values()])
    example = batch[:1]
    calibration = torch.split(crops(photos.values(), CALIBRATION_CROPS, seed=0), BATCH)
    held_out = torch.split(crops(photos.values(), HELD_OUT_CROPS, seed=1), BATCH)
    models: dict[str, nn.Module] = {ORIGINAL: model}
    made: dict[tuple[str, ...], nn.Module] = {(): model}
    for name, passes in variants.items():
        known = max((p for p in made if tuple(passes[: len(p)]) == p), key=len)
        models[name] = _compress(name, made[known], passes[len(known) :], example, calibration, tell)
        made[tuple(passes)] = models[name]
    sizes = {ORIGINAL: saved_bytes(model)}
    with contextlib.nullcontext(out) if out else tempfile.TemporaryDirectory() as folder:
        for name in variants:
            tell("save and load", name)
            models[name], sizes[name] = _there_and_back(models[name], Path(folder) / name, name if out else None)
    logits = {}
    for name, candidate in models.items():
        tell("classify", name)
        with torch.no_grad():
            logits[name] = torch.cat([candidate(part) for part in (batch, *held_out)])
    tell("time eager", "")
    eager = compare_latency(models, (example,), repeats=repeats)
    compiled: dict[str, Latency] | str = "it was left out"
    if with_torch_compile:
        compiled = time_compiled(models, example, repeats, tell)
    outcomes = {}
    for name in models:
        before, after = logits[ORIGINAL][len(batch) :], logits[name][len(batch) :]
        outcomes[name] = Outcome(
            predictions=tuple(classify(logits[name][: len(batch)], names)),
            agreement=(before.argmax(1) == after.argmax(1)).float().mean().item(),
            logit_error=((after - before).abs().max() / before.abs().max()).item(),
            size=sizes[name],
            eager=eager[name],
            compiled=None if isinstance(compiled, str) else compiled[name],
        )
    return DemoResult(
        photos=tuple(photos),
        reports={name: fxcompress.report(models[name]) for name in variants},
        outcomes=outcomes,
        not_compiled=compiled if isinstance(compiled, str) else "",
        environment=_environment(),
    )


def _compress(
    name: str,
    model: nn.Module,
    passes: Sequence[str],
    example: torch.Tensor,
    calibration: Sequence[torch.Tensor],
    tell: Tell,
) -> nn.Module:
    def on_event(event: Event) -> None:
        tell("compress", f"{name}: {event.pass_name or ''} {event.stage}".strip())

    tell("compress", name)
    with warnings.catch_warnings():
        # In training mode the network drops whole blocks too, by Python code that no graph keeps; nothing trains it.
        warnings.simplefilter("ignore", TraceWarning)
        return fxcompress.compile(model, list(passes), (example,), calibration=calibration, progress=on_event)


def _there_and_back(gm: nn.Module, folder: Path, name: str | None) -> tuple[nn.Module, int]:
    """What is loaded from ``folder`` after ``gm`` was saved there, and the bytes of it; with a name also a page."""
    fxcompress.save(gm, folder)  # type: ignore[arg-type]
    size = sum(file.stat().st_size for file in folder.iterdir())
    if name is not None:
        fxcompress.report(gm).to_html(folder.with_suffix(".html"), title=f"EfficientNet-Lite0, {name}")
    return fxcompress.load(folder), size


def _environment() -> dict[str, Any]:
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
