"""What the fault tests start is started as in tests/integration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))

from fault_run import carry_out, prepare_work
from finished_runs import FinishedRun


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder kills, stops or damages something."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working folder with the training data."""
    return prepare_work(tmp_path / "work")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The run on two ranks that nothing has happened to. It is shared: go on from it in a copy."""
    run, _ = carry_out(prepare_work(tmp_path_factory.mktemp("undisturbed") / "work"))
    return run
