"""A double of llm-transparency-tool 0.1: its import names, signatures, node names and arithmetic, written from a
description of them.

The tool is on no package index and its licence is not ours. This is the slow reference of the tests and the benchmark:
it forms what every head takes from every position, as the tool does, and reads every edge off the tensor by itself.
"""
