"""What the fault tests start is started as in tests/integration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder kills, stops or damages something."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.faults)
