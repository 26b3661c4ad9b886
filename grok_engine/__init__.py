"""An inference engine for models of the Grok-1 kind: top-2 of 8 experts, 8-bit weights."""

from .config import ConfigError, EngineConfig, ModelConfig
from .engine import LLM, CompletionOutput, RequestOutput, StreamChunk
from .sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "ModelConfig",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
    "__version__",
]
