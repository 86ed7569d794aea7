"""Shared by all tests: `reference` is importable from anywhere, and nothing reaches a hub."""

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The TPU compiler that plans are tested with looks for TPUs otherwise, and complains.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))
# Libraries that are first imported inside a command under test keep a handler for its output, which
# is closed after it, and logging prints a traceback for each message. (A message of ours with wrong
# arguments still fails its test: pytest's own handler raises.)
logging.raiseExceptions = False
