"""Memory that a loaded graph no longer needs, given back to the system."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def give_back() -> None:
    """glibc keeps what was freed: after a width was cut out of wider weights, twice what it holds."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no such call, and no such habit
            ctypes.CDLL(None).malloc_trim(0)
