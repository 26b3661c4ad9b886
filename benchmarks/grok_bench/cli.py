"""`grok-engine bench`: the group; each command is a line here."""

from __future__ import annotations

import click

from .engine.commands import latency, serve, throughput
from .kernels.commands import kernels_command, list_command
from .report.commands import compare_command, report_command


@click.group()
def bench() -> None:
    """Measure."""


for command in (latency, throughput, serve, kernels_command, list_command, compare_command, report_command):
    bench.add_command(command)
