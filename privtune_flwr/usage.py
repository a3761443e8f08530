"""What this process has used, as the operating system counts it."""

from __future__ import annotations

import resource
import sys
import time


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def compute_seconds() -> float:
    """Processor seconds of this process so far, all threads together.

    What a device reports of its work: unlike a clock's, these seconds do not grow where simulated
    devices share cores. With one thread on an idle device the two are the same.
    """
    return time.process_time()
