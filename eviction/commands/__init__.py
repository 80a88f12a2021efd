"""``kvcache tune`` and ``kvcache trace``."""
