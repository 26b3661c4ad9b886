"""Logging that cannot fail the engine, and how messages write a size."""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Any


class QuietLogger(logging.LoggerAdapter):  # type: ignore[type-arg]
    """A logger whose calls return, whatever a user's handler or filter raises: that is printed, as `logging` does with
    errors of its own handlers. The engine logs while requests and pages change."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), {})

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        try:
            super().log(level, msg, *args, **kwargs)
        except Exception:
            if logging.raiseExceptions and sys.stderr is not None:
                traceback.print_exc()

    def ended(self, cause: BaseException, msg: object, *args: object) -> None:
        """What ends with a failure is an error; what ends with an interrupt, Ctrl-C say, was asked for."""
        level = logging.ERROR if isinstance(cause, Exception) else logging.INFO
        self.log(level, msg, *args, exc_info=cause if level == logging.ERROR else None)


def size_text(count: float) -> str:
    """Bytes in GB, or in MB below a tenth of one."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
