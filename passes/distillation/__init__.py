"""Knowledge distillation: a student that learns from what a teacher gives, at its output and in between."""

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

__all__ = [
    "AttentionTransfer",
    "DecoupledKD",
    "DistillationLoss",
    "FactorTransfer",
    "FeatureMatching",
    "Hint",
    "SimilarityPreserving",
    "SoftTargets",
]
