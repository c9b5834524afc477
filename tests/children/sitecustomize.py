"""Runs at the start of each Python process that the tests start: its garbage collector runs rarely.

An import of vLLM makes millions of objects, and the collector's visits to them take 4 of its 12 seconds.
"""

import gc

gc.set_threshold(100_000, 50, 50)
