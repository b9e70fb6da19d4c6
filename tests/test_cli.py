"""The command line, called as a function."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

import fxcompress
from fxcompress import cli, demo
from fxcompress.cli_arguments import parse_input, read_dtype, resolve_model, split_passes
from fxcompress.errors import UsageError
from fxcompress.files import atomically

FACTORY = """
import torch
from torch import nn

class Nets:
    @staticmethod
    def conv():
        net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU())
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2.0)
        return net

class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 4)
        self.norm = nn.Identity()

    def forward(self, ids, scale):
        return self.norm(self.table(ids)) * scale

class OneImage(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x.view(3, 8), training=self.training)

def number():
    return 3

def broken():
    raise RuntimeError("no weights today")

class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("my own bug")

ready = nn.Linear(4, 4)
constant = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module ``factories``, as a user of the command has it."""
    (tmp_path / "factories.py").write_text(FACTORY, encoding="utf-8")
    (tmp_path / "imports_missing.py").write_text("import surely_not_installed\n", encoding="utf-8")
    (tmp_path / "raises.py").write_text("raise ValueError('at import')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("factories", "imports_missing", "raises"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def compress(*words: str) -> int:
    return cli.main(["compress", *words])


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("", []),
        ("a", ["a"]),
        ("a, b", ["a", "b"]),
        ("a,b:x=1,y=2,c", ["a", "b:x=1,y=2", "c"]),
        ("a:x=[1,2],y=(3, 4),b", ["a:x=[1,2],y=(3, 4)", "b"]),
        ("a:x='k:v',b", ["a:x='k:v'", "b"]),
    ],
)
def test_passes_are_split_at_the_commas_between_them(text: str, passes: list[str]) -> None:
    assert split_passes(text) == passes


@pytest.mark.parametrize("text", ["x=1,a", "a,,b", "a,"])
def test_malformed_pass_lists_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--passes"):
        split_passes(text)


def test_inputs_have_the_shape_and_dtype_asked_for() -> None:
    image = parse_input("1,3,8,8", torch.float64)
    assert (image.shape, image.dtype) == ((1, 3, 8, 8), torch.float64)
    ids = parse_input("2,5:int64", torch.float32)
    assert (ids.shape, ids.dtype) == ((2, 5), torch.int64)
    assert 0 <= ids.min() <= ids.max() < 10
    assert parse_input("4:bool", torch.float32).dtype == torch.bool


@pytest.mark.parametrize("text", ["", "1,x", "1,,2", "0,3", "-1", "1.5", "1,3:float7"])
def test_malformed_inputs_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--input|dtype"):
        parse_input(text, torch.float32)


def test_a_model_can_only_have_a_floating_dtype() -> None:
    assert read_dtype("bfloat16", floating=True) is torch.bfloat16
    with pytest.raises(UsageError, match="'int64' is no floating dtype"):
        read_dtype("int64", floating=True)


@pytest.mark.usefixtures("here")
def test_a_factory_is_found_in_the_working_directory() -> None:
    assert isinstance(resolve_model("factories:Nets.conv"), torch.nn.Sequential)
    assert isinstance(resolve_model("factories:Embed"), torch.nn.Module)
    assert isinstance(resolve_model("factories:ready"), torch.nn.Linear)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("factories", "MODULE:CALLABLE"),
        ("nowhere:net", "no module 'nowhere'"),
        ("factories.inner:net", "no module 'factories.inner'"),
        ("factories:nets", "has no attribute 'nets'"),
        ("factories:constant", "is a int and cannot be called"),
        ("factories:number", "gave a int; expected a torch.nn.Module"),
        ("factories:broken", "RuntimeError: no weights today"),
        ("imports_missing:net", "No module named 'surely_not_installed'"),
        ("raises:net", "ValueError: at import"),
    ],
)
def test_what_is_no_factory_is_refused(target: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_model(target)


def test_compress_writes_a_program_and_a_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--passes", "remove-identity,fold-batch-norm", "--input", "1,3,8,8", "--out", "out/deep", "--export")
    assert compress("factories:Nets.conv", *words) == 0
    out = here / "out" / "deep"
    assert sorted(path.name for path in out.iterdir()) == [
        "graph.json",
        "model.pt2",
        "report.json",
        "weights.safetensors",
    ]
    data = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [record["name"] for record in data["passes"]] == ["remove-identity", "fold-batch-norm"]
    assert data["passes"][1]["sites"] == 1
    printed = capsys.readouterr().out
    assert "fold-batch-norm" in printed

    assert cli.main(["report", str(out)]) == 0
    assert capsys.readouterr().out.strip() in printed

    program = torch.export.load(out / "model.pt2").module()
    for batch in (1, 5):  # the batch size stays free
        images = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(program(images), fxcompress.load(out)(images))


@pytest.mark.usefixtures("here")
def test_the_program_computes_what_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve_model("factories:Nets.conv").eval()
    monkeypatch.setattr("factories.Nets.conv", lambda: model)
    assert (
        compress("factories:Nets.conv", "--passes", "fold-batch-norm", "--input", "2,3,8,8", "--out", "out", "--export")
        == 0
    )
    images = torch.randn(3, 3, 8, 8)
    program = torch.export.load("out/model.pt2").module()
    torch.testing.assert_close(program(images), model(images))


@pytest.mark.usefixtures("here")
def test_several_inputs_and_dtypes() -> None:
    words = ("--input", "2,5:int64", "--input", "2,5,4", "--dtype", "float64")
    assert compress("factories:Embed", "--passes", "remove-identity", *words, "--out", "out", "--export") == 0
    program = torch.export.load("out/model.pt2").module()
    result = program(torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, 4, dtype=torch.float64))
    assert result.dtype == torch.float64


@pytest.mark.usefixtures("here")
def test_a_preset_with_calibration_data(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save([torch.randn(2, 3, 8, 8) for _ in range(3)], "data.pt")
    words = ("--passes", "fast-cpu", "--input", "2,3,8,8", "--out", "out")
    assert compress("factories:Nets.conv", *words, "--calibration", "data.pt", "--reject-slower") == 0
    data = json.loads(Path("out/report.json").read_text(encoding="utf-8"))
    passes = fxcompress.presets()["fast-cpu"]
    assert [record["name"] for record in data["passes"]] == [p.partition(":")[0] for p in passes]
    assert any(record["latency_before"] for record in data["passes"])
    assert "latency" in capsys.readouterr().out
    assert fxcompress.load("out")(torch.randn(3, 3, 8, 8)).shape == (3, 8, 6, 6)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (3, "holds a int, and not a list of batches"), ([], "holds a")]
)
def test_calibration_data_that_is_none(content: object, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        torch.save(content, "data.pt")
    words = ("--passes", "quantize", "--input", "2,3,8,8", "--out", "out", "--calibration", "data.pt")
    assert compress("factories:Nets.conv", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_tensor_is_one_batch() -> None:
    torch.save(torch.randn(4, 3, 8, 8), "data.pt")
    words = ("--passes", "adapt-batch-norm", "--input", "2,3,8,8", "--out", "out", "--calibration", "data.pt")
    assert compress("factories:Nets.conv", *words) == 0


@pytest.mark.usefixtures("here")
@pytest.mark.filterwarnings("ignore::fxcompress.errors.TraceWarning")
def test_a_model_of_one_batch_size_is_exported_at_that_size() -> None:
    assert (
        compress("factories:OneImage", "--passes", "remove-identity", "--input", "1,3,8", "--out", "out", "--export")
        == 0
    )
    program = torch.export.load("out/model.pt2").module()
    assert program(torch.randn(1, 3, 8)).shape == (3, 8)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("factories:Nets.conv", "--passes", "fold-batchnorm", "--input", "1,3,8,8"), "fold-batch-norm"),
        (("factories:Nets.conv", "--passes", "fast", "--input", "1,3,8,8"), "did you mean 'fast-cpu'"),
        (("factories:Nets.conv", "--passes", "lower-int8,quantize", "--input", "1,3,8,8"), "The right order: quantize"),
        (("factories:Nets.conv", "--passes", "fold-batch-norm", "--input", "1,3,eight,8"), "--input"),
        (("factories:Nets.conv", "--passes", "fold-batch-norm", "--input", "1,3,8,8", "--dtype", "int8"), "int8"),
        (("factories:Nets.conv", "--passes", "fold-batch-norm", "--input", "1,4,8,8"), "4"),
        (("factories:Failing", "--passes", "fold-batch-norm", "--input", "1,4"), "my own bug"),
        (("factories:number", "--passes", "fold-batch-norm", "--input", "1"), "expected a torch.nn.Module"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(*words, "--out", "out") == 2
    error = capsys.readouterr().err
    told = [line for line in error.splitlines() if line.startswith("fxcompress: ")]
    assert len(told) == 1
    assert message in error
    assert "Traceback" not in error
    assert not Path("out").exists()


@pytest.mark.usefixtures("here")
def test_debug_shows_the_traceback() -> None:
    with pytest.raises(UsageError, match="no weights today") as caught:
        compress("factories:broken", "--passes", "fold-batch-norm", "--input", "1", "--out", "out", "--debug")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.usefixtures("here")
def test_an_output_that_cannot_be_written_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("a file", encoding="utf-8")
    words = ("factories:Nets.conv", "--passes", "fold-batch-norm", "--input", "1,3,8,8", "--out", "taken")
    assert compress(*words) == 2
    assert "taken is no directory" in capsys.readouterr().err
    assert Path("taken").read_text(encoding="utf-8") == "a file"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old", encoding="utf-8")

    def write_half() -> None:
        with atomically(target) as temporary:
            temporary.write_text("ne", encoding="utf-8")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert target.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("content", [None, "not json", '{"passes": 3}'])
def test_report_of_no_report(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content, encoding="utf-8")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "report" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["unknown"], ["compress"], ["demo", "--threads", "many"]])
def test_bad_usage_exits_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2


def test_threads_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--threads", "0"]) == 2
    assert "--threads" in capsys.readouterr().err


def test_demo_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All variants are made in test_demo.py.
    monkeypatch.setattr(demo, "run", functools.partial(demo.run, variants={"folded": demo.VARIANTS["folded"]}))
    before = torch.get_num_threads()
    target = tmp_path / "demo.json"
    assert (
        cli.main(["demo", "--repeats", "1", "--threads", "1", "--json", str(target), "--out", str(tmp_path / "out")])
        == 0
    )
    assert "espresso" in capsys.readouterr().out
    assert json.loads(target.read_text(encoding="utf-8"))["environment"]["threads"] == 1
    assert isinstance(fxcompress.load(tmp_path / "out" / "folded"), torch.fx.GraphModule)
    assert (tmp_path / "out" / "folded.html").stat().st_size > 10_000
    assert torch.get_num_threads() == before


def test_reports_are_pages_and_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("factories:Nets.conv", "--input", "2,3,8,8", "--passes")
    assert compress(*words, "remove-identity,fold-batch-norm", "--out", "one") == 0
    assert compress(*words, "remove-identity", "--out", "two") == 0
    assert cli.main(["report", "one", "--html", "one.html"]) == 0
    assert cli.main(["compare", "one", "two/report.json", "--html", "both.html"]) == 0
    printed = capsys.readouterr().out
    assert "wrote one.html" in printed
    assert "largest error of a pass" in printed
    assert (here / "one.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "BatchNorm2d" in (here / "one.html").read_text(encoding="utf-8")
    assert "one and two/report.json" in (here / "both.html").read_text(encoding="utf-8")
    assert cli.main(["compare", "one", "nowhere"]) == 2
    assert cli.main(["report", "one", "--html", "nowhere/one.html"]) == 2
    assert "cannot write nowhere/one.html" in capsys.readouterr().err
