"""Which block goes: one policy a file, and the operator's hand on it."""

assert __name__ == "kvcache.eviction", "import kvcache.eviction, not eviction"
