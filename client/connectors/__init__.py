"""Connectors: an engine's hooks, translated. Each file is the only one that imports its engine."""
