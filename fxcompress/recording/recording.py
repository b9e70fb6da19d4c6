"""From a model and its inputs to a graph module: record at two sizes, align, fold constants, find the vocabulary."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import fx, nn

from fxcompress import editing
from fxcompress.analysis.running import undisturbed
from fxcompress.canonical import TrainingUse, canonicalize
from fxcompress.errors import TraceError, TraceWarning
from fxcompress.recording import internals
from fxcompress.recording.alignment import Symbol, align
from fxcompress.recording.comparing import SEED, without_state_of_runs
from fxcompress.recording.constants import fold_constants, follow_device
from fxcompress.recording.dimensions import size_choices
from fxcompress.recording.inputs import Dimension, Inputs
from fxcompress.recording.methods import Method
from fxcompress.recording.retracing import Retracer
from fxcompress.recording.session import DataRead, Session
from fxcompress.recording.training import training_uses

__all__ = ["Recording", "finish"]

WORTH_FAKING = 0.4
"""Seconds of one run above which a run that only has to show sizes is done on tensors without values."""

SLOW = 1.0
"""Seconds of one run above which runs that would only make a graph less guarded are not made."""


class Recording:
    """The recordings of one model.

    Args:
        work: the model, a private copy.
        inputs: what it is known to run on.
        seconds: how long it takes to.
        opaque: paths of modules to keep as one call.
        auto: whether to add to those every module that looks at data.
    """

    def __init__(self, work: nn.Module, inputs: Inputs, seconds: float, opaque: frozenset[str], auto: bool) -> None:
        self.work, self.inputs = work, inputs
        self.slow, self.faking = seconds >= SLOW, seconds >= WORTH_FAKING
        self.opaque, self.auto = opaque, auto
        self.methods: frozenset[Method] = frozenset()
        self.free: dict[Dimension, str] = {}
        self._trying: dict[Dimension, str] = {}
        self.sizes_were_read = self.ranks_were_read = self.dtypes_were_read = False
        self.root = work
        self.ends: dict[str, fx.Node] = {}

    def graph_module(self, free: dict[Dimension, str]) -> tuple[fx.GraphModule, dict[fx.Node, TrainingUse]]:
        """The graph, with the ``free`` dimensions free if the model runs at other sizes of them (``self.free`` then
        says whether), and what :func:`finish` wants to know."""
        session = self._record_free(free)
        uses = training_uses(session, self._in_other_mode)
        self.sizes_were_read = session.sizes_were_read
        self.ranks_were_read, self.dtypes_were_read = session.ranks_were_read, session.dtypes_were_read
        root = session.model
        for path, value in session.attributes.items():
            editing.set_attribute(root, path, value)
        fold_constants(session, root)
        first = next(iter(self.inputs.tensors().items()), None)
        if first is not None:
            follow_device(session.graph, session.input_node(*first[0]), first[1].device)
        session.graph._tracer_cls = Retracer
        gm = fx.GraphModule(root, session.graph, type(root).__name__)
        self.root, self.ends = root, session.ends
        if session.buffer_reads:
            warnings.warn(
                f"the model reads the value of a buffer by {session.buffer_reads[0]}; the graph keeps what followed "
                "from the value it has now",
                TraceWarning,
                stacklevel=4,
            )
        return gm, uses

    def _record_free(self, dims: dict[Dimension, str]) -> Session:
        failure: Exception | None = None
        for sizes in size_choices(self.inputs, dims):
            try:
                session = self._record_pair(dims, sizes)
            except TraceError:
                raise
            except Exception as error:  # the model's own: it may not run at these sizes
                failure = failure or error
                continue
            self.free = dims
            return session
        named = sorted(set(dims.values()) - {"batch"})
        if named:
            raise TraceError(
                f"the model does not run at other sizes of {named}: {type(failure).__name__}: {failure}"
            ) from failure
        if failure is not None:
            warnings.warn(
                f"the model runs at no other batch size than the example's ({type(failure).__name__}: {failure}); the "
                "graph is fixed to it",
                TraceWarning,
                stacklevel=5,
            )
        self._trying = {}
        return self._record(self.inputs.changed({}, seed=1))

    def _record_pair(self, dims: dict[Dimension, str], sizes: dict[str, tuple[int, int]]) -> Session:
        larger, smaller = (
            self.inputs.changed({d: sizes[label][i] for d, label in dims.items()}, seed=1 + i) for i in (0, 1)
        )
        self._trying = dims
        while True:
            kept = (self.opaque, self.methods)
            first = self._record(smaller)
            second = self._glance(larger)
            if (self.opaque, self.methods) == kept:
                break
        source: dict[str, tuple[fx.Node, int]] = {}
        for (name, path, dim), label in dims.items():
            source.setdefault(label, (first.input_node(name, path), dim))
        try:
            align(first, second, [Symbol(label, sizes[label][::-1], *source[label]) for label in source])
        except TraceError:
            if not self.faking:
                raise
            self.faking = False  # without values the model may have done something else: once more with them
            return self._record_pair(dims, sizes)
        return first

    def _in_other_mode(self) -> Session:
        flags = [(m, m.training) for m in self.work.modules()]
        self.work.train(not self.work.training)
        try:
            # more than one sample: a batch norm in training mode does not take a single one
            return self._glance(
                self.inputs.changed({d: 2 for d, of in self.free.items() if of == "batch"}), tolerant=True
            )
        finally:
            for module, flag in flags:
                module.training = flag

    def _glance(self, inputs: Inputs, tolerant: bool = False) -> Session:
        """A recording of which only calls and sizes matter: where a run takes long, of one without values."""
        if not self.faking:
            return self._record(inputs, tolerant)
        opaque, methods = self.opaque, self.methods
        try:
            return self._record(inputs, tolerant, internals.fake_mode())
        except Exception:  # something needs values, or has no kernel that works without: then with them
            self.opaque, self.methods, self.faking = opaque, methods, False
            return self._record(inputs, tolerant)

    def _record(self, inputs: Inputs, tolerant: bool = False, fake: Any = None) -> Session:
        """One recorded run; with ``auto`` again for each module that turns out to look at data.

        It is a run of a copy that shares all parameters and buffers: what a run leaves in Python attributes is not
        there for the next one, so all recordings start alike.
        """
        while True:
            session = Session(without_state_of_runs(self.work), self.opaque, self.methods, tolerant)
            run = inputs.changed({})
            try:
                # A fake mode begins after the copy is made: tensors in attributes cannot be copied inside one.
                with undisturbed(session.model, run.values()), fake or contextlib.nullcontext():
                    if fake is not None:
                        run = run.converted(fake.from_tensor)
                    torch.manual_seed(SEED)
                    session.run(run, self._trying)
                return session
            except DataRead as error:
                if not self.auto or not self._keep_whole(error):
                    raise

    def _keep_whole(self, error: DataRead) -> bool:
        """Keep what looked at data as one call from now on; ``False`` if there is nothing to keep but the model."""
        if error.module and error.module not in self.opaque:
            self.opaque = self.opaque | {error.module}
            return True
        if error.method is not None and error.method not in self.methods:
            self.methods = self.methods | {error.method}
            return True
        return False


def finish(gm: fx.GraphModule, root: nn.Module, uses: dict[fx.Node, TrainingUse]) -> None:
    """Give ``gm``, made of ``root``, the vocabulary of modules, and what a ``GraphModule`` forgets."""
    _restore_flags(gm, root)
    canonicalize(gm, uses)
    _restore_counters(gm, root)
    for module in gm.modules():
        if type(module) is nn.Module:  # a container made here
            module.training = gm.training


def _restore_flags(gm: fx.GraphModule, work: nn.Module) -> None:
    """What ``GraphModule`` forgets: training flags of containers, and which buffers stay out of the state_dict."""
    for path, module in gm.named_modules():
        original = work.get_submodule(path) if path else work
        module.training = original.training
        hidden = internals.non_persistent_buffers(original)
        for name in module._buffers:
            if name in hidden or name not in original._buffers:
                internals.non_persistent_buffers(module).add(name)


def _restore_counters(gm: fx.GraphModule, work: nn.Module) -> None:
    """A functional batch norm does not read its batch counter, so the graph has lost its value."""
    counters = {n: b for n, b in work.named_buffers() if n.endswith("num_batches_tracked")}
    for name, buffer in gm.named_buffers():
        if name in counters:
            buffer.data = counters[name].data
