"""A finished run that several files of tests go on from."""

from __future__ import annotations

import pytest
from finished_runs import FinishedRun
from forks import train_in_forks
from short_run import RUN_ARGUMENTS, save_rows


@pytest.fixture(scope="session")
def checkpointed_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Two ranks, with the checkpoints of steps 6, 8, 10, 12 and 14. Go on from it in a copy: it is shared."""
    folder = tmp_path_factory.mktemp("checkpointed") / "work"
    folder.mkdir()
    save_rows(folder)
    ranks = train_in_forks([RUN_ARGUMENTS] * 2, [folder] * 2)
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks
    return FinishedRun.read(folder / "run")
