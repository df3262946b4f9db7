"""Runs in forked ranks are shared with `tests/integration`."""

from __future__ import annotations

import sys
from pathlib import Path

# pytest puts a folder of tests on the path when it collects from it, and here it may collect from this folder only.
sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))
