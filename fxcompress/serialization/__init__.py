"""Saved graphs: a directory of three files, from which a compressed model comes back without its source and without
running anything that the files say.

- ``graph.json``: the graph's nodes, its modules and the table of its tensors; ``docs/format.md`` describes it.
- ``weights.safetensors``: the tensors.
- ``report.json``: what :func:`fxcompress.report` says, if the graph has a report.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxcompress.errors import SerializationError, UsageError
from fxcompress.files import whole_directory
from fxcompress.report import CARRIER, Report, report
from fxcompress.report import attach as attach_report
from fxcompress.serialization.files import read_json, read_limited
from fxcompress.serialization.graphs import ArgumentWriter
from fxcompress.serialization.modules import ModuleReader, ModuleWriter
from fxcompress.serialization.stand_ins import StandIn
from fxcompress.serialization.tensors import TensorReader, TensorWriter, write_safetensors
from fxcompress.serialization.values import damaged, shown
from fxcompress.serialization.vocabulary import Trusted, Vocabulary

__all__ = ["FILES", "GRAPH_FILE", "REPORT_FILE", "WEIGHTS_FILE", "StandIn", "load", "save", "write"]

GRAPH_FILE, WEIGHTS_FILE, REPORT_FILE = FILES = ("graph.json", "weights.safetensors", "report.json")
_FORMAT, _VERSION = "fxcompress", 1
_DIGEST = "graph_sha256"


def save(gm: fx.GraphModule, directory: str | os.PathLike[str]) -> None:
    """Write ``gm`` to ``directory``, whole or not at all: a crash leaves what was there before.

    Parameters (tied ones tied), buffers, dtypes, memory formats, flags of training and of gradients, shared modules,
    structured inputs and outputs and the report are kept; gradients, hooks, type annotations and ``meta`` are not.

    Args:
        gm: what :func:`fxcompress.compile` or :func:`fxcompress.trace` returned, or any ``GraphModule``; not changed.
        directory: where to; made if missing. One that ``save`` wrote is replaced; one with other files is refused.

    Raises:
        SerializationError: something in the graph has no form; the message says where it is and what to do.
        UsageError: ``gm`` is no ``GraphModule``, or ``directory`` cannot be written.
    """
    with whole_directory(Path(directory), FILES) as folder:
        write(gm, folder)


def write(gm: fx.GraphModule, folder: Path) -> None:
    """The files of :func:`save`, into a directory that is there."""
    if not isinstance(gm, fx.GraphModule):
        raise UsageError(f"save takes a GraphModule, as fxcompress.compile returns, not {type(gm).__name__}")
    tensors, arguments = TensorWriter(), ArgumentWriter()
    modules = ModuleWriter(tensors, arguments)
    modules.number(gm, "")
    if arguments.to_trust:
        names = ", ".join(arguments.to_trust)
        warnings.warn(f"loading this graph will take trusted=[...] for what is not PyTorch's: {names}", stacklevel=3)
    entries, stored = tensors.table()
    graph = {
        "format": _FORMAT,
        "version": _VERSION,
        "torch": str(torch.__version__),
        "to_trust": list(arguments.to_trust),
        "tensors": entries,
        "modules": modules.entries,
    }
    data = json.dumps(graph, allow_nan=False, separators=(",", ":")).encode()
    (folder / GRAPH_FILE).write_bytes(data)
    write_safetensors(folder / WEIGHTS_FILE, stored, {_DIGEST: hashlib.sha256(data).hexdigest()})
    if hasattr(gm, CARRIER):
        (folder / REPORT_FILE).write_text(report(gm).to_json() + "\n", encoding="utf-8")


def load(
    directory: str | os.PathLike[str],
    *,
    trusted: Trusted = (),
    stand_ins: bool = False,
    device: torch.device | str = "cpu",
    check: bool = True,
) -> fx.GraphModule:
    """The graph that :func:`save` wrote to ``directory``.

    Nothing is unpickled or imported because a file says so, and no node is run. Only PyTorch's operators and modules,
    those of fxcompress and of installed passes, and what is trusted can be in the graph. Weights are mapped into memory
    and copied where they are written to.

    Args:
        directory: what ``save`` wrote.
        trusted: functions and classes that the graph may call besides, such as the class of a model's outputs, or
            their qualified names, which are imported; or a mapping of names to objects.
        stand_ins: give plain containers (attributes, keys, positions) in place of dataclasses and named tuples of the
            model's source that are not trusted.
        device: where to put the weights.
        check: compare weights with their checksums, which reads the file once (0.1 s for 400 MB) and keeps no memory.

    Raises:
        SerializationError: files are missing, damaged or of a later version, or name what is not allowed.
        UsageError: something trusted cannot be found.
    """
    folder, place = Path(directory), torch.device(device)
    data = read_limited(folder / GRAPH_FILE)
    graph = _checked_graph(read_json(data, GRAPH_FILE))
    tensors = TensorReader(folder / WEIGHTS_FILE, place, check)
    if tensors.metadata.get(_DIGEST) != hashlib.sha256(data).hexdigest():
        raise SerializationError(
            f"{folder / GRAPH_FILE} is not what {WEIGHTS_FILE} was saved with: one of them is damaged or another save's"
        )
    try:
        tensors.read_table(graph["tensors"])
        gm = ModuleReader(Vocabulary(trusted), tensors, stand_ins).read_modules(graph["modules"])
    except (RecursionError, MemoryError) as error:
        raise damaged(GRAPH_FILE, f"it is nested too deep or too large ({type(error).__name__})") from error
    if (folder / REPORT_FILE).exists():
        attach_report(gm, Report.from_dict(read_json(read_limited(folder / REPORT_FILE), REPORT_FILE)))
    return gm


def _checked_graph(graph: Any) -> dict[str, Any]:
    if not isinstance(graph, dict) or graph.get("format") != _FORMAT:
        raise damaged(GRAPH_FILE, "it is no graph of fxcompress")
    version = graph.get("version")
    if type(version) is not int or not 1 <= version <= _VERSION:
        raise SerializationError(
            f"{GRAPH_FILE} has version {shown(version)} of the format, and this fxcompress reads up to {_VERSION}; "
            "install a later one"
        )
    fields = {"format", "version", "torch", "to_trust", "tensors", "modules"}
    if set(graph) != fields:
        raise damaged(GRAPH_FILE, f"its fields are {shown(sorted(graph))}")
    return graph
