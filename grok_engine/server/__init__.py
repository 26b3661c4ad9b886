"""An OpenAI-compatible HTTP server over an AsyncLLM, as an ASGI app to mount anywhere. Needs the extra `serve`."""

from .app import create_app
from .limits import Limits

__all__ = ["Limits", "create_app"]
