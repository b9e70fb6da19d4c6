"""Numbers of fewer bits: integer weights and activations, and the kernels that compute with them."""

from fxcompress.passes.quantization.lower_int8 import LowerInt8
from fxcompress.passes.quantization.quantize import Quantize

__all__ = ["LowerInt8", "Quantize"]
