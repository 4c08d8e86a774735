"""Let each write of a run's saves fail in turn, with a full disk, an I/O error and half the bytes; go on; compare.

    python scripts/fault_test.py                about 5 minutes

It runs the test of tests/engines/test_durability.py with no write left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the test and return its exit code."""
    test = "tests/engines/test_durability.py::test_a_write_that_fails_loses_nothing"
    environment = {**os.environ, "EMTOOL_FAULT_STRIDE": "1"}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", test]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
