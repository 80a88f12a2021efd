"""A distributed KV-cache storage service for LLM inference: what a block is, where it is, how it moves."""

__version__ = "0.1.0"
