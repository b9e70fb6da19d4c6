"""Crops of real photographs to calibrate on and to compare networks by: some of photos seen, some of others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.demo_inputs import crops, load_photos

__all__ = ["BATCH", "UNSEEN", "HeldOut", "cells", "compared", "draw", "logits_of"]

BATCH = 16
UNSEEN = ("coffee", "astronaut", "temple")

HeldOut = dict[str, tuple[Tensor, Tensor]]
"""Images and what the original gives on them: ``"seen"``, other crops of the photos of the calibration data, and
``"unseen"``, crops of other photos."""


def draw(model: nn.Module, calibration: int, held_out: int) -> tuple[Tensor, HeldOut]:
    """``calibration`` crops of five photos, and ``held_out`` crops of each kind with the logits of ``model``."""
    photos = load_photos()
    seen = [photo for name, photo in photos.items() if name not in UNSEEN]
    found = {}
    for name, of in (("seen", seen), ("unseen", [photos[name] for name in UNSEEN])):
        images = crops(of, held_out, seed=1)
        found[name] = images, logits_of(model, images)
    return crops(seen, calibration, seed=0), found


def compared(model: nn.Module, held_out: HeldOut) -> dict[str, Any]:
    """For each kind the share of crops with the class that the original gives, and the relative error of the logits."""
    found = {}
    for name, (images, expected) in held_out.items():
        logits = logits_of(model, images)
        same = (logits.argmax(1) == expected.argmax(1)).double().mean()
        found[name] = {"same": float(same), "error": float((logits - expected).norm() / expected.norm())}
    return found


def cells(record: dict[str, Any]) -> list[str]:
    """For a table: the shares of a record that has what :func:`compared` gave, then the errors."""
    shares = [f"{100 * record[k]['same']:.0f}%" for k in ("seen", "unseen")]
    return shares + [f"{record[k]['error']:.2f}" for k in ("seen", "unseen")]


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """What ``model`` gives, in batches and without gradients."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH)])
