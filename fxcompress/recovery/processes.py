"""The processes of a run: how this one is set up, and what the main one does for all."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxcompress import processes
from fxcompress.errors import UsageError

__all__ = ["an_accelerator", "from_main", "shards"]


@contextlib.contextmanager
def an_accelerator(precision: str) -> Iterator[Any]:
    """An ``Accelerator`` for this process, whose global state is forgotten afterwards unless it was there before."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
    except ImportError as error:
        raise UsageError("recover needs accelerate: pip install 'fxcompress[train]'") from error
    ours = not AcceleratorState._shared_state
    try:
        accelerator = Accelerator(
            # Without this accelerate takes the processes of torchrun on a machine without GPUs for one each.
            cpu=True if not torch.accelerator.is_available() else None,
            mixed_precision="no" if precision == "fp32" else precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            step_scheduler_with_optimizer=False,
            # Losses may leave parameters without gradients, as where they look at inner layers only.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        raise UsageError(f"accelerate cannot train with precision={precision!r} here: {error}") from error
    try:
        if precision == "fp16" and accelerator.scaler is None:
            raise UsageError(f"precision='fp16' needs a GPU, found {accelerator.device}; use 'bf16' or 'fp32'")
        world = int(os.environ.get("WORLD_SIZE", 1))
        if accelerator.num_processes != world and "LOCAL_RANK" in os.environ:
            raise UsageError(
                f"{world} processes were launched, but accelerate was set up before for {accelerator.num_processes}; "
                "call recover before, or make that Accelerator with cpu=True"
            )
        kind = _kind(accelerator)
        if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA", "TP"):
            raise UsageError(f"recover trains with data parallelism (DDP or FSDP); accelerate is configured for {kind}")
        yield accelerator
    finally:
        if ours:
            AcceleratorState._reset_state()


def _kind(accelerator: Any) -> str:
    return str(accelerator.distributed_type).rpartition(".")[2]


def shards(accelerator: Any) -> bool:
    """Whether parameters are spread over the processes (FSDP)."""
    return _kind(accelerator) == "FSDP"


def from_main(accelerator: Any, make: Callable[[], fx.GraphModule]) -> fx.GraphModule:
    """What ``make`` gives in the main process, or the error that it raises, in every process."""
    if accelerator.num_processes == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            with processes.alone():
                found = [pickle.dumps(make())]
        except Exception as error:  # the other processes wait: they must hear of it
            found = [error]
    (result,) = broadcast_object_list(found)
    if isinstance(result, Exception):
        raise result
    gm: fx.GraphModule = pickle.loads(result)
    return gm
