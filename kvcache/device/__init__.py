"""KV in the memory of accelerators: an engine's pages, the slab of blocks beside them, and what moves bytes.

Everything here imports torch (extra ``[torch]``) and works on CPU tensors too, only slower.
"""
