"""What inference engines tell of their own caches, in their own words, made into events of the index.

    engine ──ZeroMQ──► zmq ──seq, payload──► feed ──EventBatch──► LocalityIndex
                                              │
                              decode: payload ──► Stored, Removed, Cleared
                              naming: tokens and extra keys ──► public names
                              held: the engine's hashes ──► names, and where each block is

Only ``zmq`` waits or opens sockets. docs/engine-events.md says how to switch engines' events on.
"""
