"""One training: from a graph and a place in the data to the trained graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from fxcompress import processes
from fxcompress.errors import RecoveryError
from fxcompress.progress import Event, Progress
from fxcompress.recovery.batches import Share
from fxcompress.recovery.checkpoints import Checkpoints, Place
from fxcompress.recovery.logbook import Logbook
from fxcompress.recovery.norms import SynchronisedNorms
from fxcompress.recovery.objective import Objective
from fxcompress.recovery.schedules import as_schedule
from fxcompress.recovery.seeds import seed_step
from fxcompress.recovery.settings import Settings
from fxcompress.recovery.stream import Stream

__all__ = ["Outside", "Span", "Training"]

_SKIPS = 25  # so many halvings bring any loss scale down to nothing: then it is not the scale


@dataclasses.dataclass(frozen=True)
class Outside:
    """What a training tells the world.

    Attributes:
        tell: the progress.
        total: steps of the whole run, if anybody knows.
        logbook: the record, on the main process.
        evaluate: the caller's measure of a student.
    """

    tell: Progress
    total: int | None
    logbook: Logbook | None
    evaluate: Callable[[fx.GraphModule], float] | None


@dataclasses.dataclass(frozen=True)
class Span:
    """Which steps a training is of.

    Attributes:
        first, last: of all steps of the run, the first, and the one before which it ends; ``last`` is ``None`` where
            nobody knows, until the data is over.
        stage: which stage of a gradual compression.
        final: whether the run ends with it.
    """

    first: int
    last: int | None
    stage: int
    final: bool


class Training:
    """The loop over steps.

    Args:
        accelerator: the ``accelerate.Accelerator``.
        settings: how to train.
        span: which steps.
        objective: what is minimised; on its device, in training mode.
        student: gives the student as it is now, by itself, as a copy in evaluation mode.
        outside: whom to tell.
        checkpoints: where to save, if anywhere.

    Attributes:
        prepared: the objective as the accelerator made it.
    """

    def __init__(
        self,
        accelerator: Any,
        settings: Settings,
        span: Span,
        objective: Objective,
        student: Callable[[nn.Module], fx.GraphModule],
        outside: Outside,
        checkpoints: Checkpoints | None,
    ) -> None:
        self._accelerator, self._settings, self._span, self._objective = accelerator, settings, span, objective
        self._student, self._outside, self._checkpoints = student, outside, checkpoints
        self._schedule = as_schedule(settings.schedule)
        self._norms = SynchronisedNorms(objective.gm, accelerator.num_processes)
        optimizer = settings.make_optimizer([p for p in objective.parameters() if p.requires_grad])
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.prepared: nn.Module
        self._optimizer: Optimizer
        self.prepared, self._optimizer = accelerator.prepare(objective, optimizer)
        self._hooks = [
            accelerator.register_save_state_pre_hook(self._saved),
            accelerator.register_load_state_pre_hook(self._loaded),
        ]
        self._skipped = 0
        self._evaluation: float | None = None

    def run(self, stream: Stream, resumed: Place | None) -> None:
        """Train to the end of the span.

        Args:
            stream: the data, at the right place.
            resumed: the place in this span to go on from, whose checkpoint is loaded.

        Raises:
            RecoveryError: a loss or gradient is not finite, or a checkpoint cannot be written.
        """
        step = self._span.first
        if resumed is not None and self._checkpoints is not None:
            self._checkpoints.load(resumed)
            step = resumed.step
        over = resumed is not None and resumed.finished
        self._norms.install()
        try:
            while not over and step != self._span.last:
                share = next(stream, None)
                if share is None:
                    break
                epoch = stream.epoch
                lr = self._set_rate(step)
                loss, terms = self._step(share, step)
                step += 1
                done = step == self._span.last
                ended = not (done and self._span.final) and stream.epoch_over()
                over = done or (ended and stream.done)
                if ended or (over and self._span.final):
                    self._evaluation = self._evaluate()
                self._tell(step, epoch, lr, loss, terms, ended or (over and self._span.final))
                if ended or over or step % self._settings.checkpoint_every == 0:
                    self._save(stream, step, over and self._span.final)
        finally:
            self._close()

    # ---------------------------------------------------------------------------------------------------- a step
    def _set_rate(self, step: int) -> float:
        total = None if self._span.last is None else self._span.last - self._span.first
        # Without an end only the constant schedule is let through, which asks for none.
        factor = self._schedule(step - self._span.first, step + 1 if total is None else total)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return self._rates[0] * factor

    def _step(self, share: Share, step: int) -> tuple[float, dict[str, float]]:
        accelerator, device = self._accelerator, self._accelerator.device
        batch = share.batch.mapped(lambda tensor: tensor.to(device, copy=True))
        self._optimizer.zero_grad()
        self._norms.counts = share.weight > 0
        seed_step(self._settings.seed, step, accelerator.process_index)
        loss, terms = self.prepared(batch.inputs.args, dict(batch.inputs.kwargs), batch.labels)
        # The processes' gradients are averaged, so the weights, which sum to 1, are of the number of processes.
        accelerator.backward(loss * (share.weight * accelerator.num_processes))
        total, parts = self._over_all(loss, terms, share.weight)
        norm = float(accelerator.clip_grad_norm_(self.prepared.parameters(), self._settings.max_norm or math.inf))
        self._check(step, {"the loss": total, **{f"the term {name!r}": value for name, value in parts.items()}}, norm)
        self._optimizer.step()
        return total, parts

    def _over_all(self, loss: torch.Tensor, terms: dict[str, Any], weight: float) -> tuple[float, dict[str, float]]:
        """The mean of the loss and of each term over the whole batch."""
        values = [torch.as_tensor(value).detach().float().reshape(()) for value in (loss, *terms.values())]
        packed = torch.stack(values).to(self._accelerator.device)
        total, *parts = self._accelerator.reduce(packed * weight if weight else torch.zeros_like(packed)).tolist()
        return total, dict(zip(terms, parts, strict=True))

    def _check(self, step: int, values: dict[str, float], norm: float) -> None:
        bad = [f"{what} is {value}" for what, value in values.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(norm):
            names = [
                n for n, p in self._objective.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
            ]
            bad = [
                f"the gradient of {names[0].removeprefix('gm.')!r} is not finite"
                if names
                else f"the norm of the gradient is {norm}"
            ]
        self._skipped = self._skipped + 1 if bad else 0
        if bad and (self._accelerator.scaler is None or self._skipped > _SKIPS):
            specific = bad[1:] or bad  # a term says more than the sum that it spoils
            raise RecoveryError(
                f"step {step + 1}: {specific[0]}. Nothing was changed in this step"
                + (f", and {self._skipped} in a row were like it" if self._skipped > 1 else "")
                + "; try a lower learning rate, `max_norm`, a warm-up, or precision='fp32'"
                + (". The last checkpoint is from before" if self._checkpoints is not None else "")
            )

    # ------------------------------------------------------------------------------------------- telling and saving
    def _evaluate(self) -> float | None:
        if self._outside.evaluate is None:
            return None
        with self._norms.suspended():
            student = self._student(self.prepared)
        with processes.alone():
            found = float(self._outside.evaluate(student)) if self._accelerator.is_main_process else None
        self._accelerator.wait_for_everyone()
        return found

    def _tell(self, step: int, epoch: int, lr: float, loss: float, terms: dict[str, float], evaluated: bool) -> None:
        if not self._accelerator.is_main_process:
            return
        note = f"loss {loss:.4g}" + ("" if self._evaluation is None else f", agreement {self._evaluation:.4g}")
        self._outside.tell(Event("recover", done=step, total=self._outside.total, note=note))
        if self._outside.logbook is not None:
            evaluation = self._evaluation if evaluated and self._evaluation is not None else ""
            row = {"step": step, "epoch": epoch, "stage": self._span.stage, "lr": lr, "loss": loss}
            self._outside.logbook.write({**row, "evaluation": evaluation}, terms)

    def _save(self, stream: Stream, step: int, finished: bool) -> None:
        if self._checkpoints is None:
            return
        for name, parameter in self._objective.named_parameters():
            if parameter.requires_grad and not bool(parameter.detach().isfinite().all()):
                raise RecoveryError(f"step {step}: the parameter {name.removeprefix('gm.')!r} is not finite any more")
        self._checkpoints.save(Place(step, stream.epoch, stream.index, self._span.stage, finished))

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All that training changes: not the teacher, whose parameters are frozen, but every buffer."""
        yield from ((name, p) for name, p in self._objective.named_parameters() if p.requires_grad)
        yield from self._objective.named_buffers()

    def _saved(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        # By the names of the bare model, so that another number of processes can go on. FSDP saves its own way.
        if weights:
            weights[:] = [{name: tensor.detach() for name, tensor in self._state()}]

    def _loaded(self, models: list[nn.Module], folder: str) -> None:
        if models:
            models.clear()
            state = torch.load(Path(folder) / "pytorch_model.bin", map_location="cpu", weights_only=True)
            with torch.no_grad():
                for name, tensor in self._state():
                    tensor.copy_(state[name])

    def _close(self) -> None:
        self._norms.remove()
        for hook in self._hooks:
            hook.remove()
        self._optimizer.zero_grad()
