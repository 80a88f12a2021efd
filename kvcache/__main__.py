"""``python -m kvcache``: the command, where its script is not on the path."""

from kvcache.cli import main

main()
