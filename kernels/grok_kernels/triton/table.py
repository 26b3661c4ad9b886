"""The function of every op that this backend serves, by the op's name. Imports Triton."""

from .norm import rms_norm
from .sample import sample_top_p

__all__ = ["rms_norm", "sample_top_p"]
