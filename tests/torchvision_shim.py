"""torchvision beside a CPU-only PyTorch.

Its compiled operators may be missing there, and it fails to import unless their schemas exist. Import models from here.
"""

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _schema in (
    "nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
):
    if not hasattr(torch.ops.torchvision, _schema.partition("(")[0]):
        _LIBRARY.define(_schema)

from torchvision import models  # noqa: E402

__all__ = ["models"]
