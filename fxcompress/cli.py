"""The command line: ``fxcompress demo``, ``fxcompress compress``, ``fxcompress report`` and ``fxcompress compare``.

Exit code 0 for success and 2 for a mistake in the call or a refusal by fxcompress, which is told in one line on
stderr; ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

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
from fxcompress.files import whole_directory, write_text
from fxcompress.report import Report
from fxcompress.reporting import compare
from fxcompress.serialization import FILES, REPORT_FILE, write

__all__ = ["main"]

MODEL_FILE = "model.pt2"

_COMPRESS_EPILOG = f"""\
DIR receives the compressed model as fxcompress.save writes it ({", ".join(FILES)}): fxcompress.load(DIR) gives it
back without the model's source, and `fxcompress report DIR` prints what each pass did. With --export there is
{MODEL_FILE}, too, a torch.export program: torch.export.load("{MODEL_FILE}").module() runs it without fxcompress (a
quantised one after `import torch.ao.quantization.fx._decomposed`, which registers its operators). A directory that
holds anything else is not touched. Example inputs are random: normal for floating types, integers from 0 to
{INTEGER_INPUTS_BELOW - 1} for integer types.
"""


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
    stages = demo.STAGES if arguments.torch_compile else demo.STAGES[:5]
    with _demo_progress(stages) as tell:
        result = demo.run(
            repeats=arguments.repeats,
            with_torch_compile=arguments.torch_compile,
            out=arguments.out,
            tell=tell,
        )
    print(result)
    if arguments.json:
        write_text(arguments.json, json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n")


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
    names = (*FILES, MODEL_FILE) if arguments.export else FILES
    with whole_directory(arguments.out, (*FILES, MODEL_FILE)) as folder:
        write(gm, folder)
        if arguments.export:
            torch.export.save(fxcompress.export(gm, inputs), folder / MODEL_FILE)
    print(f"wrote {', '.join(names)} to {arguments.out}")


def _read_report(place: Path) -> Report:
    """The report in the directory, or in the file, at ``place``."""
    path = place / REPORT_FILE if place.is_dir() else place
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"there is no readable report at {path}: {error}") from error
    return Report.from_dict(data)


def _report(arguments: argparse.Namespace) -> None:
    report = _read_report(arguments.dir)
    print(report)
    if arguments.html:
        report.to_html(arguments.html)
        print(f"wrote {arguments.html}")


def _compare(arguments: argparse.Namespace) -> None:
    first, second = (_read_report(place).to_dict() for place in (arguments.first, arguments.second))
    comparison = compare(first, second, (str(arguments.first), str(arguments.second)))
    print(comparison)
    if arguments.html:
        comparison.to_html(arguments.html)
        print(f"wrote {arguments.html}")


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
    report.add_argument("--html", type=Path, metavar="FILE", help="also write it as a page for a browser")
    report.set_defaults(run=_report)
    both = commands.add_parser("compare", parents=[common], help="put two reports side by side")
    both.add_argument("first", type=Path, metavar="A", help="as for `report`")
    both.add_argument("second", type=Path, metavar="B", help="as for `report`")
    both.add_argument("--html", type=Path, metavar="FILE", help="also write it as a page for a browser")
    both.set_defaults(run=_compare)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--out", type=Path, metavar="DIR", help="leave the compressed models and their reports here")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed calls for a latency (default: 20)")
    parser.add_argument(
        "--torch-compile",
        action="store_true",
        help="also time torch.compile, which takes some minutes",
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
    parser.add_argument("--export", action="store_true", help="also write a program of torch.export")
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
