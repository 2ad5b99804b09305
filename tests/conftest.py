"""Shared by all tests: helpers beside this file import by name (`import tiny`), and torch keeps to one core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
