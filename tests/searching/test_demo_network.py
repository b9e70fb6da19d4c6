"""A trained network on photographs: what is found loses less than any single pass that gets as far."""

from __future__ import annotations

import pytest
import torch

import fxcompress
from fxcompress.demo_inputs import crops, load_model, load_photos

pytestmark = pytest.mark.slow

EXACT = ["remove-identity", "fold-batch-norm"]


def test_a_quarter_of_the_bytes() -> None:
    model, photos = load_model(), list(load_photos().values())
    batches, judged = (list(crops(photos, 32, seed=s).split(16)) for s in (0, 1))
    x = batches[0][:1]
    passes = (*EXACT, "alds:error=activation", "quantize", "lower-int8")
    options = {"calibration": batches, "held_out": judged, "passes": passes, "tries": 4}
    result = fxcompress.search(model, x, target={"bytes": 0.25}, max_drop=0.3, **options)  # type: ignore[arg-type]
    assert result.met
    assert result.best.cost["bytes"] <= 0.25
    names = [p.name for p in result.passes]
    assert {"alds", "quantize"} <= set(names)  # neither gets there alone without losing everything

    def error(gm: torch.nn.Module) -> float:
        with torch.no_grad():
            a, b = (torch.cat([m(batch) for batch in judged]) for m in (model, gm))
        return float((a - b).norm() / a.norm())

    assert error(result.module) == pytest.approx(result.best.error, rel=0.02)
    single = fxcompress.compile(
        model, [*EXACT, "alds:ratio=0.75,error=activation"], x, calibration=batches, verify=False
    )
    assert result.best.error < 0.5 * error(single)
