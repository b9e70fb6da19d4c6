"""The call itself: what it is given, checked; the stages in order; what it gives back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

import fxcompress.pipeline as pipeline
from fxcompress.checks import check_model
from fxcompress.editing import private_copy
from fxcompress.errors import UsageError
from fxcompress.pass_base import Example
from fxcompress.progress import Event, Progress, reporting
from fxcompress.recovery.batches import Reader
from fxcompress.recovery.checkpoints import Checkpoints, Place
from fxcompress.recovery.gradual import Gradual
from fxcompress.recovery.logbook import Logbook
from fxcompress.recovery.loop import Outside, Span, Training
from fxcompress.recovery.objective import Objective, attach_distillation, detach_distillation, is_fused
from fxcompress.recovery.processes import an_accelerator, from_main, shards
from fxcompress.recovery.schedules import Schedule, constant
from fxcompress.recovery.seeds import random_state_kept
from fxcompress.recovery.settings import Settings
from fxcompress.recovery.stream import Data, Stream
from fxcompress.report import attach, detach

__all__ = ["recover"]


def recover(
    gm: fx.GraphModule,
    batches: Any,
    *,
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    losses: Any = None,
    taps: Any = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    epochs: int = 1,
    steps: int | None = None,
    optimizer: str | Callable[[Any], Optimizer] = "sgd",
    lr: float | None = None,
    schedule: str | Schedule = "cosine",
    precision: str = "fp32",
    batch_norm: str = "train",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    max_norm: float | None = None,
    seed: int = 0,
    gradual: Gradual | None = None,
    evaluate: Callable[[fx.GraphModule], float] | None = None,
    log: str | os.PathLike[str] | None = None,
    progress: bool | Progress | None = None,
) -> fx.GraphModule:
    """Train a compressed graph, to make up for what compression lost.

    The same call works in one process, on a CPU or a GPU, and in several that ``torchrun`` or ``accelerate launch``
    start, on one machine or more. Several give the result of one: each takes its share of every batch, gradients are
    weighted by the shares, and batch norm takes its statistics of all shares together. Dropout draws other numbers in
    every process. Losses must be means over the samples of a batch.

    Args:
        gm: the graph, which is never changed. If it carries distillation losses (``attach-distillation``) it is
            trained and returned with them.
        batches: an iterable of batches: a list, a ``DataLoader`` without a distributed sampler, a generator for one
            epoch. A batch is what calibration data is, or a pair ``(inputs, labels)``, or the positional inputs and
            labels after them, or a mapping with ``"labels"``. Its order and random numbers are those of ``seed``.
        teacher: a model whose outputs, and what is inside, the graph is to come close to; or several, averaged.
        losses: how it is compared, a field of the pass ``attach-distillation``.
        taps: where it is compared inside, a field of the same.
        loss_fn: a function of (output, labels) that gives one number, the mean over the batch; added to what the
            teacher says. A module is copied, and its parameters are trained.
        epochs: how often the data is gone through; without meaning if ``steps`` is given.
        steps: how many steps in all.
        optimizer: ``"sgd"`` (with momentum 0.9), ``"adamw"``, or a function that makes one of parameters.
        lr: the first learning rate; for ``"sgd"`` 0.01 and for ``"adamw"`` 1e-4 unless given.
        schedule: ``"cosine"``, ``"linear"``, ``"constant"``, or a function of (step, total) giving a factor, such as
            :class:`~fxcompress.recovery.Warmup`, :class:`~fxcompress.recovery.Rewound`,
            :class:`~fxcompress.recovery.Milestones`.
        precision: ``"fp32"``, ``"bf16"``, or ``"fp16"`` with loss scaling. Weights stay as they are.
        batch_norm: ``"train"``, or ``"frozen"``, with the statistics that are there.
        checkpoint: a folder for checkpoints, seen by all machines. The same call goes on from the last one, and on one
            CPU process ends with the same bits as if nothing had happened. Loading runs pickles: use your own.
        checkpoint_every: steps from one to the next; there is one at the end of each epoch too.
        max_norm: gradients are scaled down to this norm.
        seed: what all random numbers depend on.
        gradual: compress on the way; see :class:`~fxcompress.recovery.Gradual`. The stages share the steps.
        evaluate: a measure of the student, in evaluation mode, asked once an epoch; only in the main process.
        log: a CSV file with a row for every step; a ``.png`` file gets a plot, with the CSV file beside it.
        progress: ``None`` for silence, ``True`` for a bar on stderr, or a function of an
            :class:`~fxcompress.progress.Event`.

    Returns:
        The trained graph on the device and in the mode of the one given, with its report.

    Raises:
        UsageError: the call is wrong: nothing to minimise or to train, batches that do not fit or have no labels, a
            precision that this machine has not, a checkpoint of another run, ``accelerate`` is not installed.
        RecoveryError: a loss or gradient is not finite (at which step, which term), or a checkpoint cannot be written.
    """
    settings = Settings(
        loss_fn,
        epochs,
        steps,
        optimizer,
        lr,
        schedule,
        precision,
        batch_norm,
        max_norm,
        seed,
        gradual,
        checkpoint_every,
    )
    distillation = {"teacher": teacher, "losses": losses, "taps": taps}
    _check_call(gm, settings, distillation, evaluate)
    with contextlib.ExitStack() as stack:
        accelerator = stack.enter_context(an_accelerator(precision))
        stack.enter_context(random_state_kept())
        tell = stack.enter_context(reporting(progress if accelerator.is_main_process else None))
        run = _Run(gm, batches, settings, distillation, accelerator)
        stack.enter_context(run.data.generators_kept())
        result = run.go(checkpoint, log, evaluate, tell)
        tell(Event("done", done=1, total=1))
    return result


def _check_call(gm: Any, settings: Settings, distillation: dict[str, Any], evaluate: Any) -> None:
    if not isinstance(gm, fx.GraphModule):
        raise UsageError(
            f"recover trains a GraphModule that fxcompress.compile or fxcompress.trace made, not {type(gm).__name__}"
        )
    check_model(gm)
    fused, given = is_fused(gm), [name for name, value in distillation.items() if value is not None]
    if fused and (given or settings.gradual is not None):
        raise UsageError(
            f"the graph carries distillation losses already, so {', '.join(given) or '`gradual`'} cannot be given; "
            "compile it with 'detach-distillation' first"
        )
    if given and distillation["teacher"] is None:
        raise UsageError(f"{' and '.join(given)} say how to learn from a teacher; pass `teacher` too")
    if not fused and not given and settings.loss_fn is None:
        raise UsageError("there is nothing to minimise; pass `teacher`, the model before compression, or `loss_fn`")
    if evaluate is not None and not callable(evaluate):
        raise UsageError(f"`evaluate` is a function of a GraphModule, not {type(evaluate).__name__}")


class _Run:
    """One call."""

    def __init__(
        self, gm: fx.GraphModule, batches: Any, settings: Settings, distillation: dict[str, Any], accelerator: Any
    ) -> None:
        self._settings, self._distillation, self._accelerator = settings, distillation, accelerator
        self._given, self._fused = gm, is_fused(gm)
        self._distils = distillation["teacher"] is not None
        self._reader = Reader(gm, self._fused, "`loss_fn`" if settings.loss_fn is not None else "")
        self.data = Data(batches, self._reader, settings.seed, accelerator.process_index, accelerator.num_processes)
        self._student = private_copy(gm)
        self._report = detach(self._student)
        self._device = next((tensor.device for tensor in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))
        self._example: Example | None = None

    def go(self, checkpoint: Any, log: Any, evaluate: Any, tell: Progress) -> fx.GraphModule:
        """All stages."""
        length, total = self.data.length(), self._total()
        checkpoints = None
        if checkpoint is not None:
            words = self._settings.in_words(self._student, self._distillation, length)
            checkpoints = Checkpoints(checkpoint, words, self._accelerator)
        place = checkpoints.latest() if checkpoints is not None else None
        if self._distils or self._fused or self._settings.gradual is not None:
            device = self._accelerator.device
            self._example = self.data.first().mapped(lambda tensor: tensor.to(device, copy=True)).inputs
            self._student.to(device)
        start = place or Place()
        stream = Stream(self.data, None if self._settings.steps else self._settings.epochs, start.epoch, start.index)
        logbook = Logbook(log, start.step) if log is not None and self._accelerator.is_main_process else None
        outside = Outside(tell, total, logbook, evaluate)
        for span in self._spans(total):
            if span.stage < start.stage:
                continue
            resumed = place if place is not None and place.stage == span.stage and place.step > span.first else None
            if self._settings.gradual is not None:
                self._compress(span.stage, self._settings.gradual, checkpoints, resumed is not None)
            self._train(span, stream, resumed, outside, checkpoints)
        if logbook is not None:
            logbook.close()
        return self._result()

    def _total(self) -> int | None:
        settings, length = self._settings, self.data.length()
        if settings.steps is not None:
            return settings.steps
        if self.data.one_shot and settings.epochs > 1:
            raise UsageError(f"the data is a generator, which can be read once only, not {settings.epochs} epochs long")
        if length is not None:
            if not length:
                raise UsageError("the data has no batches in it")
            total = length * settings.epochs
            if settings.gradual is not None and total < settings.gradual.steps:
                raise UsageError(f"{total} steps are too few for {settings.gradual.steps} compressions")
            return total
        if settings.schedule not in ("constant", constant) or settings.gradual is not None:
            raise UsageError(
                "the data does not say how many batches it has, and a schedule or a gradual compression must know "
                "where the end is; pass `steps`, or schedule='constant'"
            )
        return None

    def _spans(self, total: int | None) -> Sequence[Span]:
        if self._settings.gradual is None:
            return [Span(0, total, 0, True)]
        assert total is not None
        count = self._settings.gradual.steps
        ends = [total * k // count for k in range(count + 1)]
        return [Span(ends[k], ends[k + 1], k, k == count - 1) for k in range(count)]

    def _compress(self, stage: int, gradual: Gradual, checkpoints: Checkpoints | None, resumed: bool) -> None:
        """Compress for a stage, in the main process: float sums on another machine might choose otherwise."""

        def compressed() -> fx.GraphModule:
            if resumed and checkpoints is not None:
                return checkpoints.load_graph(stage)
            assert self._example is not None
            if self._report is not None:
                attach(self._student, self._report)
            gm = pipeline.compile(
                self._student,
                [gradual.pass_of(stage)],
                self._example.args,
                example_kwargs=dict(self._example.kwargs),
                calibration=gradual.calibration,
            ).cpu()
            if checkpoints is not None:
                checkpoints.save_graph(stage, gm)
            return gm

        self._student = from_main(self._accelerator, compressed).to(self._accelerator.device)
        self._report = detach(self._student)

    def _train(
        self, span: Span, stream: Stream, resumed: Place | None, outside: Outside, checkpoints: Checkpoints | None
    ) -> None:
        settings, gm = self._settings, self._student
        if self._distils:
            assert self._example is not None
            gm = attach_distillation(gm, self._example, self._distillation)
            detach(gm)
        objective = Objective(gm, settings.loss_fn).to(self._accelerator.device)
        if objective.distils_labels:
            self._reader.wanted = self._reader.wanted or "a distillation loss"
        objective.ready(batch_norm=settings.batch_norm == "train")
        # What FSDP shards is no graph any more; its weights are gathered into a copy from before.
        whole = private_copy(gm) if shards(self._accelerator) else gm

        def student(prepared: nn.Module) -> fx.GraphModule:
            return self._alone(self._gathered(prepared, whole))

        training = Training(self._accelerator, settings, span, objective, student, outside, checkpoints)
        training.run(stream, resumed)
        gathered = self._gathered(training.prepared, whole)
        self._student = gathered if self._fused else self._alone(gathered)
        if not span.final:
            self._accelerator.free_memory()  # what it prepared, which the next stage's checkpoints are not to hold

    def _alone(self, gm: fx.GraphModule) -> fx.GraphModule:
        """The student in ``gm`` by itself, a copy in evaluation mode."""
        if not is_fused(gm):
            return private_copy(gm).eval()
        return detach_distillation(gm).eval()

    def _gathered(self, prepared: nn.Module, whole: fx.GraphModule) -> fx.GraphModule:
        """``whole`` with the weights of ``prepared``; without FSDP it has them."""
        if shards(self._accelerator):
            from accelerate.utils import broadcast_object_list

            state = self._accelerator.get_state_dict(prepared)
            (state,) = broadcast_object_list([state if self._accelerator.is_main_process else None])
            whole.load_state_dict({k.removeprefix("gm."): v for k, v in state.items() if k.startswith("gm.")})
        return whole

    def _result(self) -> fx.GraphModule:
        """The student as the given graph was: mode, device, report."""
        modes = {name: module.training for name, module in self._given.named_modules()}
        for name, module in self._student.named_modules():
            module.training = modes.get(name, self._given.training)
        result = self._student.to(self._device)
        if self._report is not None:
            attach(result, self._report)
        return result
