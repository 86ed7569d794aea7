"""Tests that want eight devices: `tests/training/test_eight_devices.py` runs them in a process
that has them, and nobody else collects them."""

import os

collect_ignore_glob = [] if os.environ.get("JAX_NUM_CPU_DEVICES") == "8" else ["test_*.py"]
