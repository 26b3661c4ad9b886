"""`grok-engine bench`: the group; each command is a line here."""

from __future__ import annotations

import click

from .engine.commands import latency, serve, throughput
from .report.commands import compare_command, report_command


@click.group()
def bench() -> None:
    """Measure."""


for command in (latency, throughput, serve, compare_command, report_command):
    bench.add_command(command)
