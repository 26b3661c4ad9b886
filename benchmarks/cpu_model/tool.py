"""llama.cpp or a fork of it through its program `llama-batched-bench`, in a process for each turn."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from grok_bench.kernels.entrant import Dropped, limited

from .engines import Load

BATCH, UBATCH = 2048, 512  # tokens, the program's defaults
PER_REQUEST = 256  # llama.cpp rounds the context of one request up to a multiple of this


class Tool:
    """One GGUF file under one load, by the command given. `peak`: bytes of the largest process, mapped pages included.

    Both forks print the same table: a row of `| PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | …` for each load.
    """

    def __init__(self, command: str, file: Path, load: Load, limit: float) -> None:
        self.load, self.limit, self.peak = load, limit, 0
        context = load.requests * -(-(load.prompt + load.new) // PER_REQUEST) * PER_REQUEST
        sizes = {"-c": context, "-b": BATCH, "-ub": UBATCH, "-t": torch.get_num_threads()}
        work = {"-npp": load.prompt, "-ntg": load.new, "-npl": load.requests}
        options = [str(word) for pair in (sizes | work).items() for word in pair]
        self.command = [*shlex.split(command), "-m", str(file), *options]

    def check(self, again: bool = False) -> None:
        """Run it once, which brings the file into the page cache. No result is returned that could be compared."""
        if not again:
            self.time(0)

    def time(self, turn: int) -> float:
        """Seconds of all prompts, or of one step of one token for each request."""
        with limited(self.limit), tempfile.TemporaryFile("w+") as out:
            try:
                process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
            except OSError as error:
                raise Dropped("missing", f"{self.command[0]}: {error.strerror}") from None
            try:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            finally:
                if process.returncode is None:
                    process.kill()
                    process.wait()
            out.seek(0)
            lines = out.read().strip().splitlines()
        self.peak = max(self.peak, usage.ru_maxrss << 10)
        rows = [cells for line in lines if (cells := [c.strip() for c in line.split("|")[1:-1]]) and cells[0].isdigit()]
        asked = [str(n) for n in (self.load.prompt, self.load.new, self.load.requests)]
        if process.returncode or len(rows) != 1 or rows[0][:3] != asked:
            said = next((line for line in reversed(lines) if line.strip()), "nothing")
            raise Dropped("failed", f"exit status {process.returncode}, expected one row of a table; it said: {said}")
        return float(rows[0][6]) / self.load.new if self.load.new else float(rows[0][4])

    def close(self) -> None: ...


def version(command: str) -> str:
    """What the program says of itself, in a line."""
    try:
        done = subprocess.run(
            [*shlex.split(command), "--version"], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version: ")]
    return lines[0].removeprefix("version: ") if lines else "unknown"
