"""An inference engine for models of the Grok-1 kind: top-2 of 8 experts, 8-bit weights."""

from .async_llm import AsyncLLM
from .checkpoint.base import CheckpointError
from .config import ConfigError, EngineConfig, ModelConfig
from .engine import EngineClosedError, EngineStats, LLMEngine
from .llm import LLM, StreamChunk
from .loading.resolve import read_config
from .models.families import preset
from .runtime.request import CompletionOutput, RequestMetrics, RequestOutput
from .sampling.params import RequestOutputKind, SamplingParams, StructuredOutput

__version__ = "0.1.0"

__all__ = [
    "LLM", "AsyncLLM", "CheckpointError", "CompletionOutput", "ConfigError", "EngineClosedError", "EngineConfig",
    "EngineStats", "LLMEngine", "ModelConfig", "RequestMetrics", "RequestOutput", "RequestOutputKind", "SamplingParams",
    "StreamChunk", "StructuredOutput", "__version__", "preset", "read_config",
]  # fmt: skip
