"""Moving the bytes of blocks between nodes: one contract (``base``), a file a way of doing it."""
