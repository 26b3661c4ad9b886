"""`grok-engine bench`: the group; each command is a line here."""

from __future__ import annotations

import click

from .engine.commands import latency, serve, throughput


@click.group()
def bench() -> None:
    """Measure."""


for command in (latency, throughput, serve):
    bench.add_command(command)
