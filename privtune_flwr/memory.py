"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
