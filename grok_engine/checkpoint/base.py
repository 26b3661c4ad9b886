"""What a checkpoint is, whatever its format."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be. `problems` holds one line for each finding."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems or (message,)
