"""The function of every op that this backend serves, by the op's name. Imports Triton."""

from .norm import rms_norm

__all__ = ["rms_norm"]
