"""The errors that an engine raises beside ValueError, for a caller's values. All are RuntimeErrors."""

from __future__ import annotations


class EngineClosedError(RuntimeError):
    """The engine was closed, by its user or because the device failed, whose exception is the cause."""


class EngineAsleepError(RuntimeError):
    """The engine sleeps: `wake_up` loads it again."""


class QueueFullError(RuntimeError):
    """As many requests wait as the engine takes: come again later."""


class EngineBusyError(RuntimeError):
    """A call that needs the engine alone, while another call runs or requests are unfinished."""
