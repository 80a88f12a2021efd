"""What a cache would have been worth on a trace: replays, curves, samples."""
