"""What a checkpoint is, whatever its format: named tensors, read whole or in part.

Names are the engine's own (`layers.3.moe.gate`), except in a converted checkpoint, where they are the paths of the
model's modules. An implementation maps its files' names to them, and joins or splits what its files shard or fuse.

Tensors are torch's, not numpy's: torch has bf16 and e4m3, and its transposed and sliced views of a mapped file are as
free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from grok_engine.config import ConfigError, described

LONGEST = 2000  # characters of a line in a message: files hold texts of any length


class CheckpointError(ConfigError):
    """A checkpoint that is not what it should be, its `config.json` included. `problems`: a line for each finding."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        message = "\n".join(map(_shortened, message.splitlines()))
        super().__init__(message)
        self.problems = tuple(map(_shortened, problems)) or (message,)


SHOWN = 40  # problems in a message; all of them are in `CheckpointError.problems`


def all_problems(head: str, problems: Sequence[str]) -> CheckpointError:
    """One error of all problems, the first of them in its message."""
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return CheckpointError("\n  ".join([head, *problems[:SHOWN], *more]), tuple(problems))


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside because of what a file holds is a CheckpointError that begins with its name.

    Files are checked before they are used, with errors that say more. This is for what no check foresaw: a depth, a
    size or a shape beyond what Python, the machine or torch can do.
    """
    try:
        yield
    except (RecursionError, MemoryError, OverflowError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{source}: expected a checkpoint that can be read, found {described(error)}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor, as it is stored.

    shape: (…, N, K), outputs before inputs and experts in front, in whichever order the file has them.
    format: as `grok_kernels.formats.FORMATS` names them.
    block: the rows along N and columns along K that share one scale; the last ones may be fewer. (1, K) is a scale per
    output channel, (N, K) one per tensor. None: no scales.
    sub: columns along K that share a subscale, 0 for formats without. scales: the dtype that scales and minima need.
    layout: "rows", or "panels" for values that lie as the CPU kernels want them in memory.
    nbytes: stored, headers included.
    stored: the file's own name of the values' format where it is not `format`, to which `read` converts exactly.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    block: tuple[int, int] | None = None
    sub: int = 0
    scales: Literal["fp32", "fp16"] = "fp32"
    layout: Literal["rows", "panels"] = "rows"
    nbytes: int
    stored: str = ""


class Checkpoint(Protocol):
    """Named tensors, opened and checked, none of them read yet."""

    @property
    def source(self) -> str:
        """How messages name it: its path."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """The planes of a tensor in the format's order: values (…, N, K), scales (…, ⌈N/block[0]⌉, ⌈K/block[1]⌉), and
        others, minima as scales and the second level's (…, N, K/sub).

        expert: only this one of a tensor with experts, without that axis. rows: only these outputs, start and stop at
        multiples of block[0], or stop at N. Views where the format allows it, so that the rest is not read. Views keep
        the file mapped; writing to them changes no file. CheckpointError for an unknown name.
        """
        ...


def total_bytes(checkpoint: Checkpoint) -> int:
    """Bytes stored by all tensors."""
    return sum(info.nbytes for info in checkpoint.tensors.values())


def take(info: TensorInfo, planes: tuple[Tensor, ...], expert: int | None, rows: slice | None) -> tuple[Tensor, ...]:
    """Views of one expert and of a range of rows of a whole tensor, as `Checkpoint.read` gives them."""
    if expert is not None:
        planes = tuple(plane[expert] for plane in planes)
    if rows is not None:
        block = info.block[0] if info.block else 1
        n = info.shape[-2]
        if info.layout != "rows" or rows.start % block or (rows.stop % block and rows.stop != n):
            raise ValueError(
                f"{info.name}: rows {rows.start}..{rows.stop} of {n}, expected multiples of the block of {block} rows "
                f"and layout rows, found layout {info.layout}"
            )
        values, *scales = planes
        blocks = slice(rows.start // block, -(-rows.stop // block))
        planes = values[..., rows, :], *(plane[..., blocks, :] for plane in scales)
    return planes
