"""Low rank: layers become pairs of smaller ones by truncated singular value decompositions of slices (ALDS)."""

from fxcompress.passes.low_rank.alds import Alds, AldsPlus
from fxcompress.passes.low_rank.baselines import LearnedRank, Pca, Svd, SvdEnergy
from fxcompress.passes.low_rank.errors import ERRORS, ErrorMeasure
from fxcompress.passes.low_rank.plot import plot_ranks

__all__ = ["ERRORS", "Alds", "AldsPlus", "ErrorMeasure", "LearnedRank", "Pca", "Svd", "SvdEnergy", "plot_ranks"]
