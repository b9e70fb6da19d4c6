"""The demo's parts on its real model, weights and photographs."""

import builtins
import json

import numpy
import pytest
import torch

import fxcompress
from fxcompress import demo
from fxcompress.analysis.latency import Latency
from fxcompress.demo_inputs import class_names, crops, load_model, load_photos, preprocess
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
    found = demo.run(repeats=2, tell=lambda stage, detail: heard.append(stage))
    assert list(dict.fromkeys(heard)) == list(demo.STAGES[:5])
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
    assert set(result.photos) == {*SENSIBLE, "astronaut"}
    outcomes = result.outcomes
    for photo, before, after in zip(
        result.photos, outcomes["original"].predictions, outcomes["folded"].predictions, strict=True
    ):
        assert before.label == after.label
        assert before.probability == pytest.approx(after.probability, abs=1e-3)
        assert before.label in SENSIBLE.get(photo, {before.label}), photo


def test_integers_keep_the_classes_in_a_quarter_of_the_bytes(result: demo.DemoResult) -> None:
    quantised, original = result.outcomes["int8"], result.outcomes["original"]
    assert quantised.agreement >= 0.95
    assert quantised.size < 0.3 * original.size


def test_every_batch_norm_is_folded(result: demo.DemoResult) -> None:
    norms = [module for module in load_model().modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for report in result.reports.values():
        records = {record.name: record for record in report.passes}
        assert records["fold-batch-norm"].sites == len(norms) == 49
        assert not records["fold-batch-norm"].refusals
    folded = result.outcomes["folded"]
    assert folded.logit_error < 1e-4
    assert folded.agreement == 1.0
    assert folded.size < result.outcomes["original"].size


def test_the_pruned_network_is_smaller_and_still_sees_something(result: demo.DemoResult) -> None:
    total = result.reports["pruned"].total
    assert total.macs_before is not None
    assert total.macs_after is not None
    ratio = next(float(p.options["ratio"]) for p in result.reports["pruned"].passes if p.name == "prune-channels")
    assert total.macs_after / total.macs_before == pytest.approx(1 - ratio, abs=0.01)
    assert result.outcomes["pruned"].size < result.outcomes["folded"].size
    assert result.outcomes["pruned"].agreement > 0.3  # a guess would be right once in a thousand


def test_the_factorised_network_is_smaller_and_sees_the_same(result: demo.DemoResult) -> None:
    record = next(p for p in result.reports["factorised"].passes if p.name == "alds")
    assert record.parameters_after <= (1 - float(record.options["ratio"])) * record.parameters_before
    assert result.outcomes["factorised"].size < result.outcomes["folded"].size
    assert result.outcomes["factorised"].agreement > 0.8


def test_crops_are_other_ones_for_another_seed() -> None:
    photos = load_photos().values()
    one, again, other = crops(photos, 9, seed=0), crops(photos, 9, seed=0), crops(photos, 9, seed=1)
    assert one.shape == (9, 3, 224, 224)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_text_has_every_part(result: demo.DemoResult) -> None:
    text = str(result)
    for part in (
        "fold-batch-norm",
        "CR-P",
        "espresso",
        "same class",
        "on disk",
        "factorised:",
        "pruned:",
        "torch.compile was not measured",
    ):
        assert part in text


def test_the_numbers_are_valid_json(result: demo.DemoResult) -> None:
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    coffee = data["photos"].index("coffee")
    assert data["outcomes"]["original"]["predictions"][coffee]["label"] == "espresso"
    for report in data["reports"].values():
        assert report["total"]["parameters_after"] < report["total"]["parameters_before"]
    assert list(data["outcomes"]) == ["original", *demo.VARIANTS]


def test_a_speed_up_has_to_stand_out_of_the_noise() -> None:
    slow, fast, unsure = (Latency(median, iqr, median, 9) for median, iqr in ((0.4, 0.01), (0.2, 0.02), (0.3, 0.2)))
    assert demo._speed(slow, fast) == " (2.00x as fast)"
    assert demo._speed(slow, unsure) == ""


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
    fxcompress.compile(model, list(demo.VARIANTS["folded"]), (torch.randn(1, 3, 224, 224),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
