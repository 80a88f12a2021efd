"""``kvcache tune``: what a cache would have been worth under another policy or size; and what a node does.

Exit status: 0 done, 1 something is wrong with what was asked, 2 usage.
"""

from __future__ import annotations

import click

from kvcache.eviction.commands.advise import advise_command
from kvcache.eviction.commands.live import set_command, tell_command
from kvcache.eviction.commands.mrc import mrc_command
from kvcache.eviction.commands.replay import replay_command
from kvcache.eviction.commands.report import report_command
from kvcache.eviction.commands.size import size_command


@click.group()
def tune() -> None:
    """Try policies and sizes of the cache on traces of requests, and set them in a running node."""


for command in (replay_command, mrc_command, size_command, advise_command, report_command):
    tune.add_command(command)
for command in (set_command, tell_command):
    tune.add_command(command)
