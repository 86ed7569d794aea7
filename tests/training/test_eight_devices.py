"""What eight devices compute: the tests in `eight_devices/`, each file in a process of its own.

The number of devices is fixed when JAX starts, and the other tests want one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).with_name("eight_devices").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_eight_devices(file: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            str(file),
        ],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
