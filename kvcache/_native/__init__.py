"""The C++ modules ``core`` and ``index``, and nothing else: missing where there was no compiler.

Then ``kvcache/sums_twin.py`` and ``kvcache/index_twin.py`` serve; each has the functions of its module and
refuses the same input with the same words. ``kvcache/sums.py`` and ``kvcache/index.py`` pick one.
"""
