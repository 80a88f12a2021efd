"""One node: the process that owns the tiers, decides, and answers."""

assert __name__ == "kvcache.server", "import kvcache.server, not server"
