"""Structured pruning: channels, heads and groups that go with everything that hangs on them."""

from fxcompress.passes.pruning.importance import IMPORTANCES, Importance
from fxcompress.passes.pruning.prune_channels import PruneChannels
from fxcompress.passes.pruning.prune_zero_channels import PruneZeroChannels

__all__ = ["IMPORTANCES", "Importance", "PruneChannels", "PruneZeroChannels"]
