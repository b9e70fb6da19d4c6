"""Numbers of fewer bits: integer weights and activations."""

from fxcompress.passes.quantization.quantize import Quantize

__all__ = ["Quantize"]
