"""The command line: ``fxcompress demo``, ``fxcompress compress`` and ``fxcompress report``.

Exit code 0 for success and 2 for a mistake in the call or a refusal by fxcompress, which is told in one line on
stderr; ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import fxcompress
from fxcompress import demo
from fxcompress.cli_arguments import (
    INTEGER_INPUTS_BELOW,
    parse_input,
    read_batches,
    read_dtype,
    resolve_model,
    split_passes,
)
from fxcompress.errors import FxCompressError, UsageError
from fxcompress.report import Report

__all__ = ["main"]

MODEL_FILE, REPORT_FILE = "model.pt2", "report.json"

_COMPRESS_EPILOG = f"""\
DIR receives {MODEL_FILE} (the compressed model as a torch.export program, weights included: run it by
torch.export.load("{MODEL_FILE}").module(), with neither fxcompress nor the model's source) and {REPORT_FILE} (what each
pass did; print it by `fxcompress report DIR`). Example inputs are random: normal for floating types, integers from
0 to {INTEGER_INPUTS_BELOW - 1} for integer types.
"""


@contextlib.contextmanager
def _atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place only when the block succeeds."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}") from error


def _write_text(path: Path, text: str) -> None:
    with _atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _demo_progress(stages: Sequence[str]) -> Iterator[demo.Tell]:
    """A bar on stderr with a tick for each stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(stages[0], total=len(stages))

        def tell(stage: str, detail: str) -> None:
            bar.update(task, completed=stages.index(stage), description=f"{stage} {detail}".strip())

        yield tell


@contextlib.contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _demo(arguments: argparse.Namespace) -> None:
    stages = demo.STAGES[:4] if arguments.no_torch_compile else demo.STAGES
    with _demo_progress(stages) as tell:
        result = demo.run(
            repeats=arguments.repeats,
            with_torch_compile=not arguments.no_torch_compile,
            tell=tell,
        )
    print(result)
    if arguments.json:
        _write_text(arguments.json, json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n")


def _export(gm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    """``gm`` as a program whose batch size stays free where the model allows it.

    ``torch.export`` takes sizes 0 and 1 for constants, so a batch of one is doubled for it.

    Raises:
        FxCompressError: ``torch.export`` cannot do it.
    """
    try:
        return _export_batched(gm, inputs)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise FxCompressError(f"torch.export refuses the compressed model: {first_line}") from error


def _export_batched(gm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    example = _two_or_more(gm, inputs)
    if example is None:
        return torch.export.export(gm, inputs)
    free = torch.export.ShapesCollection()
    for value in example:
        free[value] = {0: torch.export.Dim.AUTO}
    return torch.export.export(gm, example, dynamic_shapes=free.dynamic_shapes(gm, example))


def _two_or_more(gm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """``inputs`` at a batch size above 1; ``None`` if they have no common one or ``gm`` fails there."""
    if any(value.dim() == 0 or value.shape[0] != inputs[0].shape[0] for value in inputs):
        return None
    if inputs[0].shape[0] > 1:
        return inputs
    doubled = tuple(torch.cat([value, value]) for value in inputs)
    try:
        with torch.no_grad():
            gm(*doubled)
    except Exception:  # a size that nobody asked for: the program is then for the one that was
        return None
    return doubled


def _compress(arguments: argparse.Namespace) -> None:
    passes = split_passes(arguments.passes)
    model = resolve_model(arguments.model).eval()
    if arguments.dtype:
        model = model.to(read_dtype(arguments.dtype, floating=True))
    own = (value.dtype for value in (*model.parameters(), *model.buffers()) if value.is_floating_point())
    dtype = next(own, torch.float32)
    torch.manual_seed(arguments.seed)
    inputs = tuple(parse_input(text, dtype) for text in arguments.input)
    data = None if arguments.calibration is None else read_batches(arguments.calibration)
    gm = fxcompress.compile(
        model, passes, inputs, calibration=data, reject_slower=arguments.reject_slower, progress=True
    )
    report = fxcompress.report(gm)
    print(report)
    out: Path = arguments.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error}") from error
    _write_text(out / REPORT_FILE, report.to_json() + "\n")
    with _atomically(out / MODEL_FILE) as path:
        torch.export.save(_export(gm, inputs), path)
    print(f"wrote {out / MODEL_FILE} and {out / REPORT_FILE}")


def _report(arguments: argparse.Namespace) -> None:
    path: Path = arguments.dir / REPORT_FILE if arguments.dir.is_dir() else arguments.dir
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"there is no readable report at {path}: {error}") from error
    print(Report.from_dict(data))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxcompress", description="Compress PyTorch models by torch.fx rewriting.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {metadata.version('fxcompress')}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", parents=[common], help="compress a trained classifier, look at real photos"))
    compress = commands.add_parser(
        "compress",
        parents=[common],
        help="compress the model that a factory makes",
        epilog=_COMPRESS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_compress(compress)
    report = commands.add_parser("report", parents=[common], help="print the report of an earlier `compress`")
    report.add_argument("dir", type=Path, metavar="DIR", help="what `compress --out` wrote, or the report file itself")
    report.set_defaults(run=_report)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed calls for a latency (default: 20)")
    parser.add_argument(
        "--no-torch-compile", action="store_true", help="leave out torch.compile, which takes a minute for each model"
    )
    parser.set_defaults(run=_demo)


def _add_compress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODULE:CALLABLE", help="what makes the model, such as mypackage.nets:small")
    parser.add_argument(
        "--passes",
        required=True,
        metavar="NAMES",
        help="commas between: fold-batch-norm,other-pass:option=1,option=2; or a preset: "
        + ", ".join(fxcompress.presets()),
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="data for passes that want some (presets do): what torch.save wrote of a list of batches",
    )
    parser.add_argument(
        "--reject-slower", action="store_true", help="time each pass and undo those that make the model slower here"
    )
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE[:DTYPE]",
        help="shape of an example input, such as 1,3,224,224 or 1,16:int64; again for each further input",
    )
    parser.add_argument("--dtype", help="convert the model to this floating dtype first (default: leave it)")
    parser.add_argument("--seed", type=int, default=0, help="of the random example inputs (default: 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.set_defaults(run=_compress)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``argv`` is without the program's name. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.threads is not None and arguments.threads < 1:
            raise UsageError(f"--threads must be at least 1, not {arguments.threads}")
        with _torch_threads(arguments.threads):
            arguments.run(arguments)
    except FxCompressError as error:
        if arguments.debug:
            raise
        print(f"fxcompress: {error}", file=sys.stderr)
        return 2
    return 0
