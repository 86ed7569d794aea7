"""What eight devices compute: the tests in `eight_devices/`, in two processes of their own.

The number of devices is fixed when JAX starts, and the other tests want one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("eight_devices")
LONGEST = FOLDER / "test_meshes.py"
OTHERS = sorted(set(FOLDER.glob("test_*.py")) - {LONGEST})


@pytest.mark.parametrize("files", [[LONGEST], OTHERS], ids=["meshes", "others"])
def test_on_eight_devices(files: list[Path]) -> None:
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
            *map(str, files),
        ],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
