"""Numbers of fewer bits: integer weights and activations, what prepares for them, and the kernels that use them."""

from fxcompress.passes.quantization.equalize import EqualizeLayers
from fxcompress.passes.quantization.fake_quantize import FakeQuantize
from fxcompress.passes.quantization.lower_int8 import LowerInt8
from fxcompress.passes.quantization.quantize import Quantize
from fxcompress.passes.quantization.smooth import SmoothQuant

__all__ = ["EqualizeLayers", "FakeQuantize", "LowerInt8", "Quantize", "SmoothQuant"]
