"""Channels: which slices of which parameters can only be removed together, found by running the graph on labels."""

from fxcompress.analysis.channels.groups import Binding, ChannelGroups, Frozen, Group, Member, channel_groups
from fxcompress.analysis.channels.maps import Labelled, Product

__all__ = [
    "Binding",
    "ChannelGroups",
    "Frozen",
    "Group",
    "Labelled",
    "Member",
    "Product",
    "channel_groups",
]
