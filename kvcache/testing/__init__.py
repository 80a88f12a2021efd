"""Contract suites, clocks and fault wrappers, shipped so that a plug-in's author can use them too."""
