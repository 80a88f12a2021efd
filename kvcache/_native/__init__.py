"""The C++ module ``core``, and nothing else: missing where the package was built without a compiler.

Then ``kvcache/sums_twin.py`` serves; both have the same functions and refuse the same input with the
same words. ``kvcache/sums.py`` picks one.
"""
