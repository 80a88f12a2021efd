"""Traces of requests: read, written, made up, recorded by a node."""
