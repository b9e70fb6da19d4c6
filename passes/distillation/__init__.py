"""Knowledge distillation: a student that learns from what a teacher gives, at its output and in between."""

from fxcompress.passes.distillation.attach import AttachDistillation
from fxcompress.passes.distillation.detach import DetachDistillation
from fxcompress.passes.distillation.losses import (
    AttentionTransfer,
    DecoupledKD,
    DistillationLoss,
    FactorTransfer,
    FeatureMatching,
    Hint,
    SimilarityPreserving,
    SoftTargets,
)
from fxcompress.passes.distillation.taps import suggest_taps

__all__ = [
    "AttachDistillation",
    "AttentionTransfer",
    "DecoupledKD",
    "DetachDistillation",
    "DistillationLoss",
    "FactorTransfer",
    "FeatureMatching",
    "Hint",
    "SimilarityPreserving",
    "SoftTargets",
    "suggest_taps",
]
