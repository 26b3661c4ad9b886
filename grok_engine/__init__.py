"""An inference engine for models of the Grok-1 kind: top-2 of 8 experts, 8-bit weights."""

import logging

from .async_llm import AsyncLLM
from .checkpoint.base import CheckpointError
from .config import ConfigError, EngineConfig, ModelConfig
from .engine import LLMEngine
from .errors import EngineAsleepError, EngineBusyError, EngineClosedError, QueueFullError
from .llm import LLM, StreamChunk
from .loading.resolve import read_config
from .models.families import preset
from .runtime.builder import Prompt
from .runtime.mailbox import OutputStream
from .runtime.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from .runtime.stats import EngineStats, Histogram
from .sampling.params import RequestOutputKind, SamplingParams, StructuredOutput

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the program configures logging

__version__ = "0.1.0"

__all__ = [
    "LLM", "AsyncLLM", "CheckpointError", "CompletionOutput", "ConfigError", "EngineAsleepError", "EngineBusyError",
    "EngineClosedError", "EngineConfig", "EngineStats", "Histogram", "LLMEngine", "Logprob", "ModelConfig",
    "OutputStream", "Prompt", "QueueFullError", "RequestMetrics", "RequestOutput", "RequestOutputKind",
    "SamplingParams", "StreamChunk", "StructuredOutput", "__version__", "preset", "read_config",
]  # fmt: skip
