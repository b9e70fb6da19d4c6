"""Tests, as a package: networks are pickled, so their classes need an importable home."""
