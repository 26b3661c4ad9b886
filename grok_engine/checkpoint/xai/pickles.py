"""Finds the arrays in one file of the release without unpickling it.

A pickle is a program, and unpickling runs it. Here `pickle_machine` evaluates the few opcodes that the pickle of a
numpy array, or of an object holding two, consists of, and refuses what such a file never contains; the arrays are
then views of the mapped file.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np

from grok_engine.checkpoint.base import CheckpointError

from .pickle_machine import ArrayPlace, Machine, PickleError

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True, slots=True)
class PickleHeader:
    """What one file holds: a bare array (`scales` None), or a quantised matrix."""

    path: Path
    file_size: int
    weight: ArrayPlace
    scales: ArrayPlace | None


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """Views of a private mapping of the file: writing to them changes no file.

    The mapping lives as long as the arrays. The data starts wherever the pickle put it, so fp32 and bf16 views are
    usually not aligned to their item size; numpy and torch read them correctly all the same.
    """

    weight: Array
    scales: Array | None


def read_header(path: str | Path) -> PickleHeader:
    """Shapes, dtypes and offsets of one file. Reads only the opcodes, whatever the size of the data.

    Raises CheckpointError, naming the file, what was expected and what was found.
    """
    with _opened(Path(path)) as (_, header):
        return header


def map_pickle(path: str | Path) -> MappedTensor:
    """The arrays of one file as views of a copy-on-write mapping: (in, out) layout, bf16 as ml_dtypes.bfloat16."""
    with _opened(Path(path)) as (file, header):
        # Copy-on-write rather than read-only: torch.from_numpy wants memory that may be written.
        try:
            data = mmap.mmap(file.fileno(), header.file_size, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: expected a mapping of {header.file_size} bytes, found: {error}") from None
    return MappedTensor(_view(data, header.weight), None if header.scales is None else _view(data, header.scales))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, PickleHeader]]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise CheckpointError(f"{path}: expected a regular file, found something else")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            yield file, PickleHeader(path, size, *Machine(file, size).run())
    except PickleError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from None


def _view(data: mmap.mmap, place: ArrayPlace) -> Array:
    order: Literal["C", "F"] = "F" if place.fortran else "C"
    view: Array = np.ndarray(place.shape, place.dtype, buffer=data, offset=place.offset, order=order)
    return view
