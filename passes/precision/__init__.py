"""Numbers of fewer bits that stay floating-point: bfloat16 and float16."""

from fxcompress.passes.precision.cast_precision import CastPrecision

__all__ = ["CastPrecision"]
