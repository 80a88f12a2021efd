"""The engine's and the router's side: stores to load from and save to, and the connectors."""

assert __name__ == "kvcache.client", "import kvcache.client, not client"
