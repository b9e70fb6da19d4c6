"""Settings that all tests share."""

import os

import torch
from hypothesis import HealthCheck, settings

# Building modules is slow next to drawing integers, so hypothesis's own idea of slow does not apply.
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("deep", parent=settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The networks are tiny: threads cost more than they save, and one thread adds in one order.
torch.set_num_threads(1)
