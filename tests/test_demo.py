"""The demo's parts on its real model, weights and photographs."""

import builtins
import json

import numpy
import pytest
import torch

import fxcompress
from fxcompress import demo
from fxcompress.analysis.latency import Latency
from fxcompress.demo_inputs import class_names, load_model, load_photos, preprocess
from fxcompress.errors import UsageError

SENSIBLE = {
    "cat": {"tabby", "tiger cat", "Egyptian cat"},
    "coffee": {"espresso", "cup", "coffee mug"},
    "photographer": {"tripod"},
    "motorcycle": {"moped", "motor scooter"},
    "rocket": {"missile", "projectile", "drilling platform"},
    "temple": {"palace", "bell cote", "monastery"},
    "flower": {"daisy"},
}
"""What a classifier should see; the astronaut is no class of ImageNet."""


@pytest.fixture(scope="module")
def result() -> demo.DemoResult:
    heard = []
    found = demo.run(repeats=2, with_torch_compile=False, tell=lambda stage, detail: heard.append(stage))
    assert list(dict.fromkeys(heard)) == list(demo.STAGES[:4])
    return found


def test_there_are_a_thousand_names() -> None:
    names = class_names()
    assert len(names) == 1000
    assert (names[0], names[281], names[999]) == ("tench", "tabby", "toilet tissue")


def test_preprocessing_crops_the_middle_and_scales() -> None:
    photo = numpy.zeros((256, 512, 3), dtype=numpy.uint8)
    photo[:, 128:384, 0] = 255  # the central square is red
    pixels = preprocess(photo)
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0], torch.full((224, 224), (255 - 127) / 128))
    torch.testing.assert_close(pixels[1:], torch.full((2, 224, 224), -127 / 128))


def test_grey_photos_become_three_channels() -> None:
    pixels = preprocess(load_photos()["photographer"])
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2])


def test_labels_are_sensible_and_stay(result: demo.DemoResult) -> None:
    assert set(result.predictions) == {*SENSIBLE, "astronaut"}
    for photo, (before, after) in result.predictions.items():
        assert before.label == after.label
        assert before.probability == pytest.approx(after.probability, abs=1e-3)
        assert before.label in SENSIBLE.get(photo, {before.label}), photo


def test_every_batch_norm_is_folded(result: demo.DemoResult) -> None:
    norms = [module for module in load_model().modules() if isinstance(module, torch.nn.BatchNorm2d)]
    records = {record.name: record for record in result.report.passes}
    assert records["fold-batch-norm"].sites == len(norms) == 49
    assert not records["fold-batch-norm"].refusals
    assert result.logit_error < 1e-4
    assert result.size[1] < result.size[0]


def test_the_text_has_every_part(result: demo.DemoResult) -> None:
    text = str(result)
    for part in (
        "fold-batch-norm",
        "CR-P",
        "espresso",
        "0 of 8 labels changed",
        "state dict on disk",
        "torch.compile was not measured",
    ):
        assert part in text


def test_the_numbers_are_valid_json(result: demo.DemoResult) -> None:
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["photos"]["coffee"]["before"]["label"] == "espresso"
    assert data["report"]["total"]["parameters_after"] < data["report"]["total"]["parameters_before"]
    assert set(data["latency_eager"]) == {"original", "result"}


def test_a_speed_up_has_to_stand_out_of_the_noise() -> None:
    slow, fast, unsure = (Latency(median, iqr, median, 9) for median, iqr in ((0.4, 0.01), (0.2, 0.02), (0.3, 0.2)))
    assert demo._speed({"original": slow, "result": fast}) == "2.00x as fast"
    assert demo._speed({"original": slow, "result": unsure}) == "same within noise"


def test_size_on_disk_is_that_of_the_file(tmp_path) -> None:
    model = torch.nn.Linear(100, 100)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert demo.saved_bytes(model) == pytest.approx((tmp_path / "weights.pt").stat().st_size, rel=0.02)


def test_torch_compile_is_timed() -> None:
    models = {"original": torch.nn.Linear(4, 4).eval()}
    times = demo.time_compiled(models, torch.randn(2, 4), 3, lambda stage, detail: None)
    assert not isinstance(times, str), times
    assert times["original"].median > 0


def test_a_missing_compiler_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr(torch._inductor.config, "fx_graph_cache", False)
    torch._dynamo.reset()
    models = {"original": torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.GELU()).eval()}
    reason = demo.time_compiled(models, torch.randn(2, 5), 3, lambda stage, detail: None)
    assert isinstance(reason, str)
    assert "No working C++ compiler found" in reason


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def fake_import(name, *rest):
        if name.partition(".")[0] == "skimage":
            raise ModuleNotFoundError("No module named 'skimage'", name="skimage")
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fake_import)
    with pytest.raises(UsageError, match=r'pip install "fxcompress\[demo\]"'):
        load_photos()


def test_the_original_stays_as_it_was() -> None:
    model = load_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fxcompress.compile(model, list(demo.PASSES), (torch.randn(1, 3, 224, 224),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
